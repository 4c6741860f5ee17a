"""What a kernel's source may not contain: Python that the NKI compiler refuses although it would run here.

NKI 0.6 compiles a subset of Python: the language guide (nki/get-started/nki-language-guide.rst), the
restrictions of NKI 0.3.0 (nki/migration/index.rst) and the simulator page's list of what runs on a CPU but
does not compile. NKI 0.7 traces kernels with Python, all of which it takes but for ``nl.dynamic_range`` and
``while`` with a register (migration from NKI 0.6.0 to 0.7.0). Only what those documents settle is checked.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from .errors import NkiSimulationError

_REFUSED: dict[type[ast.AST], str] = {
    ast.Try: "try/except",
    ast.Lambda: "a lambda",
    ast.ClassDef: "a class defined in a kernel (define it outside, inheriting from NKIObject)",
    ast.Yield: "a generator",
    ast.YieldFrom: "a generator",
    ast.GeneratorExp: "a generator",
    ast.AsyncFunctionDef: "async",
    ast.Await: "async",
    ast.Global: "global",
    ast.Nonlocal: "nonlocal",
    ast.Import: "an import in a kernel",
    ast.ImportFrom: "an import in a kernel",
    ast.Set: "a set (containers are tuples, lists and dicts)",
    ast.SetComp: "a set (containers are tuples, lists and dicts)",
}
_LOOPS = ("fori_loop", "while_loop")
LANGUAGES = ("0.6", "0.7")


def check_language(kernel: Any, language: str = "0.6") -> None:
    """Raise NkiSimulationError if `kernel`, or a function of its module that it calls, is not NKI `language`.

    "0.6" refuses exceptions caught, closures (a body given to ``nl.fori_loop`` or ``nl.while_loop`` is none),
    lambdas, generators, classes and imports in a function, sets, ``with`` other than ``nl.no_reorder()``,
    keyword-only and variadic parameters; "0.7" refuses ``nl.dynamic_range``. What decorates a function is not
    part of it. A function without source is not checked. Raises ValueError for another language.
    """
    if language not in LANGUAGES:
        raise ValueError(
            f"language: expected one of {', '.join(LANGUAGES)} (versions of NKI), got {language!r}"
        )
    function = inspect.unwrap(kernel)
    if isinstance(function, FunctionType):
        _check(function, language)


@functools.lru_cache(maxsize=256)
def _check(function: FunctionType, language: str) -> None:
    """Check `function` and, once each, the functions of its module that it refers to."""
    waiting, seen = [function], {function}
    while waiting:
        current = waiting.pop()
        tree = _tree(current)
        if tree is None:
            continue
        for node, what in (_subset if language == "0.6" else _traced)(tree):
            line = current.__code__.co_firstlineno + node.lineno - 1
            raise NkiSimulationError(
                f"{current.__name__}: {what} is no part of the NKI language\n"
                f"  at {current.__code__.co_filename}:{line} (NKI {language})"
            )
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            called = current.__globals__.get(name)
            called = inspect.unwrap(called) if callable(called) else called
            if isinstance(called, FunctionType) and called.__module__ == function.__module__:
                waiting.extend({called} - seen)
                seen.add(called)


def _tree(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    body = ast.parse(source).body[0]
    if not isinstance(body, ast.FunctionDef):
        return None
    body.decorator_list = []  # Python's, run before the compiler sees the function
    return body


def _traced(tree: ast.FunctionDef) -> Iterator[tuple[Any, str]]:
    """What NKI 0.7 no longer takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == "dynamic_range":
            yield node, "`nl.dynamic_range` (use nl.fori_loop)"


def _subset(tree: ast.FunctionDef) -> Iterator[tuple[Any, str]]:
    """What is outside of the Python that NKI 0.6 compiles."""
    arguments = tree.args
    if arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        yield tree, "a keyword-only or variadic parameter"
    bodies = {
        name.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and _name(call.func) in _LOOPS
        for name in (*call.args, *(k.value for k in call.keywords))
        if isinstance(name, ast.Name)
    }
    for node in [inner for statement in tree.body for inner in ast.walk(statement)]:
        if type(node) in _REFUSED:
            yield node, _REFUSED[type(node)]
        elif isinstance(node, ast.FunctionDef) and node.name not in bodies:
            yield node, "a function defined in a kernel (a closure)"
        elif isinstance(node, ast.With) and any(not _no_reorder(item.context_expr) for item in node.items):
            yield node, "`with` (other than nl.no_reorder())"


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _no_reorder(context: ast.expr) -> bool:
    return isinstance(context, ast.Call) and _name(context.func) == "no_reorder"
