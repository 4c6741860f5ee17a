"""The registry of schemes: how kinds of checkpoint are quantized."""

from __future__ import annotations

import dataclasses

import pytest
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
)

from vllm_neuron_rmsq.integrations.vllm import schemes


def test_every_format_of_rows_has_a_key_of_its_own():
    formats = {(scheme.rows, scheme.wrap.__self__) for scheme in schemes.SCHEMES}
    assert len({rows for rows, _ in formats}) == len(formats) == 2


def test_a_linear_of_no_scheme_gets_the_reasons():
    scheme, reason = schemes.find(kFp8DynamicTokenSym, kFp8StaticChannelSym)
    assert scheme is not None and scheme.name == "per-token" and reason == ""
    scheme, reason = schemes.find(kFp8DynamicTokenSym, kFp8Static128BlockSym)
    assert scheme is None
    assert reason.startswith(
        f"needs per-channel or per-tensor weights, not {kFp8Static128BlockSym}; or needs "
    )


def test_a_new_scheme_is_one_entry(monkeypatch):
    new = dataclasses.replace(schemes.SCHEMES[0], name="new", activation_keys=("mine",), activations="new")
    monkeypatch.setattr(schemes, "SCHEMES", (*schemes.SCHEMES, new))
    assert schemes.find("mine", kFp8StaticChannelSym) == (new, "")
    scheme, reason = schemes.find("another", kFp8StaticChannelSym)
    assert scheme is None and reason == (
        "needs dynamic per-token or per-tensor activations, not another; or "
        "needs static per-tensor activations, not another; or "
        "needs dynamic per-group (1 x 128) activations, not another; or needs new activations, not another"
    )


def test_a_scheme_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        schemes.SCHEMES[0].name = "other"
