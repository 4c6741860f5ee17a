"""A stand-in for AWS's ``vllm_neuron`` (and ``libtorch_neuronx_lite``), written for our tests, in our own
words.

The real packages come from AWS's own index, need the Neuron SDK and cannot be installed where these tests
run. This one has the same names, signatures, shapes and refusals as vLLM Neuron 0.24.0.1.1.0 as far as our
integration touches them, on plain PyTorch. Somebody with the SDK who finds a difference should correct it
here: each fact below is what our integration relies on.

Facts it rests on, read in public sources in November 2026:

Platform
    - the platform class is ``vllm_neuron.vllm.platform.NeuronPlatform``, out of tree; its ``device_type`` is
      ``"cpu"`` under VLLM_NEURON_CPU_MODE=1, else ``"neuron"``.
    - ``check_and_update_config`` calls ``_validate_quantization_config(vllm_config)``, a class method, which
      raises ValueError for a compressed-tensors checkpoint with quantized weights, unless
      ``additional_config["neuron_config"]["quantization"]`` is ``"mxfp8"``. It looks at nothing else, so a
      ModelOpt checkpoint passes.
    - it sets ``worker_cls`` to ``NeuronWorker``.
Worker
    - ``NeuronWorker.__init__`` registers every class of ``vllm_neuron.model.registry.get_models()`` with
      ``ModelRegistry.register_model(architecture, class)``, overwriting what was there.
    - the model is resolved from ``model_config.architecture``, built by ``from_configs(hf_config,
      neuron_config)`` on the meta device, filled by ``load_weights(path, device, cache_dir)``, moved by
      ``.to(device)`` and compiled with fullgraph=True; with VLLM_NEURON_CPU_COMPILE=1 only
      ``load_weights_lite`` runs and the model goes back to meta. vLLM's current configuration is set
      meanwhile.
Llama
    - quantization: ``None`` for no quantization and for ANY compressed-tensors checkpoint (whose weights it
      would load as bf16, without scales), ModelOpt only with quant_algo FP8 and FP8 KV cache, ValueError for
      everything else.
    - layer, attention, MLP: attributes, shapes, layouts and collectives as in ``model/llama3/model.py`` here.
      Attention has no bias: those of a checkpoint are ignored without a word.
    - prefill is sequence parallel, ``[T / tp, H]`` on each rank, T > tp and a multiple of it. Decode has
      every row on every rank.
Loading
    - only ``named_parameters()`` are filled, each by the ``weight_loader`` attached to it, which gets one
      slice a key in the order of the mapping; its default key is its name. A key that is missing raises
      RuntimeError naming parameter and keys. What a loader returns is cast to the parameter's dtype.
      Keys nobody asks for are ignored.
Functions (``vllm_neuron.functional``)
    - signatures and layouts of ``qkv_proj``, ``flash_attention``, ``segmented_attention``,
      ``attention_decode``, ``gen_attention_decode_mask``, ``o_proj``, ``mlp``. Here they are always their
      plain PyTorch fallbacks: AWS's kernels (nkilib) are not at hand, even with NKI_SIMULATOR=1.
    - ``attention_decode(W_out=None)`` returns ``[B, q_heads, Dh, S]``; the output projection's scale of an
      FP8 V cache is the caller's to undo.
    - the mask's layout along the context is private to the pair of functions; here it is the plain order.
Kernels
    - ``wrap_nki(kernel)[lnc](...)`` makes one node ``nki_kernel_wrapper``; tensors are its arguments, all
      else
      must be hashable; shapes are learned by running the kernel. Here it runs on our simulator.
"""


def register() -> str:
    """The ``vllm.platform_plugins`` entry point."""
    return "vllm_neuron.vllm.platform.NeuronPlatform"
