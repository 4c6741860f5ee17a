"""Python that is no part of the NKI language is refused."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import pytest
from nki_simulated import nl, normal

import vllm_neuron_rmsq.kernels.nki as kernels_nki
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


def loops_on_the_device(x):
    for i in nl.dynamic_range(2):
        nl.store(x, nl.load(x[i]))


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
    if scale is None or x is not None:
        print(scale)
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
    for language in ("0.6", "0.7"):
        check_language(allowed, language)
    simulate(allowed)(normal(4, 4))


@pytest.mark.parametrize(
    "kernel", [calls_helper, catches, keyword_only, closes_over, generates, has_context, imports]
)
def test_nki_0_7_traces_with_python_and_takes_all_of_it(kernel):
    check_language(kernel, "0.7")


def test_nki_0_7_has_no_dynamic_range():
    check_language(loops_on_the_device, "0.6")
    with pytest.raises(NkiSimulationError, match=r"`nl.dynamic_range` .* is no part of the NKI language"):
        simulate(loops_on_the_device, language="0.7")(normal(4, 4))
    with pytest.raises(ValueError, match=r"0\.6, 0\.7 \(versions of NKI\), got '0\.5'"):
        check_language(allowed, "0.5")


def closing(limit):
    def decorate(function):
        @functools.wraps(function)
        def bounded(x):
            assert x.shape[0] <= limit
            return function(x)

        return bounded

    return decorate


@closing(128)
def decorated(x):
    nl.load(x)


@closing(128)
def decorated_and_wrong(x):
    return lambda: nl.load(x)


def test_a_decorator_is_no_part_of_the_kernel():
    check_language(decorated)
    simulate(decorated)(normal(4, 4))
    with pytest.raises(NkiSimulationError, match="a lambda"):
        check_language(decorated_and_wrong)


@pytest.mark.parametrize("language", ["0.6", "0.7"])
def test_our_kernels_are_nki_in_every_version(language):
    entries = 0
    folder = Path(kernels_nki.__path__[0])
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"{kernels_nki.__name__}.{path.stem}")
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and getattr(kernel, "__module__", "") == module.__name__:
                check_language(kernel, language)
                entries += 1
    assert entries >= 4
