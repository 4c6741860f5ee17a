"""Write the table of ``docs/modes.md`` from what ``tests/e2e/test_modes*.py`` have proven last::

python -m pytest -m slow tests/e2e/test_modes*.py
python tests/modes_page.py
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/modes.md"


def table(proven: dict[str, dict[str, str]]) -> str:
    """One line for each mode."""
    lines = ["| mode | fused | what holds | test |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {mode} | {m['fused']} | {m['holds']} | `{m['test']}` |" for mode, m in sorted(proven.items())
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vllm", "torch"))
    return "\n".join([*lines, "", f"{datetime.date.today()}, CPU, {versions}."])


def main() -> None:
    proven = json.loads((ROOT / ".cache/modes.json").read_text())
    text = PAGE.read_text()
    block = f"<!-- modes -->\n{table(proven)}\n<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- modes -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
