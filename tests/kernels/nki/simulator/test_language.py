"""Python that is no part of the NKI language is refused."""

from __future__ import annotations

import pytest
from nki_simulated import nl, normal

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationError, check_language, simulate


def helper_with_lambda():
    return lambda: 1


def calls_helper(x):
    helper_with_lambda()


def catches(x):
    try:
        nl.load(x)
    except ValueError:
        return


def compares_identity(x=None):
    if x is None:
        return


def keyword_only(x, *, flag=True): ...


def closes_over(x):
    def inner():
        return x

    inner()


def generates(x):
    return sum(i for i in range(3))


def has_context(x):
    with open(x):
        return


def imports(x):
    import math

    return math


def allowed(x, scale=1.0):
    """Everything the guide shows."""
    items = [i * 2 for i in range(3)] + [len((1, 2))]
    table = {"a": 1}
    assert x.shape[0] >= 1, f"{x.shape}"
    if scale == None:  # noqa: E711
        print(items, table)
    with nl.no_reorder():
        tile = nl.load(x)

    def loop_body(i):
        nl.store(x, tile)

    nl.fori_loop(0, 2, loop_body)
    while table["a"] < 3:
        table["a"] += 1


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (calls_helper, "helper_with_lambda: a lambda"),
        (catches, "try/except"),
        (compares_identity, "`is`"),
        (keyword_only, "keyword-only"),
        (closes_over, "a closure"),
        (generates, "a generator"),
        (has_context, "`with`"),
        (imports, "an import"),
    ],
)
def test_python_that_is_not_nki_is_refused(kernel, what):
    with pytest.raises(
        NkiSimulationError, match=f"{what}.* is no part of the NKI language\n  at {__file__}:"
    ):
        simulate(kernel)(normal(4, 4))


def test_what_the_language_guide_shows_is_accepted():
    check_language(allowed)
    simulate(allowed)(normal(4, 4))
