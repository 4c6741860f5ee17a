"""What becomes of every tensor of a checkpoint, decided from names, shapes and dtypes before any is read.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_neuron_rmsq.checkpoint.files import Described, Tensor
from vllm_neuron_rmsq.checkpoint.folder import some
from vllm_neuron_rmsq.target import Target

DECODER_LINEAR = re.compile(r"(^|\.)layers\.\d+\.(.*\.)?\w*_proj(_with_mqa)?\.weight$")
"""Checkpoint names of what is quantized: ``q_proj``, ``gate_up_proj``, ``experts.7.down_proj``, ..."""

NO_DECODER = re.compile(r"(^|\.)([^.]*(vision|visual|image|audio|speech|encoder)[^.]*|vit)\.")
"""Names within another tower than the language model's decoder."""

LM_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
EMBEDDING = re.compile(r"(^|\.)embed_tokens\.weight$")
FUSED_EXPERTS = re.compile(r"(\blayers\.\d+\..*\b(experts|block_sparse_moe))\.[^.]+(\.weight)?$")
"""Names of experts in one tensor of three dimensions. The first group is where vLLM has them."""
EXPERTS = re.compile(r"(?P<experts>\blayers\.\d+\..*\bexperts)\.\d+\.")
"""Names of linears of one expert each."""
TOWER = re.compile(r"^((model|language_model)\.)*+(?!layers\.)(?P<tower>\w+)\.")
"""Names of what is beside the decoder's layers: ``visual.blocks.0.mlp``, ``model.connector.proj``, ..."""

MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears that vLLM makes one of: all of them are quantized, or none."""

FLOATS = ("BF16", "F16", "F32")
SCHEMES = ("per-channel", "per-tensor", "static")


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is to be quantized; see :func:`conversion.convert`."""

    target: Target
    scheme: str
    ignore: tuple[str, ...]
    include: tuple[str, ...]
    lm_head: bool
    from_fp8: bool

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}; got {self.scheme!r}")
        if self.from_fp8 and (self.scheme != "per-channel" or self.include or self.lm_head):
            raise ValueError(
                "from_fp8: keeps the linears that are in FP8 already, and their activations' scheme; "
                "it goes without scheme, include and lm_head"
            )
        for pattern in (*self.ignore, *self.include):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern}: is no regular expression ({error})") from error


@dataclass(frozen=True)
class Copy:
    """A tensor stays as it is."""

    source: Tensor

    def outputs(self) -> list[Described]:
        return [_like(self.source)]


@dataclass(frozen=True)
class Quantize:
    """A weight of ``[N, H]`` floating numbers becomes FP8.

    Attributes:
        module: name of the linear.
        source: its weight.
        per_tensor: one scale for all channels, else one each.
        static: whether the linear gets the scale of its activations, too.
    """

    module: str
    source: Tensor
    per_tensor: bool
    static: bool

    def outputs(self) -> list[Described]:
        rows = self.source.shape[0]
        scale = (1,) if self.per_tensor else (rows, 1)
        return _linear(self.module, self.source, scale, self.static)


@dataclass(frozen=True)
class Refit:
    """A weight in FP8 is brought within the target's range, with one scale a channel.

    Attributes:
        module: name of the linear.
        source: its codes, ``[N, H]``.
        scale: its scales: one, ``[N]``, ``[N, 1]``, or one a block.
        block: rows and columns of a block, or ``None``.
        input_scale: the scale of its activations, where it is static.
    """

    module: str
    source: Tensor
    scale: Tensor
    block: tuple[int, int] | None
    input_scale: Tensor | None

    def outputs(self) -> list[Described]:
        return _linear(self.module, self.source, (self.source.shape[0], 1), self.input_scale is not None)


Step = Copy | Quantize | Refit


@dataclass
class Plan:
    """What becomes of a checkpoint.

    Attributes:
        steps: by the file they are written to.
        quantized: names of the linears that are in FP8 in the end.
        left: parameters of each linear, or block of experts, that stays as it is, by name.
        ignore: what says so in ``quantization_config``.
        quantization_config: of ``config.json``.
        config: what else changes in ``config.json``.
    """

    steps: dict[str, list[Step]] = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    quantization_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def make(name: str, config: dict[str, Any], shards: dict[str, dict[str, Tensor]], recipe: Recipe) -> Plan:
    """Decide what becomes of a checkpoint.

    Args:
        name: of the checkpoint, for messages.
        config: its ``config.json``.
        shards: its tensors by the file they are in.
        recipe: what is wanted.

    Raises:
        ValueError: the checkpoint and the recipe do not go together.
    """
    everything = {tensor: about for tensors in shards.values() for tensor, about in tensors.items()}
    in_fp8 = [tensor for tensor in everything.values() if tensor.dtype.startswith("F8_E4M3")]
    if recipe.from_fp8:
        if not in_fp8:
            raise ValueError(f"{name}: holds no FP8 weights; leave --from-fp8 out")
        return _from_fp8(name, config, shards, everything, recipe)
    _refuse_quantized(name, config, in_fp8)
    return _quantize(name, config, shards, everything, recipe)


def quantization_config(
    ignore: Iterable[str],
    with_head: bool = False,
    per_tensor: bool = False,
    activations: str | None = "token",
    kv_cache_scheme: Any = None,
) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``, as compressed-tensors 0.17 writes it.

    Args:
        ignore: names of the linears that were left unquantized.
        with_head: the output projection was quantized, too; vLLM does not count it among linears.
        per_tensor: a weight has one scale, not one a channel.
        activations: ``token``: a scale for each, found at run time; ``tensor``: one, of the checkpoint;
            ``None``: they are not quantized.
        kv_cache_scheme: what the source's configuration says of the KV cache.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if activations else "naive-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                # Models with several towers have it elsewhere, and vLLM translates only names with a dot.
                "targets": ["Linear", *([r"re:.*\blm_head$"] if with_head else [])],
                "weights": number
                | {
                    "strategy": "tensor" if per_tensor else "channel",
                    "dynamic": False,
                    "observer": "memoryless_minmax",
                },
                "input_activations": activations
                and number | {"strategy": activations, "dynamic": activations == "token"},
            }
        },
        "kv_cache_scheme": kv_cache_scheme,
        "ignore": list(ignore),
    }


def _quantize(
    name: str,
    config: dict[str, Any],
    shards: dict[str, dict[str, Tensor]],
    everything: dict[str, Tensor],
    recipe: Recipe,
) -> Plan:
    plan = Plan()
    used: set[str] = set()
    heads = []
    tied = _tied(config)
    lone_embedding = recipe.lm_head and (tied or not any(map(LM_HEAD.search, everything)))
    static = recipe.scheme == "static"
    for shard, tensors in shards.items():
        steps = plan.steps.setdefault(shard, [])
        for tensor in tensors.values():
            module = tensor.name.removesuffix(".weight")
            if tied and LM_HEAD.search(tensor.name):
                continue  # the embedding once more
            is_head = bool(LM_HEAD.search(tensor.name))
            if (recipe.lm_head and is_head) or _wanted(tensor.name, module, recipe, used):
                _must_be_floats(name, tensor)
                steps.append(Quantize(module, tensor, recipe.scheme == "per-tensor", static))
                plan.quantized.append(module)
                heads += [module] if is_head else []
                continue
            steps.append(Copy(tensor))
            if lone_embedding and EMBEDDING.search(tensor.name):
                steps.append(Quantize("lm_head", tensor, recipe.scheme == "per-tensor", static))
                plan.quantized.append("lm_head")
                heads.append("lm_head")
                plan.config = _untied(config)
            _leave(plan, tensor, module)
    unused = [pattern for pattern in (*recipe.ignore, *recipe.include) if pattern not in used]
    if unused:
        raise ValueError(
            f"{name}: no linear is called {', '.join(unused)}; expected names like "
            f"{some(plan.quantized + list(plan.left))}, or re: and a regular expression"
        )
    if recipe.lm_head and not heads:
        raise ValueError(f"{name}: has neither lm_head.weight nor embed_tokens.weight; leave --lm-head out")
    if len(plan.quantized) == len(heads):
        raise ValueError(
            f"{name}: has no decoder linears to quantize; expected names like "
            f"model.layers.0.self_attn.q_proj.weight, got {some(list(everything))}"
        )
    _all_or_none(name, plan, everything)
    plan.quantization_config = quantization_config(
        _ignore(plan, bool(heads)),
        bool(heads),
        recipe.scheme == "per-tensor",
        "tensor" if static else "token",
    )
    return plan


def _from_fp8(
    name: str,
    config: dict[str, Any],
    shards: dict[str, dict[str, Tensor]],
    everything: dict[str, Tensor],
    recipe: Recipe,
) -> Plan:
    plan = Plan()
    before = config.get("quantization_config") or config.get("compression_config")
    before = before if isinstance(before, dict) else {}
    consumed: set[str] = set()
    refits: dict[str, Refit] = {}
    for tensor in everything.values():
        if not tensor.dtype.startswith("F8_E4M3"):
            continue
        module = tensor.name.removesuffix(".weight")
        scale = scale_of_weight(tensor, everything)
        if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 2 or tensor.name == module or scale is None:
            raise ValueError(
                f"{name}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}; expected F8_E4M3 [N, H], "
                f"named .weight, and {module}.weight_scale beside it"
            )
        static = everything.get(f"{module}.input_scale")
        block = blocks_of(tensor, scale, config)
        refits[tensor.name] = Refit(module, tensor, scale, block, static)
        consumed |= {scale.name} | ({static.name} if static else set())
        plan.quantized.append(module)
    statics = {refit.input_scale is not None for refit in refits.values()}
    if len(statics) > 1:
        raise ValueError(f"{name}: some linears have an input_scale and others none; expected all or none")
    for shard, tensors in shards.items():
        steps = plan.steps.setdefault(shard, [])
        for tensor in tensors.values():
            if tensor.name in refits:
                steps.append(refits[tensor.name])
            elif tensor.name not in consumed:
                _must_be_unquantized(name, tensor)
                steps.append(Copy(tensor))
                _leave(plan, tensor, tensor.name.removesuffix(".weight"))
    with_head = any(LM_HEAD.search(f"{module}.weight") for module in plan.quantized)
    plan.quantization_config = quantization_config(
        _ignore(plan, with_head),
        with_head,
        activations="tensor" if statics.pop() else None if _weights_alone(before) else "token",
        kv_cache_scheme=before.get("kv_cache_scheme"),
    )
    return plan


def _weights_alone(quantization: dict[str, Any]) -> bool:
    """Whether compressed-tensors' configuration leaves activations as they are."""
    groups = quantization.get("config_groups")
    return isinstance(groups, dict) and all(
        isinstance(group, dict) and group.get("input_activations") is None for group in groups.values()
    )


def _refuse_quantized(name: str, config: dict[str, Any], in_fp8: list[Tensor]) -> None:
    """Say of a checkpoint that is quantized already what can be done with it."""
    what = None
    if in_fp8:
        what = f"{in_fp8[0].name} is {in_fp8[0].dtype}"
    for key in ("quantization_config", "compression_config"):
        if config.get(key) and what is None:
            about = config[key]
            what = str(about.get("quant_method", "unknown method") if isinstance(about, dict) else about)
    if what is not None:
        remedy = "give the original bf16 or fp16 checkpoint"
        if in_fp8:
            remedy += ", or bring this one within the target's range with --from-fp8"
        raise ValueError(f"{name}: is quantized already ({what}); {remedy}")


def _wanted(tensor: str, module: str, recipe: Recipe, used: set[str]) -> bool:
    """Whether a weight is to be quantized, by its name; notes the patterns that have matched in ``used``."""
    if tensor == module:
        return False
    ignored = [pattern for pattern in recipe.ignore if _matches(module, pattern)]
    included = [pattern for pattern in recipe.include if _matches(module, pattern)]
    used.update(ignored + included)
    if ignored or LM_HEAD.search(tensor):
        return False
    usual = DECODER_LINEAR.search(tensor) is not None and not NO_DECODER.search(tensor)
    return bool(included) or usual


def _matches(module: str, pattern: str) -> bool:
    """Whether compressed-tensors' pattern means this linear: its name, or ``re:`` and how its name begins."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _must_be_floats(name: str, tensor: Tensor) -> None:
    if len(tensor.shape) != 2:
        raise ValueError(f"{name}: {tensor.name} is {list(tensor.shape)}; only [N, H] can be quantized")
    if tensor.dtype not in (*FLOATS, "F64"):
        raise ValueError(
            f"{name}: {tensor.name} has dtype {tensor.dtype}; expected {', '.join(FLOATS)}: "
            "is it quantized already?"
        )


def _must_be_unquantized(name: str, tensor: Tensor) -> None:
    if DECODER_LINEAR.search(tensor.name):
        _must_be_floats(name, tensor)


def _tied(config: dict[str, Any]) -> bool:
    """Whether the output projection is the embedding; a model of several towers says it of its text part."""
    inner = config.get("text_config")
    found = config.get(
        "tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
    )
    return bool(found)


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return what to change in ``config.json`` for an output projection that is a weight of its own."""
    inner = config.get("text_config")
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        changes["text_config"] = inner | changes
    return changes


def _leave(plan: Plan, tensor: Tensor, module: str) -> None:
    """Note a linear, or a block of experts, that stays as it is."""
    experts = FUSED_EXPERTS.search(tensor.name) if len(tensor.shape) == 3 else None
    if experts:  # no linears of their own; vLLM looks for experts.0.<name>
        plan.ignore.append(rf"re:.*\b{re.escape(experts[1])}\..*")
    elif len(tensor.shape) == 2 and module != tensor.name and "embed" not in module:
        plan.ignore.append(module)
    else:
        return
    plan.left[module] = math.prod(tensor.shape)


def _ignore(plan: Plan, with_head: bool) -> list[str]:
    """Return ``ignore``: what must not be taken for quantized, by its name in the checkpoint.

    vLLM translates these names to its own, but not regular expressions. transformers translates neither, so a
    tower of which nothing is quantized is also named as a whole, whatever it calls what the tower is in. So
    are a layer's experts: vLLM before 0.32 looks for ``experts.0.gate_proj``, whatever they are called.
    """
    groups = [match["tower"] for module in plan.left if (match := TOWER.match(module))]
    groups += [re.escape(match["experts"]) for module in plan.left if (match := EXPERTS.search(module))]
    patterns = [rf"re:.*\b{group}\..*" for group in dict.fromkeys(groups)]
    whole = [one for one in patterns if not any(_matches(module, one) for module in plan.quantized)]
    return list(dict.fromkeys(([] if with_head else ["lm_head"]) + plan.ignore + whole))


def _all_or_none(name: str, plan: Plan, everything: dict[str, Tensor]) -> None:
    """Refuse to quantize some linears, and not others, of those that vLLM holds in one weight."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    quantized = set(plan.quantized)
    for tensor in everything:
        module = tensor.removesuffix(".weight")
        if module == tensor:
            continue
        parent, _, last = module.rpartition(".")
        experts = re.match(r"^(.*\bexperts)\.\d+\.", module)
        siblings = next((merged for merged in MERGED if last in merged), None)
        if experts:
            key = f"{experts[1]}.*"
        elif siblings:
            key = f"{parent}.({'|'.join(siblings)})"
        else:
            continue
        groups.setdefault(key, ([], []))[module not in quantized].append(module)
    for taken, left in groups.values():
        if taken and left:
            raise ValueError(
                f"{name}: vLLM holds {taken[0]} and {left[0]} in one weight; quantize all of "
                f"{some(taken + left)}, or ignore them all"
            )


def scale_of_weight(weight: Tensor, everything: dict[str, Tensor]) -> Tensor | None:
    """Return the scales that belong to an FP8 weight, or ``None`` where there are none."""
    for suffix in ("_scale", "_scale_inv"):
        if weight.name + suffix in everything:
            return everything[weight.name + suffix]
    return None


def blocks_of(weight: Tensor, scale: Tensor, config: dict[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns that share a scale; ``None`` where it is one a channel or one in all.

    Args:
        weight: ``[N, H]`` or ``[experts, N, H]``.
        scale: its scales.
        config: ``config.json``, which may give a block's size; it is 128 x 128 otherwise.

    Raises:
        ValueError: the scales have a shape that fits none.
    """
    *experts, rows, columns = weight.shape
    if math.prod(scale.shape) in (1, math.prod(experts) * rows):
        return None
    about = config.get("quantization_config")
    size = about.get("weight_block_size") if isinstance(about, dict) else None
    block = (128, 128)
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        block = (size[0], size[1])
    expected = [*experts, -(-rows // block[0]), -(-columns // block[1])]
    if [size for size in scale.shape if size > 1] != [size for size in expected if size > 1]:
        raise ValueError(
            f"{scale.name}: is {list(scale.shape)}; expected [1], [{rows}], [{rows}, 1] or, for "
            f"blocks of {block[0]} x {block[1]}, {expected}"
        )
    return block


def _like(tensor: Tensor) -> Described:
    return Described(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)


def _linear(module: str, weight: Tensor, scale: tuple[int, ...], static: bool) -> list[Described]:
    described = [
        Described(f"{module}.weight", "F8_E4M3", weight.shape, math.prod(weight.shape)),
        Described(f"{module}.weight_scale", "F32", scale, 4 * math.prod(scale)),
    ]
    if static:
        described.append(Described(f"{module}.input_scale", "F32", (1,), 4))
    return described
