"""``wrap_nki``: a kernel becomes a higher-order operator, one node of a graph, run here by our simulator.

The same dispatch as the real one: FakeTensor and Meta learn shapes by running the kernel on ones, Proxy keeps
tensors as the node's arguments and everything else as constants under a hash (hence hashable), Functionalize
hands through, CPU runs. There is no implementation for a device: outside a graph a kernel runs only on the
CPU.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey
from torch._dynamo import allow_in_graph
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    disable_proxy_modes_tracing,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

PLAIN = (int, float, bool, str, type(None))
"""What our kernels may get beside tensors. The real operator takes a little more (Enum members, frozen
dataclasses); plain values are what is certain to cross it."""

_kernels: list[Callable[..., Any]] = []
_constants: dict[int, dict[str, Any]] = {}
CALLS: list[tuple[str, tuple[int, ...]]] = []
"""Kernel and grid of every run on real values. Ours, for tests to read."""


class _Wrapper(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("nki_kernel_wrapper", cacheable=True)

    def __call__(
        self,
        kernel_idx: int,
        grid: Sequence[int],
        backend_config: str,
        operand_output_aliases: dict[int, int],
        args: Sequence[Any],
        arg_names: Sequence[str],
        constant_args_key: int,
    ) -> Any:
        return super().__call__(
            kernel_idx=kernel_idx,
            grid=grid,
            backend_config=backend_config,
            operand_output_aliases=operand_output_aliases,
            args=args,
            arg_names=arg_names,
            constant_args_key=constant_args_key,
        )


nki_kernel_wrapper = allow_in_graph(_Wrapper())


def _simulate(kernel_idx: int, grid, args, arg_names, constant_args_key: int) -> Any:
    from vllm_neuron_rmsq.kernels.nki.simulator import simulate

    arguments = dict(zip(arg_names, args, strict=True)) | _constants.get(constant_args_key, {})
    for name, value in arguments.items():
        assert isinstance(value, (torch.Tensor, *PLAIN)), f"{name}: {type(value)} cannot cross the operator"
    target = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    with torch.no_grad():
        return simulate(_kernels[kernel_idx], int(grid[0]), target=target)(**arguments)


def _empty_like(out: Any) -> Any:
    return pytree.tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype), out)


@nki_kernel_wrapper.py_impl(DispatchKey.CPU)
def _cpu(*, kernel_idx, grid, backend_config, operand_output_aliases, args, arg_names, constant_args_key):
    if os.environ.get("NKI_SIMULATOR") != "1":
        raise RuntimeError("NKI kernel dispatched to CPU without the simulator. Set NKI_SIMULATOR=1")
    CALLS.append((_kernels[kernel_idx].__name__, tuple(grid)))
    return _simulate(kernel_idx, grid, args, arg_names, constant_args_key)


@nki_kernel_wrapper.py_impl(DispatchKey.Meta)
def _meta(*, kernel_idx, grid, backend_config, operand_output_aliases, args, arg_names, constant_args_key):
    out = _simulate(kernel_idx, grid, _ones_like(args), arg_names, constant_args_key)
    return pytree.tree_map(lambda t: t.to("meta"), out)


@nki_kernel_wrapper.py_impl(FakeTensorMode)
def _fake(
    mode, *, kernel_idx, grid, backend_config, operand_output_aliases, args, arg_names, constant_args_key
):
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with unset_fake_temporarily():
        out = _simulate(kernel_idx, grid, _ones_like(args), arg_names, constant_args_key)
    with mode:
        return pytree.tree_map(lambda t: t.to(device), _empty_like(out))


def _ones_like(args: Sequence[Any]) -> list[Any]:
    return [
        torch.ones([int(n) for n in a.shape], dtype=a.dtype) if isinstance(a, torch.Tensor) else a
        for a in args
    ]


@nki_kernel_wrapper.py_impl(ProxyTorchDispatchMode)
def _proxy(
    mode, *, kernel_idx, grid, backend_config, operand_output_aliases, args, arg_names, constant_args_key
):
    if constant_args_key == -1:
        constants = {n: a for n, a in zip(arg_names, args, strict=True) if not isinstance(a, torch.Tensor)}
        constant_args_key = hash(tuple(sorted(constants.items())))
        _constants[constant_args_key] = constants
        arg_names = [n for n in arg_names if n not in constants]
        args = [a for a in args if isinstance(a, torch.Tensor)]
    node = {
        "kernel_idx": kernel_idx,
        "grid": grid,
        "backend_config": "compiled",
        "operand_output_aliases": {},
        "args": args,
        "arg_names": arg_names,
        "constant_args_key": constant_args_key,
    }
    with disable_proxy_modes_tracing():
        out = nki_kernel_wrapper(**node)
    proxies = pytree.tree_map(mode.tracer.unwrap_proxy, node)
    name = f"nki_{_kernels[kernel_idx].__name__}_proxy"
    proxy = mode.tracer.create_proxy("call_function", nki_kernel_wrapper, (), proxies, name=name)
    return track_tensor_tree(out, proxy, constant=None, tracer=mode.tracer)


@nki_kernel_wrapper.py_functionalize_impl
def _functionalize(
    ctx, kernel_idx, grid, backend_config, operand_output_aliases, args, arg_names, constant_args_key
):
    unwrapped = [ctx.unwrap_tensors(a) if isinstance(a, torch.Tensor) else a for a in args]
    with ctx.redispatch_to_next():
        out = nki_kernel_wrapper(
            kernel_idx=kernel_idx,
            grid=grid,
            backend_config="compiled",
            operand_output_aliases={},
            args=unwrapped,
            arg_names=arg_names,
            constant_args_key=constant_args_key,
        )
    return ctx.wrap_tensors(out)


for _key in (
    DispatchKey.PythonDispatcher,
    DispatchKey.PythonTLSSnapshot,
    DispatchKey.ADInplaceOrView,
    DispatchKey.BackendSelect,
    DispatchKey.AutocastCPU,
    DispatchKey.AutogradCPU,
):
    nki_kernel_wrapper.fallthrough(_key)


class NKIHOPCaller:
    def __init__(self, kernel_idx: int, grid, names: list[str], defaults: dict[str, Any]) -> None:
        self.kernel_idx = kernel_idx
        self.grid = grid
        self.kernel_arg_names = names
        self.kernel_default_args = defaults

    def __getitem__(self, grid) -> NKIHOPCaller:
        grid = (grid,) if isinstance(grid, int) else tuple(map(int, grid))
        return NKIHOPCaller(self.kernel_idx, grid, self.kernel_arg_names, self.kernel_default_args)

    def __call__(self, *args, **kwargs):
        given = {**dict(zip(self.kernel_arg_names, args, strict=False)), **kwargs}
        for name in self.kernel_arg_names:
            if name not in given:
                given[name] = self.kernel_default_args[name]
        return nki_kernel_wrapper(
            kernel_idx=self.kernel_idx,
            grid=self.grid,
            backend_config="",
            operand_output_aliases={},
            args=tuple(given[name] for name in self.kernel_arg_names),
            arg_names=self.kernel_arg_names,
            constant_args_key=-1,
        )


@torch._dynamo.assume_constant_result
def _index(kernel) -> int:
    if kernel not in _kernels:
        _kernels.append(kernel)
    return _kernels.index(kernel)


def wrap_nki(nki_kernel: Any, **kwargs: Any) -> NKIHOPCaller:
    parameters = inspect.signature(nki_kernel).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return NKIHOPCaller(_index(nki_kernel), [], list(parameters), defaults)
