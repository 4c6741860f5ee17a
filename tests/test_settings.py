"""Settings: environment and additional_config to one object; whatever is not known is an error."""

from __future__ import annotations

import dataclasses

import pytest

from vllm_neuron_rmsq import settings
from vllm_neuron_rmsq.settings import Settings


@pytest.fixture(autouse=True)
def fresh_settings():
    settings.install(None)
    yield
    settings.install(None)


def test_defaults():
    assert Settings.load({}) == Settings(backend="auto", target="trn2", fuse=True, strict=False)


def test_environment_is_read():
    environ = {
        "VLLM_RMSQ_BACKEND": "nki-sim",
        "VLLM_RMSQ_TARGET": "trn3",
        "VLLM_RMSQ_FUSE": "0",
        "VLLM_RMSQ_STRICT": "1",
        "VLLM_PLUGINS": "neuron_rmsq",
    }
    assert Settings.load(environ) == Settings(backend="nki-sim", target="trn3", fuse=False, strict=True)


@pytest.mark.parametrize("value", [False, 0, "0"])
def test_additional_config_wins_and_takes_json_values(value):
    environ = {"VLLM_RMSQ_FUSE": "1", "VLLM_RMSQ_TARGET": "trn3"}
    loaded = Settings.load(environ, {"rmsq": {"fuse": value}, "other plugin": {"colour": 1}})
    assert loaded == Settings(target="trn3", fuse=False)


def test_every_choice_is_accepted():
    for key, choices in settings.choices().items():
        for choice in choices:
            loaded = Settings.load({f"VLLM_RMSQ_{key.upper()}": choice})
            assert getattr(loaded, key) == (choice == "1" if key in ("fuse", "strict") else choice)


@pytest.mark.parametrize(
    ("environ", "config", "message"),
    [
        (
            {"VLLM_RMSQ_BACKENT": "cpu"},
            None,
            r"VLLM_RMSQ_BACKENT: unknown environment variable; expected one of VLLM_RMSQ_BACKEND, "
            r"VLLM_RMSQ_TARGET, VLLM_RMSQ_FUSE, VLLM_RMSQ_STRICT, VLLM_RMSQ_CPU_ISA, "
            r"VLLM_RMSQ_ATTENTION, VLLM_RMSQ_GATHER$",
        ),
        ({"VLLM_RMSQ_backend": "cpu"}, None, r"VLLM_RMSQ_backend: unknown environment variable"),
        (
            {"VLLM_RMSQ_BACKEND": "cup"},
            None,
            r"VLLM_RMSQ_BACKEND: expected one of auto, nki, nki-sim, cpu, torch, off; got 'cup'$",
        ),
        ({"VLLM_RMSQ_TARGET": "TRN2"}, None, r"VLLM_RMSQ_TARGET: expected one of trn2, trn3; got 'TRN2'$"),
        ({"VLLM_RMSQ_FUSE": "yes"}, None, r"VLLM_RMSQ_FUSE: expected one of 1, 0; got 'yes'$"),
        ({"VLLM_RMSQ_STRICT": ""}, None, r"VLLM_RMSQ_STRICT: expected one of 0, 1; got ''$"),
        ({}, {"rmsq": {"fused": 1}}, r"\['fused'\]: unknown setting; expected one of backend, target, fuse"),
        ({}, {"rmsq": {"target": "trn1"}}, r"\['target'\]: expected one of trn2, trn3; got 'trn1'$"),
        ({}, {"rmsq": {"backend": None}}, r"\['backend'\]: expected one of auto, .*; got None$"),
        ({}, {"rmsq": "cpu"}, r"additional_config\['rmsq'\]: expected a mapping of backend, .*; got 'cpu'$"),
    ],
)
def test_unknown_keys_and_values_are_errors(environ, config, message):
    with pytest.raises(ValueError, match=message):
        Settings.load(environ, config)


def test_an_error_in_the_environment_is_not_hidden_by_additional_config():
    with pytest.raises(ValueError, match="VLLM_RMSQ_BACKEND"):
        Settings.load({"VLLM_RMSQ_BACKEND": "cup"}, {"rmsq": {"backend": "cpu"}})


def test_current_is_the_environment_until_settings_are_installed(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_TARGET", "trn3")
    settings.install(None)
    assert settings.current().target == "trn3"
    settings.install(Settings(target="trn2", backend="torch"))
    assert settings.current() == Settings(target="trn2", backend="torch")
    settings.install(None)
    assert settings.current().target == "trn3"


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().backend = "cpu"  # type: ignore[misc]
