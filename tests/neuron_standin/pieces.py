"""Take one piece of the integration away and see what becomes of an FP8 checkpoint.

``python pieces.py MODE MODEL FILE``: MODE is what is done; FILE passes a configuration from the process that
makes it to the one that gets it, as vLLM's front end passes one to its workers.
"""

from __future__ import annotations

import logging
import pickle
import sys

import vllm_neuron.functional
from drive import configure
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.plugins import load_general_plugins


def load(config) -> None:
    """Register and load as a worker; print what became of it."""
    import tempfile

    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm_neuron.vllm.worker.neuron_worker import NeuronWorker

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    worker = NeuronWorker(config)
    if MODE == "registered later":
        load_general_plugins()
    if MODE == "another Llama over ours":
        from vllm import ModelRegistry
        from vllm_neuron.model.llama3.model import LlamaForCausalLM

        ModelRegistry.register_model(
            "LlamaForCausalLM", type("Other", (LlamaForCausalLM,), {"__module__": "other"})
        )
    worker.load_model()
    print("SERVED BY", type(worker.model).__name__)


def names() -> None:
    """Take each name away that the integration needs, and print those that nobody missed."""
    import importlib
    from unittest import mock

    from vllm_neuron_rmsq.integrations.vllm_neuron import versions

    assert versions.missing_of_platform() == versions.missing_of_model() == []
    looked = 0
    for table, missing in (
        (versions.PLATFORM, versions.missing_of_platform),
        (versions.MODEL, versions.missing_of_model),
    ):
        for path in table:
            module, _, name = path.partition(":")
            holder = importlib.import_module(module)
            *parents, last = name.split(".")
            for parent in parents:
                holder = getattr(holder, parent)
            if last in getattr(holder, "__dataclass_fields__", ()) or path.endswith(
                "ModelConfig.architecture"
            ):
                continue  # fields that go with their class, and what a constructor reads itself
            owner = holder if last in vars(holder) else type(holder)
            if last in vars(owner):
                value = vars(owner)[last]
                delattr(owner, last)
                said = missing()
                setattr(owner, last, value)
            else:  # what only instances have is seen in the constructor
                nothing = dict.fromkeys({"__init__", "__post_init__"} & {*dir(holder)}, lambda self: None)
                with mock.patch.multiple(holder, **nothing):
                    said = missing()
            looked += 1
            if not any(f"{module}.{name} " in line for line in said):
                print("NOT FOUND", path, said)
    print("LOOKED FOR", looked)


def main() -> None:
    if MODE == "names":
        names()
        return
    if MODE == "worker without it" or MODE == "registered later":
        with open(FILE, "rb") as file:
            load(pickle.load(file))
        return
    if MODE == "a name is missing":
        del vllm_neuron.functional.attention_decode
    load_general_plugins()
    if MODE == "registry as it was":
        from vllm import ModelRegistry

        type(ModelRegistry).register_model = type(ModelRegistry).register_model.__wrapped__
    job = {"model": MODEL, "rmsq": {"backend": "torch"}}
    config = configure(job, ranks=1)
    if MODE == "front end":
        with open(FILE, "wb") as file:
            pickle.dump(config, file)
        print("LET THROUGH AS", config.model_config.architecture)
    else:
        load(config)


if __name__ == "__main__":
    MODE, MODEL, FILE = sys.argv[1:]
    logging.getLogger("vllm").setLevel(logging.INFO)
    main()
