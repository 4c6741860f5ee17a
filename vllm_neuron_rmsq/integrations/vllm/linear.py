"""The consumers: FP8 linear kernels for vLLM. One multiplies rows of a scheme, one is for weights alone.

Dimensions:
    H: input features
    N: output features
    ...: rows (tokens)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_neuron_rmsq import backends, ops, settings, target, weights
from vllm_neuron_rmsq.integrations.vllm import schemes, versions
from vllm_neuron_rmsq.integrations.vllm.report import LinearReport
from vllm_neuron_rmsq.integrations.vllm.versions import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
    QuantizedActivation,
    as_quantized_activation,
    replace_parameter,
)

UNLOADED = torch.finfo(torch.float32).min
"""vLLM's mark of a scale that the checkpoint does not have."""


class PackedFp8LinearKernel(FP8ScaledMMLinearKernel):
    """Multiplies rows of a scheme by an FP8 weight, in every linear whose keys a scheme has.

    Takes the rows of a fused layer as they are; anything else it quantizes itself, by the same contract.

    Attributes:
        scheme, backend, target: how it computes, and with what.
        shard_scale: the scales that :meth:`keep_shard_scales` kept, until the weight is processed.
        loaded: the linear's scales as they came from the checkpoint; ``None`` where it had no codes.
    """

    shard_scale: torch.Tensor | None = None
    loaded: dict[str, torch.Tensor] | None = None

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if versions.VLLM_BATCH_INVARIANT:
            return False, "keeps its weight in a layout of its own, which VLLM_BATCH_INVARIANT=1 reads"
        backend, reason = _backend()
        return (True, None) if backend else (False, reason)

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        scheme, reason = schemes.find(c.activation_quant_key, c.weight_quant_key)
        return (True, None) if scheme else (False, reason)

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names) -> None:
        super().__init__(c, layer_param_names)
        self.target = target.get(settings.current().target)
        scheme, _ = schemes.find(c.activation_quant_key, c.weight_quant_key)
        backend, _ = _backend()
        assert scheme is not None and backend is not None  # the base class has asked both questions above
        self.scheme, self.backend = scheme, backend

    def input_quant_key(self):
        return self.scheme.rows

    def keep_shard_scales(self, layer: torch.nn.Module) -> None:
        """Keep the scale of each shard of a per-tensor weight, one for each of its outputs.

        A fused linear (q, k and v; gate and up) has as many weight scales as shards. vLLM brings all shards
        to the largest one when it processes the weight, which rounds nearly every code anew. After this it
        takes them for one shard that was fused in the checkpoint, where the scales not loaded are
        ``UNLOADED``. To be called between loading and ``process_weights_after_loading`` of the linear's
        method.
        """
        weight_name, name = self.layer_param_names[:2]
        if self.config.weight_quant_key != versions.kFp8StaticTensorSym or not hasattr(layer, name):
            return
        if getattr(layer, weight_name).dtype != torch.float8_e4m3fn:
            return  # it is processed already, as an unquantized checkpoint's is
        scale = getattr(layer, name)
        if scale.dim() != 1:
            return
        loaded, largest = scale.data, scale.data.max()
        shards: list[int] = layer.logical_widths  # type: ignore[assignment]
        if len(loaded) == len(shards) and loaded[-1] != UNLOADED:
            widths = torch.tensor(shards, device=loaded.device)
            self.shard_scale = loaded.repeat_interleave(widths) if len(loaded) > 1 else loaded
            one = torch.stack([largest, torch.full_like(largest, UNLOADED)])
            setattr(layer, name, torch.nn.Parameter(one, requires_grad=False))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bring the weight within the target's range and lay it out for the backend's matmul.

        vLLM hands it over as ``[H, N]``, a transposed view of ``[N, H]``, and with block scales as ``[N,
        H]``. Afterwards ``layer.weight`` is uint8 in the backend's layout, its scale fp32 ``[N]``, ``[1]`` or
        ``[ceil(N / 128), ceil(H / 128)]`` and, with a static scheme, ``layer.input_scale`` fp32 ``[1]``. The
        layer says from now on which rows it takes, under vLLM's key and as ``layer.rmsq_scheme``.

        Raises:
            ValueError: weight or scale have another shape than expected, hold NaN or Inf, or the scale of the
                activations is not a positive number.
        """
        weight_name, scale_name, input_scale_name = self.layer_param_names = _parameters(self, layer)
        codes, scale = _codes_and_scale(self, layer, self.scheme.blocks)
        if self.shard_scale is not None:
            scale, self.shard_scale = self.shard_scale, None
        if self.scheme.static:
            self._process_input_scale(layer, input_scale_name)
        layer.rmsq_scheme = self.scheme  # type: ignore[assignment]
        versions.expose_input_quant_key(layer, self)  # not every linear method of vLLM's does
        if _read_by_vllm(layer):
            return
        if codes.is_meta:  # a model without its weights: there is nothing to look at
            scale = scale.to(codes.device)
        else:
            _check_loaded(scale_name, scale)
            codes, scale, layer.rmsq_halved = weights.fit(codes, scale, self.target)  # type: ignore[assignment]
        prepacked = ops.prepack_fp8_weight(codes, scale, self.backend)
        replace_parameter(layer, weight_name, torch.nn.Parameter(prepacked.data, requires_grad=False))
        replace_parameter(layer, scale_name, torch.nn.Parameter(scale, requires_grad=False))

    def _process_input_scale(self, layer: torch.nn.Module, name: str) -> None:
        """Bring the static scale of the activations to the target's range.

        A checkpoint that has none (ModelOpt writes such ones) leaves it to who runs it: then a scale per
        token.
        """
        scale = getattr(layer, name).data.float().reshape(1)
        if scale == UNLOADED:
            self.scheme = schemes.per_token.SCHEME
            return
        if not (scale.isfinite() and scale > 0):
            raise ValueError(
                f"{name}: expected a positive number, got {scale.item()}; the checkpoint is corrupt"
            )
        scale = self.target.static_scale(scale).to(getattr(layer, self.layer_param_names[0]).device)
        replace_parameter(layer, name, torch.nn.Parameter(scale, requires_grad=False))

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | QuantizedActivation,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``[..., N]`` for ``x`` ``[..., H]``, plain or rows of the scheme."""
        weight_name, scale_name, input_scale_name = self.layer_param_names
        static_scale = getattr(layer, input_scale_name) if self.scheme.static else None
        activation = as_quantized_activation(x, self.scheme.rows)
        if activation is None:
            rows = self.scheme.quantize(
                x,
                lower_bound=self.scheme.bound,
                static_scale=static_scale,
                target=self.target,
                backend=self.backend,
            )
            dtype = x.dtype
        else:
            rows, dtype = activation.data, activation.orig_dtype
        options = {"bias": bias, "static_scale": static_scale, "out_dtype": self.config.out_dtype or dtype}
        if _read_by_vllm(layer):
            codes, scale = _codes_and_scale(self, layer, self.scheme.blocks)
            return self.scheme.multiply(rows, codes, scale, backend="torch", **options)
        weight, scale = getattr(layer, weight_name), getattr(layer, scale_name)
        out_features, in_features = self.config.weight_shape
        prepacked = ops.PrepackedWeight(weight, out_features, in_features, self.backend, self.scheme.blocks)
        return self.scheme.multiply(rows, prepacked, scale, **options)

    def apply_scaled_mm(self, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("PackedFp8LinearKernel multiplies packed rows in apply_weights")


class WeightOnlyFp8LinearKernel(FP8ScaledMMLinearKernel):
    """Multiplies plain activations by what an FP8 weight stands for, in the model's dtype.

    For checkpoints that quantize nothing but weights. The weight takes twice the checkpoint's room.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        backend, reason = _backend()
        return (True, None) if backend else (False, reason)

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        keys = [key for scheme in schemes.SCHEMES for key in scheme.weight_keys]
        if c.weight_quant_key in keys:
            return True, None
        return False, f"needs per-channel, per-tensor or 128 x 128 block weights, not {c.weight_quant_key}"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the codes, ``[H, N]`` or with block scales ``[N, H]``, by the numbers, ``[N, H]``.

        Raises:
            ValueError: weight or scale have another shape than expected, or hold NaN or Inf.
        """
        self.layer_param_names = _parameters(self, layer)
        blocks = self.config.weight_quant_key in schemes.block.SCHEME.weight_keys
        codes, scale = _codes_and_scale(self, layer, blocks)
        if codes.is_meta:  # a model without its weights
            weight = torch.empty_like(codes, dtype=self.config.out_dtype)
        else:
            _check_loaded(self.layer_param_names[1], scale)
            codes, scale, _ = weights.fit(codes, scale, target.get("trn3"))  # no code is beyond its range
            weight = weights.dequantize(codes, scale, self.config.out_dtype)
        replace_parameter(layer, self.layer_param_names[0], torch.nn.Parameter(weight, requires_grad=False))
        layer.rmsq_weight_only = True  # type: ignore[assignment]

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``[..., N]`` for ``x`` ``[..., H]``."""
        return torch.nn.functional.linear(x, getattr(layer, self.layer_param_names[0]), bias)

    def apply_scaled_mm(self, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("WeightOnlyFp8LinearKernel multiplies in apply_weights")


NAMES = (PackedFp8LinearKernel.__name__, WeightOnlyFp8LinearKernel.__name__)
"""As vLLM's messages call our kernels."""


def _parameters(kernel: FP8ScaledMMLinearKernel, layer: torch.nn.Module) -> list[str]:
    """Return the names of a linear's weight, its scale and the static scale of its activations."""
    weight, scale, input_scale = kernel.layer_param_names[:3]
    if not hasattr(layer, scale):
        scale = f"{scale}_inv"  # DeepSeek's name for the scales of blocks, and so `fp8`'s
    return [weight, scale, input_scale]


def _codes_and_scale(
    kernel: FP8ScaledMMLinearKernel, layer: torch.nn.Module, blocks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a loaded weight, ``[N, H]`` uint8, and its scale: ``[N]``, ``[1]`` or blocks."""
    weight, scale = (getattr(layer, name).data for name in kernel.layer_param_names[:2])
    sizes = getattr(layer, "output_partition_sizes", [])
    if blocks and any(size % weights.BLOCK for size in sizes[:-1]):
        # vLLM lets some such layers pass, and loads one linear's scales over the other's.
        raise ValueError(
            f"{kernel.layer_param_names[1]}: vLLM holds linears of {sizes} outputs in one weight; expected "
            f"multiples of {weights.BLOCK}, but for the last: blocks cannot be cut. Make a scale a channel "
            "of them: vllm-neuron-rmsq quantize --from-fp8"
        )
    out_features, in_features = kernel.config.weight_shape
    expected = (out_features, in_features) if blocks else (in_features, out_features)
    if weight.shape != expected:
        raise ValueError(f"weight: expected shape {list(expected)} after loading, got {list(weight.shape)}")
    codes = (weight if blocks else weight.t()).contiguous().view(torch.uint8)
    return codes, scale.float() if blocks else scale.float().reshape(-1)


def _check_loaded(name: str, scale: torch.Tensor) -> None:
    """Raise ValueError where the checkpoint had no scale for some of a weight."""
    if (scale == UNLOADED).any():
        raise ValueError(
            f"{name}: the checkpoint has none for this layer, or for part of it, though its config.json says "
            "that the layer is FP8; if it is not, name it there among those not quantized (`ignore`, "
            "`modules_to_not_convert`, `exclude` or `exclude_modules`, by who wrote the checkpoint)"
        )


def _read_by_vllm(layer: torch.nn.Module) -> bool:
    """Whether vLLM itself reads a weight, which must stay in its layout then: MLA's ``kv_b_proj``."""
    return getattr(layer, "_cpu_skip_gemm_dispatch", False)


def prepare(model: torch.nn.Module) -> None:
    """Have vLLM process the weights of our FP8 linears as they want it. Before they are loaded.

    vLLM processes a weight when all are loaded, or each as soon as it is, at the first load and at later
    ones. So what is to happen around it is put around the method that does it, of the linear's own object.

    Raises:
        ValueError: vLLM has no kernel for a layer of FP8 experts, which it would say when all are loaded.
    """
    for name, layer in model.named_modules():
        experts = getattr(getattr(layer, "quant_method", None), "fp8_backend", None)
        if experts is not None and experts.name == "NONE":
            raise ValueError(
                f"{name}: vLLM has no kernel on this machine for experts in such FP8. Quantize the bf16 "
                "checkpoint without them: vllm-neuron-rmsq quantize SOURCE OUTPUT --ignore 're:.*experts.*'"
            )
        owners: list[Any] = [getattr(layer, "quant_method", None), getattr(layer, "scheme", None)]
        for owner in owners:
            for kernel in list(vars(owner).values()) if hasattr(owner, "__dict__") else ():
                if isinstance(kernel, PackedFp8LinearKernel | WeightOnlyFp8LinearKernel):
                    process = owner.process_weights_after_loading
                    owner.process_weights_after_loading = functools.partial(_process, kernel, name, process)
                    config: Any = getattr(owner, "quant_config", None)
                    # FBGEMM's would lay the weight out for a kernel of GPUs, if this is none with FP8.
                    if getattr(config, "use_marlin", False):
                        config.use_marlin = False
                    # It alone clips activations: the checkpoint's activation_scale_ub.
                    if isinstance(kernel, PackedFp8LinearKernel) and hasattr(config, "input_scale_ub"):
                        kernel.scheme = dataclasses.replace(kernel.scheme, bound=config.input_scale_ub)
                    # compressed-tensors' for blocks of weights alone asserts that this is False.
                    if getattr(owner, "is_static_input_scheme", False) is None:
                        owner.is_static_input_scheme = False


def _process(
    kernel: PackedFp8LinearKernel | WeightOnlyFp8LinearKernel,
    name: str,
    process: Callable,
    layer: torch.nn.Module,
) -> None:
    """Process the weight of the linear ``name`` by ``process``, vLLM's method."""
    if isinstance(kernel, PackedFp8LinearKernel):
        kernel.loaded = _loaded_scales(kernel, layer)
        kernel.keep_shard_scales(layer)
    try:
        process(layer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _loaded_scales(kernel: PackedFp8LinearKernel, layer: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Return a linear's parameters between loading and processing, without weight and bias.

    ``None`` for a weight that has no codes then: of a checkpoint in bf16.
    """
    weight = kernel.layer_param_names[0]
    if getattr(layer, weight).dtype != torch.float8_e4m3fn:
        return None
    return {n: p.data for n, p in layer.named_parameters(recurse=False) if n not in (weight, "bias")}


def check_has_checkpoint_form(kernel: PackedFp8LinearKernel | WeightOnlyFp8LinearKernel, name: str) -> None:
    """Raise ValueError where the linear ``name`` was not FP8 when it was loaded, or is no more."""
    if isinstance(kernel, WeightOnlyFp8LinearKernel):
        found = "FP8 weights alone, which are kept in the model's dtype"
    elif kernel.loaded is None:
        found = "a weight that was quantized at load"
    else:
        return
    raise ValueError(
        f"{name}: expected a linear whose checkpoint is FP8 with activations, to save as sharded_state, got "
        f"{found}; serve the checkpoint itself, or an FP8 one made by vllm-neuron-rmsq quantize"
    )


def checkpoint_form(kernel: PackedFp8LinearKernel, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint would have of a processed linear, by the names of its parameters.

    Codes ``[N, H]`` float8_e4m3fn, the scales as they were loaded, doubled where codes were halved, and bias.
    """
    weight_name, scale_name = kernel.layer_param_names[:2]
    weight = getattr(layer, weight_name).data
    if _read_by_vllm(layer):
        codes, _ = _codes_and_scale(kernel, layer, kernel.scheme.blocks)
    else:
        out_features, in_features = kernel.config.weight_shape
        codes = ops.unpack_fp8_weight(
            ops.PrepackedWeight(weight, out_features, in_features, kernel.backend, kernel.scheme.blocks)
        )
    assert kernel.loaded is not None  # check_has_checkpoint_form has asked
    form = {weight_name: codes.view(torch.float8_e4m3fn), **kernel.loaded}
    if getattr(layer, "rmsq_halved", False):
        form[scale_name] = form[scale_name] * 2
    bias = getattr(layer, "bias", None)
    return form if bias is None else form | {"bias": bias.data}


def registered() -> bool:
    """Whether vLLM asks :class:`PackedFp8LinearKernel` in this process."""
    return PackedFp8LinearKernel in versions._POSSIBLE_FP8_KERNELS.get(versions.current_platform._enum, ())


def linear_reports(names: Mapping[torch.nn.Module, str]) -> list[LinearReport]:
    """Say of every linear of a model whether it multiplies packed rows, by which scheme, or why it is stock.

    Args:
        names: every module of the model, and its name.
    """
    kinds = {"LinearBase", "RoutedExperts", "ParallelLMHead"}
    found = []
    for module, name in names.items():
        if not kinds & {cls.__name__ for cls in type(module).__mro__}:
            continue
        kernel = kernel_of(module)
        if isinstance(kernel, PackedFp8LinearKernel):
            halved = getattr(module, "rmsq_halved", None)
            found.append(LinearReport(name, kernel.scheme.name, halved=halved))
        else:
            found.append(LinearReport(name, reason=_stock(module, kernel)))
    return found


def kernel_of(module: torch.nn.Module) -> Any:
    """The object of vLLM's that multiplies by an FP8 weight, or ``None`` where there is none."""
    for owner in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
        for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
            if isinstance(value, FP8ScaledMMLinearKernel):
                return value
    return None


def _stock(module: torch.nn.Module, kernel: Any) -> str:
    """Why a linear is vLLM's own."""
    if isinstance(kernel, WeightOnlyFp8LinearKernel):
        return "FP8 weights alone: it multiplies in the model's dtype"
    if kernel is None:
        owner = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        return f"not a linear with FP8 weights and activations: {type(owner).__name__}"
    ours = PackedFp8LinearKernel
    for usable, reason in (ours.is_supported(), ours.can_implement(kernel.config)):
        if not usable:
            return reason or ""
    return f"{type(kernel).__name__} was asked first"


def _backend() -> tuple[str | None, str]:
    """Return the backend that serves on vLLM's platform, or ``None`` and why none does."""
    return backends.for_serving(settings.current().backend, versions.current_platform.device_type)
