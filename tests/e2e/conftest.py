"""Fixtures of the tests of ways of running vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import modes
import pytest
from vllm_models import tiny_config, write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama of two layers in FP8."""
    return write_checkpoint(tiny_config("llama"), tmp_path_factory.mktemp("modes") / "llama")


@pytest.fixture(scope="session")
def plain(tiny) -> modes.Answers:
    """What the plugin answers without any mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with modes.engine(tiny, enable_prefix_caching=False) as llm:
            assert "4 of 5 RMSNorm layers fused" in llm.apply_model(modes.report)[0]
            return modes.answers(llm)


@pytest.fixture
def prove(request, cache):
    """Return a function that notes what this test has proven of a mode, for ``tests/modes_page.py``."""

    def note(mode: str, fused: str, holds: str) -> None:
        path = cache / "modes.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[mode] = {"fused": fused, "holds": holds, "test": request.node.name}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known, indent=1, sort_keys=True))

    return note
