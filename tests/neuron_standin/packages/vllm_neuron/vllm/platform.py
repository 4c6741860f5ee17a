"""The platform: where FP8 weights are refused."""

from __future__ import annotations

import types

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_neuron import envs

if not envs.VLLM_NEURON_CPU_MODE:
    # libtorch_neuronx_lite brings a device type of this name; here there is no such device.
    device_module = types.ModuleType("torch.neuron")
    device_module.is_available = lambda: False
    torch.utils.rename_privateuse1_backend("neuron")
    torch._register_device_module("neuron", device_module)


class NeuronPlatform(Platform):
    _enum = PlatformEnum.OOT
    device_name = device_type = "cpu" if envs.VLLM_NEURON_CPU_MODE else "neuron"
    ray_device_key = "neuron_cores"
    supported_quantization = ("neuron_quant", "compressed-tensors", "modelopt")
    _cpu_dequant_quantizations = frozenset({"mxfp8"})

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm_neuron.parallel.neuron_communicator.NeuronDeviceCommunicator"

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        if vllm_config.model_config is None:
            return
        cls._validate_quantization_config(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = "vllm_neuron.vllm.worker.neuron_worker.NeuronWorker"
        vllm_config.cache_config.block_size = vllm_config.cache_config.block_size or 32

    @classmethod
    def _validate_quantization_config(cls, vllm_config) -> None:
        neuron_config = vllm_config.additional_config.get("neuron_config", {})
        if neuron_config.get("quantization") in cls._cpu_dequant_quantizations:
            return
        config = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
        if not config or config.get("quant_method") != "compressed-tensors":
            return
        only = "Neuron only supports compressed-tensors for KV cache quantization (q_scale/k_scale/v_scale). "
        for name, group in config.get("config_groups", {}).items():
            where = f"in config_groups['{name}'] is not supported."
            if group.get("weights"):
                raise ValueError(f"{only}Weight quantization {where}")
            if group.get("output_activations"):
                raise ValueError(f"{only}Output activation quantization {where}")
            attention = any("Attention" in target for target in group.get("targets", []))
            if group.get("input_activations") and not attention:
                raise ValueError(f"{only}Input activation quantization on non-attention targets {where}")
