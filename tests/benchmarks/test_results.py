"""The benchmarks' files, and the README's figures made of them."""

from __future__ import annotations

import re

import common
import pytest
import readme_tables

ROWS = [{"T": 1, "ours us": 2.345}, {"T": 16, "ours us": 1234.5}]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "some.csv"


def test_a_run_is_appended_with_when_and_on_what(results, monkeypatch):
    common.report("some", ROWS)
    first = results.read_text()
    monkeypatch.setattr(common, "this_run", lambda: dict.fromkeys(common.RUN_COLUMNS, "later"))
    common.report("some", ROWS[:1])
    assert results.read_text() == first + "later,later,later,later,1,2.35\n"
    lines = common.read(results)
    assert [line["ours us"] for line in lines] == ["2.35", "1234", "2.35"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", lines[0]["date"])
    assert lines[0]["machine"].startswith(common.processor())
    assert re.fullmatch(r"[0-9a-f]{7,}( and changes)?|version .+", lines[0]["commit"])
    assert "torch " in lines[0]["versions"]
    assert common.latest("some") == lines[-1:]


def test_columns_may_come_and_go(results, monkeypatch):
    common.report("some", ROWS)
    monkeypatch.setattr(common, "this_run", lambda: dict.fromkeys(common.RUN_COLUMNS, "later"))
    common.report("some", [{"T": 1, "bf16 us": 3.0}])
    lines = common.read(results)
    assert [(line["ours us"], line["bf16 us"]) for line in lines] == [("2.35", ""), ("1234", ""), ("", "3")]


def test_the_pages_have_the_last_results():
    texts = [page.read_text() for page in readme_tables.PAGES]
    blocks = [name for text in texts for name in re.findall(r"<!-- (\w+) -->\n", text) if name != "end"]
    assert sorted(blocks) == sorted(readme_tables.BLOCKS)
    for text in texts:
        assert readme_tables.written(text) == text, "run: python benchmarks/readme_tables.py"
