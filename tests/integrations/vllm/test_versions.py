"""An installed plugin must not keep another vLLM from starting: real ``LLM`` starts under changed ones."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import other_vllm
import pytest
import vllm
from vllm_models import tiny_config, write_checkpoint

from vllm_neuron_rmsq.integrations import names
from vllm_neuron_rmsq.integrations.vllm import versions

NEEDED = versions.needed(versions.version())
MISSING = [name for name in NEEDED if not name.endswith("__init__")]  # every class has that
CALLED = [name for name, call in NEEDED.items() if call is not None]
INACTIVE = f"vllm-neuron-rmsq is inactive: it needs vLLM 0.24 to 0.33 and this is {vllm.__version__} ("


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts ``LLM`` on a tiny Llama under a changed vLLM: see ``other_vllm``."""
    folder = tmp_path_factory.mktemp("versions")
    checkpoint = write_checkpoint(tiny_config("llama"), folder / "llama")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, other_vllm.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
        )

    def start(change, name=""):
        case = {"checkpoint": str(checkpoint), "change": change, "name": name}
        process.stdin.write(json.dumps(case) + "\n")
        answer = process.stdout.readline()
        assert answer, Path(log.name).read_text()[-4000:]
        answer = json.loads(answer)
        assert "error" not in answer, answer["error"]
        return answer

    yield start
    process.stdin.close()
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def stock(start):
    """What a start without the plugin gives."""
    answer = start("no plugin")
    assert answer["norms"] == ["RMSNorm"] and answer["report"] is None and not answer["warnings"]
    assert set(answer["kernels"]) == {"ChannelWiseTorchFP8ScaledMMLinearKernel"}
    return answer


@pytest.mark.engine
def test_this_vllm_has_everything(start):
    assert versions.missing() == []
    answer = start("none")
    assert not answer["warnings"]
    assert answer["norms"] == ["RMSNormQuant"] and set(answer["kernels"]) == {"PackedFp8LinearKernel"}
    assert answer["report"].startswith("4 of 5 RMSNorm layers fused (backend ")


@pytest.mark.engine
@pytest.mark.parametrize("name", MISSING)
def test_a_vllm_without_a_name_starts_stock_with_one_warning(name, start, stock):
    answer = start("missing", name)
    (warning,) = answer.pop("warnings")
    assert warning.startswith(INACTIVE)
    assert f"{name.replace(':', '.')} is missing" in warning
    assert answer == {key: value for key, value in stock.items() if key != "warnings"}


@pytest.mark.engine
@pytest.mark.parametrize("name", CALLED)
def test_a_vllm_that_is_called_differently_starts_stock_with_one_warning(name, start, stock):
    answer = start("called", name)
    (warning,) = answer.pop("warnings")
    assert f"{name.replace(':', '.')} takes (something_else), not ({NEEDED[name]})" in warning
    assert answer == {key: value for key, value in stock.items() if key != "warnings"}


@pytest.mark.engine
@pytest.mark.parametrize(
    "version, reason",
    [
        ("0.34.0", "newer than any it was tried with"),
        ("1.0.0rc1", "newer than any it was tried with"),
        ("0.23.0+cpu", "older than any it was tried with"),
        ("dev", "no version that can be read"),
    ],
)
def test_a_version_that_is_not_supported_starts_stock_with_one_warning(version, reason, start, stock):
    answer = start("version", version)
    expected = f"vllm-neuron-rmsq is inactive: it needs vLLM 0.24 to 0.33 and this is {version} ({reason})"
    assert answer.pop("warnings") == [expected]
    assert answer == {key: value for key, value in stock.items() if key != "warnings"}


@pytest.mark.engine
def test_a_norm_that_another_plugin_replaced_is_left_in_place(start):
    answer = start("foreign")
    (warning,) = answer["warnings"]
    assert warning.startswith("Another plugin has replaced RMSNorm by ")
    assert (
        "ForeignRMSNorm: those norms stay unfused, FP8 linears multiply packed rows all the same" in warning
    )
    assert answer["norms"] == ["ForeignRMSNorm"] and set(answer["kernels"]) == {"PackedFp8LinearKernel"}
    assert answer["report"].startswith("0 of 5 RMSNorm layers fused")


def test_a_module_that_fails_while_it_is_imported_is_named_once():
    failing = mock.Mock(side_effect=RuntimeError("no such device"))
    importing = mock.patch.object(names.importlib, "import_module", failing)
    with mock.patch.object(versions, "installed", lambda: vllm.__version__), importing:
        found = versions.missing()
    assert len(found) == len(set(found)) == len({name.partition(":")[0] for name in NEEDED})
    assert found[0] == "vllm.envs cannot be imported: RuntimeError: no such device"


def test_a_new_abstract_method_is_named():
    kernel = versions.FP8ScaledMMLinearKernel
    with mock.patch.object(kernel, "__abstractmethods__", kernel.__abstractmethods__ | {"prepare"}):
        (found,) = versions.missing()
    assert found.endswith(".FP8ScaledMMLinearKernel wants prepare of its subclasses")


@pytest.mark.parametrize(
    "call, problem",
    [
        ("first, second", None),
        ("first, second, third", None),
        ("first, second, *, third", None),
        ("first", "takes (first, second, third), not (first)"),
        ("second, first", "takes (first, second, third), not (second, first)"),
        ("first, second, *, fourth", "takes (first, second, third), not (first, second, *, fourth)"),
    ],
)
def test_how_a_call_fits(call, problem):
    def function(first, second, third=None):
        pass

    assert names.misfit(function, call) == problem


def test_the_tables_by_version():
    """What is in which version was read in the sources of each."""
    tables = {minor: set(versions.needed((0, minor))) for minor in range(24, 34)}
    has = {
        name: [minor for minor, table in tables.items() if any(path.endswith(name) for path in table)]
        for name in (
            *(":TPAwareRMSNorm.forward", ":replace_parameter", ":get_input_quant_key"),
            *(":expose_input_quant_key._input_quant_key", ":expose_input_quant_key.input_quant_key"),
        )
    }
    assert has == {
        ":TPAwareRMSNorm.forward": [*range(25, 34)],
        ":replace_parameter": [*range(24, 34)],
        ":get_input_quant_key": [*range(30, 34)],
        ":expose_input_quant_key._input_quant_key": [*range(30, 34)],
        ":expose_input_quant_key.input_quant_key": [*range(24, 30)],
    }
    for minor, tensor in ((24, "new_data"), (27, "new_data"), (28, "new_tensor"), (33, "new_tensor")):
        call = versions.needed((0, minor))["vllm.model_executor.utils:replace_parameter"]
        assert call == f"layer, param_name, {tensor}"


@pytest.mark.parametrize("version", ["0.29.1", "0.30.0"])
def test_the_key_of_a_linear_has_one_name(version, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: version)
    linear = types.SimpleNamespace()
    assert versions.exposed_input_quant_key(linear) is None
    setattr(linear, "input_quant_key" if version < "0.30" else "_input_quant_key", "rows")
    assert versions.exposed_input_quant_key(linear) == "rows"


def test_only_listed_names_are_given():
    with pytest.raises(AttributeError, match=r"LayerNorm: not listed in .*versions\.NEEDED"):
        _ = versions.LayerNorm
