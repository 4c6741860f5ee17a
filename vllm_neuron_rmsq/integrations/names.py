"""Looking up the names that an integration needs of software which promises them to nobody.

A table says ``"module:name"`` -> how it is called, or ``None`` where it is only read. Names in one call stand
in the order they are passed in; those after ``*`` are passed by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any


def missing(needed: Mapping[str, str | None]) -> list[str]:
    """Return what is missing of ``needed``, in words, or an empty list. Changes nothing.

    A module that cannot be imported, for whatever reason, is named once.
    """
    found = []
    for path, call in needed.items():
        module, _, name = path.partition(":")
        try:
            holder = importlib.import_module(module)
        except Exception as error:  # whatever it is: it must not keep vLLM from starting
            found.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
            continue
        try:
            value = _find(holder, name)
        except AttributeError as error:
            found.append(f"{module}.{error} is missing")
            continue
        unknown = [m for m in getattr(value, "__abstractmethods__", ()) if f"{path}.{m}" not in needed]
        if unknown:
            found.append(f"{module}.{name} wants {', '.join(sorted(unknown))} of its subclasses")
        problem = None if call is None else misfit(value, call)
        if problem:
            found.append(f"{module}.{name} {problem}")
    return list(dict.fromkeys(found))


def _find(value: Any, name: str) -> Any:
    """Follow dotted ``name``; return ``None`` when its last part is something that only instances have.

    Raises:
        AttributeError: the message is the part of ``name`` that is not there.
    """
    parts = name.split(".")
    for count, part in enumerate(parts, 1):
        try:
            found = getattr(value, part, None)
        except Exception:  # vLLM's platform recurses for ever when it lacks the name it looks others up by
            found = None
        # A class may have None for a default; vLLM's platform object has None for what it does not know.
        if found is not None or (inspect.isclass(value) and hasattr(value, part)):
            value = found
        elif count == len(parts) and part in _set_by(value):
            return None
        else:
            raise AttributeError(".".join(parts[:count]))
    return value


def _set_by(value: Any) -> set[str]:
    """Names of the attributes that a class gives its instances, or a function its argument.

    Before there is an instance, the fields of a dataclass and the names in the constructor's code are the
    only trace of them.
    """
    if inspect.ismodule(value):
        return set()
    functions = [value]
    if inspect.isclass(value):
        constructors = ("__init__", "__post_init__")
        functions = [vars(cls).get(name) for cls in inspect.getmro(value) for name in constructors]
    codes = [getattr(function, "__code__", None) for function in functions]
    names = {name for code in codes if code for name in code.co_names}
    return names | set(getattr(value, "__dataclass_fields__", ()))


def misfit(value: Any, call: str) -> str | None:
    """Say why ``value`` cannot be called as ``call`` says, or return ``None`` when it can."""
    if not callable(value):
        return "cannot be called"
    positional, _, by_name = (part.strip(" ,") for part in call.partition("*"))
    first, rest = _names(positional), _names(by_name)
    parameters = inspect.signature(value).parameters
    required = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    if [*parameters][: len(first)] == first and set(rest) <= set(parameters) and required <= {*first, *rest}:
        return None
    return f"takes ({', '.join(parameters)}), not ({call})"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
