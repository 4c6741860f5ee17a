"""The math operators of ``nki.language`` (``nl.add``, ``nl.exp``, ...): what each computes, where it runs.

An operator is a callable object, passed by reference as the ``op`` of an instruction. Three tables, after
nki/api/nki.api.shared.rst: bitvec and arithmetic operators of VectorE and GpSimdE (with the neutral element
where the operator may reduce), and ScalarE's activation functions with their valid input range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Function = Callable[..., Any]


def _truth(function: Function) -> Function:
    return lambda x, y: function(x, y).astype(np.float32)


def _logical(function: Function) -> Function:
    return lambda x, y: function(x != 0, y != 0).astype(np.float32)


def _logical_right_shift(x: np.ndarray, y: Any) -> np.ndarray:
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    return np.right_shift(x.view(unsigned), np.asarray(y).astype(unsigned)).view(x.dtype)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float32])(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(np.float32(0), x)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * np.float32(0.5) * (1 + _erf(x * np.float32(math.sqrt(0.5))))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


def _silu_dx(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_dx(x: np.ndarray) -> np.ndarray:
    density = np.exp(-x * x / 2) / np.float32(math.sqrt(2 * math.pi))
    return 0.5 * (1 + _erf(x * np.float32(math.sqrt(0.5)))) + x * density


BITVEC: dict[str, Function] = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": _logical_right_shift,
    "invert": np.invert,
}
ARITHMETIC: dict[str, Function] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": _truth(np.equal),
    "not_equal": _truth(np.not_equal),
    "greater_equal": _truth(np.greater_equal),
    "greater": _truth(np.greater),
    "less_equal": _truth(np.less_equal),
    "less": _truth(np.less),
    "logical_and": _logical(np.logical_and),
    "logical_or": _logical(np.logical_or),
    "logical_xor": _logical(np.logical_xor),
    "power": np.power,
    "abs_max": lambda x, y: np.where(np.abs(x) > np.abs(y), x, y),
    "abs_min": lambda x, y: np.where(np.abs(x) < np.abs(y), x, y),
}
UNARY: dict[str, Function] = {
    "abs": np.abs,
    "square": np.square,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
}
IDENTITY: dict[str, float] = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "maximum": -math.inf,
    "minimum": math.inf,
    "logical_and": 1.0,
    "logical_or": 0.0,
    "logical_xor": 0.0,
}
ACTIVATION: dict[str, Function] = {
    "copy": lambda x: x,
    "square": np.square,
    "sigmoid": _sigmoid,
    "relu": UNARY["relu"],
    "gelu": _gelu,
    "gelu_dx": _gelu_dx,
    "gelu_apprx_tanh": _gelu_tanh,
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(np.float32(1.702) * x),
    "silu": lambda x: x * _sigmoid(x),
    "silu_dx": _silu_dx,
    "tanh": np.tanh,
    "softplus": _softplus,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "erf": _erf,
    "erf_dx": lambda x: np.float32(2 / math.sqrt(math.pi)) * np.exp(-x * x),
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "rsqrt": UNARY["rsqrt"],
    "reciprocal": UNARY["reciprocal"],
    "sign": np.sign,
    "abs": np.abs,
}
# Outside of these ScalarE's polynomials give invalid results. Magnitudes for reciprocal.
ACTIVATION_RANGE: dict[str, tuple[float, float]] = {
    "log": (2.0**-64, 2.0**64),
    "sin": (-math.pi, math.pi),
    "arctan": (-math.pi / 2, math.pi / 2),
    "sqrt": (2.0**-116, 2.0**118),
    "rsqrt": (2.0**-87, 2.0**97),
    "reciprocal": (2.0**-42, 2.0**42),
}


def reduce(name: str, values: np.ndarray) -> np.ndarray:
    """Reduce axis 1 of ``[P, N]`` by operator `name`: ``[P]``, in the dtype of `values`."""
    ufuncs: dict[str, Any] = {
        "add": np.add,
        "multiply": np.multiply,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "bitwise_and": np.bitwise_and,
        "bitwise_or": np.bitwise_or,
        "bitwise_xor": np.bitwise_xor,
        "logical_and": np.logical_and,
        "logical_or": np.logical_or,
        "logical_xor": np.logical_xor,
    }
    if name == "subtract":
        return 2 * values[:, 0] - np.add.reduce(values, axis=1)
    return ufuncs[name].reduce(values, axis=1).astype(values.dtype)


class Operator:
    """``nl.<name>``: given as an ``op``, or called on tiles, when it makes a tile of its own."""

    def __init__(self, name: str, call: Function | None = None) -> None:
        self.__name__ = name
        self._call = call

    def __repr__(self) -> str:
        return f"nl.{self.__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            raise NotImplementedError(f"nki.language.{self.__name__} on tiles; use a nki.isa instruction")
        return self._call(self, *args, **kwargs)
