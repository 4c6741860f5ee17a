"""Write the tables and figures of README and docs from the last run of each benchmark.

A block of a page between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced by what the function of that
name in :data:`BLOCKS` makes of ``benchmarks/results``, so that no figure there is typed by hand::

    python benchmarks/readme_tables.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import common

from vllm_neuron_rmsq.measure import bench
from vllm_neuron_rmsq.measure.results import read

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs/vllm-versions.md")
NAMES = {
    "Qwen2.5-0.5B": "Qwen2.5-0.5B's shape, random weights",
    "Llama-1.1B": "Llama, 1.1 billion parameters, random weights",
}
OURS = (bench.PLUGIN, bench.HEAD)
"""With the output projection in bf16, and in FP8 as well."""


def end_to_end() -> str:
    """Tokens a second of each model's last run, every side beside the plugin; where another is faster."""
    lines = read(common.RESULTS / "end_to_end.csv")
    last = {line["model"]: common.run_of(line) for line in lines}
    shown = [line for line in lines if common.run_of(line) == last[line["model"]]]
    columns = [column for column in lines[0] if any(line[column] for line in shown)]
    sides = [column.removesuffix(" tok/s") for column in columns if column.endswith(" tok/s")]
    sides.sort(key=lambda side: side not in OURS)
    table = [f"| tokens/s | | {' | '.join(sides)} |", f"| --- | --- | {' | '.join(['--:'] * len(sides))} |"]
    faster: dict[str, list[str]] = {}
    for model in last:
        of_model = [line for line in shown if line["model"] == model]
        name = NAMES.get(model, model)
        for line in of_model:
            speeds = {side: float(line[f"{side} tok/s"]) for side in sides if line[f"{side} tok/s"]}
            best = max(speeds, key=speeds.__getitem__)
            if best not in OURS:
                ours = max(speeds[side] for side in OURS if side in speeds)
                faster.setdefault(best, []).append(
                    f"{model}, {line['work']}: {speeds[best] / ours:.2f} times the plugin"
                )
            cells = (line[f"{side} tok/s"] for side in sides)
            cells = (f"**{c}**" if side == best else c for side, c in zip(sides, cells, strict=True))
            table.append(f"| {name} | {_unbroken(line['work'])} | {' | '.join(cells)} |")
            name = ""
        sizes = (_gigabytes(of_model[0].get(f"{side} MB", "")) for side in sides)
        table.append(f"| | {_unbroken('memory, GB')} | {' | '.join(sizes)} |")
    table += [
        "",
        *dict.fromkeys(f"{_when([line])}, {line['machine']}, {line['versions']}." for line in shown),
        "Memory is what the largest process of a server has resident.",
    ]
    if faster:
        table += ["", "Take another where that is faster:", ""]
        table += [f"- {side}: {'; '.join(works)}." for side, works in faster.items()]
        table.append("")
    return "\n".join(table)


def packed_fp8_linear() -> str:
    """How the FP8 linear compares with vLLM's bf16 linear, by the number of rows."""
    lines = common.latest("packed_fp8_linear")
    few = [1 / float(line["bf16 / ours"]) for line in lines if int(line["T"]) <= 16]
    many = [1 / float(line["bf16 / ours"]) for line in lines if int(line["T"]) >= 128]
    share = [100 * float(line["share"]) for line in lines if int(line["T"]) == 16]
    return (
        f"The FP8 linear takes {_range(few, '.2f')} of the time of vLLM's bf16 linear up to 16 rows, and\n"
        f"{_range(many, '.2f')} from 128 rows on. At 16 rows it multiplies at {_range(share, '.0f')} %\n"
        f"of the best rate that bf16 reaches with any number of rows ({_when(lines)})."
    )


def rms_norm_quant() -> str:
    """How the fused norm compares with stock vLLM's two steps."""
    lines = common.latest("rms_norm_quant")
    stock, compiled = ([float(line[f"{side} / ours"]) for line in lines] for side in ("stock", "compiled"))
    return (
        f"Add + norm + quantization is {_range(stock, '.0f')} times as fast as stock vLLM's and\n"
        f"{_range(compiled, '.0f')} times as fast as the same compiled ({_when(lines)})."
    )


def silu_mul_quant() -> str:
    """How the fused activation function compares with stock vLLM's two steps."""
    lines = common.latest("silu_mul_quant")
    stock, compiled = ([float(line[f"{side} / ours"]) for line in lines] for side in ("stock", "compiled"))
    return (
        f"SiLU × up + quantization is {_range(stock, '.0f')} times as fast as stock vLLM's and\n"
        f"{_range(compiled, '.1f')} times as fast as the same compiled ({_when(lines)})."
    )


def nki_cost() -> str:
    """What the NKI kernels should take on Trainium2."""
    table = [
        "| NKI kernel, us on a logical core of two | shape | scheduled | busiest engine alone | DMA alone |",
        "| --- | --- | --: | --: | --: |",
    ]
    lines = common.latest("nki_cost")
    table += [
        f"| `{line['kernel']}` | {line['shape']} | {line['scheduled us']} | {line['floor us']} "
        f"| {line['roof us']} |"
        for line in lines
        if line["goal us"] != "-"
    ]
    return "\n".join([*table, "", f"{_when(lines)}."])


def vllm_versions() -> str:
    """What each vLLM computes, beside the one that is installed for development."""
    lines = {
        (line["vllm"], line["mode"], line["fuse"]): line
        for line in read(common.RESULTS / "vllm_versions.csv")
    }
    table = [
        "| vLLM | torch | mode | fused | packed rows | greedy tokens | logprobs | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (vllm, mode, fuse), line in sorted(lines.items(), key=lambda item: _numbers(item[0][0])):
        fused = line["fused"] if fuse == "1" else "no (`VLLM_RMSQ_FUSE=0`)"
        found = " | ".join(line[column] for column in ("packed rows", "greedy tokens", "logprobs"))
        table.append(f"| {vllm} | {line['torch']} | {mode} | {fused} | {found} | {_when([line])} |")
    return "\n".join(table)


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (end_to_end, packed_fp8_linear, rms_norm_quant, silu_mul_quant, nki_cost, vllm_versions)
}


def _when(lines: list[dict[str, str]]) -> str:
    return f"{lines[-1]['date'].split()[0]}, commit {lines[-1]['commit']}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _range(values: Iterable[float], form: str) -> str:
    values = sorted(values)
    return f"{values[0]:{form}} to {values[-1]:{form}}"


def _gigabytes(megabytes: str) -> str:
    return f"{float(megabytes) / 1000:.2f}" if megabytes else ""


def _unbroken(words: str) -> str:
    return words.replace(" ", "&nbsp;")


def written(text: str) -> str:
    """Return a page's ``text`` with its blocks as the results have them now.

    Raises:
        KeyError: a block has a name that is not in :data:`BLOCKS`.
    """

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- (\w+) -->)\n.*?\n?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
