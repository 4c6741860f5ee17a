"""Another vLLM than the one installed: context managers that take a name of vLLM's away or change how it is
called, and, as a script, real ``LLM`` starts under them.

The script reads cases from standard input, one JSON object a line, and answers each with one:

    {"checkpoint": folder, "change": "none" | "missing" | "called" | "version" | "foreign" | "no plugin",
     "name": "module:dotted.name" or a version}

vLLM is imported once, and each case runs in a fork of that process, which has computed nothing yet. The
change is in force while the plugin registers, and undone before vLLM goes on: it needs most of the names
itself. The answer has the plugin's warnings, the classes of norms and FP8 kernels in the model, its report,
and the log-probabilities of a prompt.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import logging
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

TOKENS = [3, 5, 8, 13, 21, 34, 55]


@contextlib.contextmanager
def missing(path: str) -> Iterator[None]:
    """Take ``module:dotted.name`` away, wherever it is defined."""
    module, _, name = path.partition(":")
    *parents, last = name.split(".")
    with contextlib.ExitStack() as stack:
        holder: Any = importlib.import_module(module)
        if not parents:
            stack.enter_context(_module_with(holder, last))
        for parent in parents:
            holder = getattr(holder, parent)
        if inspect.isfunction(holder):
            stack.enter_context(_renamed_in_code(holder, last))
        elif parents:
            cls: Any  # asked for what only some classes have
            for cls in inspect.getmro(holder if inspect.isclass(holder) else type(holder)):
                if last in vars(cls):
                    stack.enter_context(_without(cls, last))
                if last in vars(cls).get("__dataclass_fields__", ()):
                    fields = {k: v for k, v in cls.__dataclass_fields__.items() if k != last}
                    stack.enter_context(mock.patch.object(cls, "__dataclass_fields__", fields))
                for constructor in ("__init__", "__post_init__"):
                    if inspect.isfunction(vars(cls).get(constructor)):
                        stack.enter_context(_renamed_in_code(vars(cls)[constructor], last))
        yield


@contextlib.contextmanager
def called_differently(path: str) -> Iterator[None]:
    """Give the function or class ``module:dotted.name`` another parameter, which has no default."""

    def other(*, something_else):
        raise AssertionError("nothing may be called before everything is looked up")

    module, _, name = path.partition(":")
    *parents, last = name.split(".")
    holder: Any = importlib.import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    with mock.patch.object(holder, last, other) if parents else _module_with(holder, last, other):
        yield


class _Module(types.ModuleType):
    """A module that is another one but for one name."""

    def __init__(self, module: types.ModuleType, name: str, *value: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_other=module, _name=name, _value=value)

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._other, name)
        if not self._value:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self._value[0]


def _module_with(module: types.ModuleType, name: str, *value: Any):
    return mock.patch.dict(sys.modules, {module.__name__: _Module(module, name, *value)})


@contextlib.contextmanager
def _without(cls: type, name: str) -> Iterator[None]:
    value = vars(cls)[name]
    delattr(cls, name)
    try:
        yield
    finally:
        setattr(cls, name, value)


@contextlib.contextmanager
def _renamed_in_code(function: Any, name: str) -> Iterator[None]:
    code = function.__code__
    function.__code__ = code.replace(
        co_names=tuple("renamed" if used == name else used for used in code.co_names)
    )
    try:
        yield
    finally:
        function.__code__ = code


def of_version(version: str) -> contextlib.AbstractContextManager[object]:
    """Let vLLM say that it is ``version``."""
    return mock.patch("vllm.__version__", version)


@contextlib.contextmanager
def foreign_norm(name: str) -> Iterator[None]:
    """Another plugin has replaced vLLM's RMSNorm: for good, unlike the other changes."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    @RMSNorm.register_oot
    class ForeignRMSNorm(RMSNorm):
        pass

    yield


CHANGES: dict[str, Callable[[str], contextlib.AbstractContextManager[object]]] = {
    "none": lambda name: contextlib.nullcontext(),
    "missing": missing,
    "called": called_differently,
    "version": of_version,
    "foreign": foreign_norm,
}


def start(case: dict) -> dict:
    """Start an ``LLM`` as a user would, and say what became of it."""
    from vllm import LLM, SamplingParams

    from vllm_neuron_rmsq import plugin

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.vllm_neuron_rmsq").addHandler(handler)
    register = plugin.register

    def register_on_another_vllm() -> None:
        if case["change"] == "no plugin":
            return
        with CHANGES[case["change"]](case.get("name", "")):
            register()

    plugin.register = register_on_another_vllm
    llm = LLM(
        case["checkpoint"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=16 << 20,
    )
    case["llm"] = llm  # kept: to take an engine down takes longer than to start it, and the process ends
    (classes,) = llm.apply_model(_classes)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": TOKENS}], params, use_tqdm=False)
    given = zip(output.prompt_logprobs[1:], TOKENS[1:], strict=True)
    logprobs = [logprobs[token].logprob for logprobs, token in given]
    return {"warnings": warnings, "logprobs": logprobs, **classes}


def _classes(model: Any) -> dict:
    modules = list(model.modules())
    kernels = {getattr(getattr(module, "scheme", None), "fp8_linear", None) for module in modules}
    return {
        "norms": sorted({type(module).__name__ for module in modules if "RMSNorm" in type(module).__name__}),
        "kernels": sorted(type(kernel).__name__ for kernel in kernels - {None}),
        "report": str(model.rmsq_report) if hasattr(model, "rmsq_report") else None,
    }


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in the process that the change is in
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles a piece of its sampler even when eager
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    from vllm_neuron_rmsq.integrations.vllm import versions

    assert versions.missing() == []  # and imports all modules, whole, before a name is taken away
    for module in ("entrypoints.llm", "v1.worker.cpu_worker", "model_executor.models.llama"):
        importlib.import_module(f"vllm.{module}")
    gc.collect()
    gc.freeze()  # vLLM collects garbage often, and need not look at all of this each time
    for line in sys.stdin:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                answer = start(json.loads(line))
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(write, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read() or '{"error": "the process died"}'
        os.waitpid(child, 0)
        os.write(answers, text.encode() + b"\n")


if __name__ == "__main__":
    main()
