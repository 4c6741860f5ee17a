"""What would become of a model, told by its ``config.json``: no weight is read, and none has memory.

vLLM builds the model as it would to serve it, on PyTorch's meta device, where tensors have shapes and no
storage; so a model of any size takes the memory of its Python objects. Then the same
:func:`.fusion.bind` runs the same dummy forward, on tensors that pretend to be on vLLM's device
(``FakeTensorMode``). What only weights can tell, whether one would be halved, stays unknown.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedOperatorException

from vllm_neuron_rmsq import settings
from vllm_neuron_rmsq.integrations import names
from vllm_neuron_rmsq.integrations.vllm import versions
from vllm_neuron_rmsq.integrations.vllm.report import FusionReport

logger = logging.getLogger(f"vllm.{__name__}")


def report(model: str) -> FusionReport | None:
    """Return the report that the model would get when it is served on this machine, on one rank.

    For a process of its own: vLLM's distributed state is made and stays.

    Args:
        model: a checkpoint folder, of which ``config.json`` is enough, or a name that vLLM can resolve.

    Returns:
        the report, without weights that would be halved; ``None`` when the plugin would do nothing at all.

    Raises:
        ValueError: vLLM does not take the model, or this vLLM lacks what a preview needs.
    """
    if versions.missing():
        return None
    missing = names.missing(versions.CHECK)
    if missing:
        raise ValueError(f"vLLM {versions.installed()} cannot build a model without weights: {missing[0]}")
    config = versions.EngineArgs(
        model=model, load_format="dummy", enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()  # which loads the plugins
    from vllm_neuron_rmsq.integrations.vllm import fusion, linear  # they derive from vLLM's classes

    if not linear.registered():
        return None
    extra = config.additional_config
    settings.install(settings.Settings.load(additional_config=extra if isinstance(extra, dict) else None))
    with versions.set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        versions.init_distributed_environment(1, 0, f"file://{Path(folder) / 'store'}", 0, "gloo")
        versions.ensure_model_parallel_initialized(1, 1)
        with versions.set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            module = versions.initialize_model(vllm_config=config)
            linear.prepare(module)
            _process(module)
        with _pretending(module, torch.device(config.device_config.device)):
            return fusion.bind(module, config, config.model_config)


def _process(model: nn.Module) -> None:
    """Bring weights into the layout their kernels multiply, as vLLM does after loading."""
    for name, module in model.named_modules():
        process = getattr(getattr(module, "quant_method", None), "process_weights_after_loading", None)
        if process is None:
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if "scale" in parameter and value.dim() < 2:  # of whole shards: vLLM looks at their numbers
                one = torch.ones(value.shape, dtype=value.dtype, device="cpu")
                setattr(module, parameter, nn.Parameter(one, requires_grad=False))
        try:
            process(module)
        except Exception as error:  # it looks at values; ours do not, and nobody multiplies by the others'
            logger.debug("%s: not processed without weights: %s", name, error)


class _Shapes(FakeTensorMode):
    """Computes shapes. An operator that nobody described to PyTorch and that returns nothing, as vLLM's own
    that work in place, does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (UnsupportedOperatorException, NotImplementedError):
            if func._schema.returns:
                raise
            return None


@contextlib.contextmanager
def _pretending(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the tensors of a model on the meta device, and all new ones, pretend to be on ``device``."""
    mode = _Shapes(allow_non_fake_inputs=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    fake: Any = FakeTensor(mode, tensor.detach(), device)
                    tensors[name] = nn.Parameter(fake, False) if tensors is module._parameters else fake
    with mode:
        yield
