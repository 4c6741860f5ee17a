"""The pages link to what is there, and the issue forms ask for what is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_neuron_rmsq import settings

ROOT = Path(__file__).parents[1]
SKIP = {".venv", ".cache", "build", "node_modules", "vllm_neuron_rmsq"}
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part in SKIP or part.startswith(".") for part in page.relative_to(ROOT).parts)
)
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target} is not there"


@pytest.mark.engine
def test_the_site_is_built_without_a_warning(tmp_path):
    """Every link, anchor, page of the navigation and docstring of the reference: MkDocs is strict."""
    subprocess.run([sys.executable, "docs/stage.py", ".cache/docs"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/docs/api.html").read_text()
    for name in ("rms_norm_quant", "packed_fp8_linear", "dequantize", "convert", "validate", "simulate"):
        assert name in re.findall(r'<h3 id="[^"]*?(\w+)"', api), name
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text()
        assert not re.search(r"<p>[^<]*\n- ", html), f"{page}: a list in a paragraph"
        assert not re.search(r":[a-z]+:<code>", html), f"{page}: a role of Sphinx"


def test_troubleshooting_quotes_real_messages():
    """What is between the dots of a heading's message is in a string of the package, or it is vLLM's own."""
    strings = [
        node.value
        for path in (ROOT / "vllm_neuron_rmsq").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^### .*?`(.+?)`.*\n(.*)", page, flags=re.MULTILINE)
    assert len(messages) > 10
    for message, explanation in messages:
        if "own message" not in explanation:
            for part in re.split(r"\.\.\.", message):
                part = part.strip(" ;:,")
                assert any(part in string for string in strings), f"no message says {part!r}: {message}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, (
            f"docs/README.md does not list {page.name}"
        )
    assert "docs/README.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_issue_forms_ask_for_the_output_of_check(form):
    fields = yaml.safe_load(form.read_text())["body"]
    (check,) = (field for field in fields if field.get("id") == "check")
    assert "vllm-neuron-rmsq check" in check["attributes"]["label"]
    assert check["validations"]["required"] is True


def test_make_targets_named_in_the_pages_are_there():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = {line.split()[1] for line in done.stdout.splitlines()}
    for page in PAGES:
        named = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
        assert {a or b for a, b in named} <= targets, page
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(workflow["jobs"]["make"]["strategy"]["matrix"]["command"]) == {"demo", "test"} <= targets


def test_every_setting_and_its_values_are_in_the_examples():
    rows = (ROOT / "examples/serve.md").read_text().partition("## Settings")[2].splitlines()
    for key, values in settings.choices().items():
        (row,) = (row for row in rows if row.startswith(f"| `{settings.PREFIX}{key.upper()}` | `{key}` |"))
        assert not {f"`{value}`" for value in values} - set(re.findall(r"`[^`]+`", row)), row
        assert f"`{values[0]}` (default)" in row
