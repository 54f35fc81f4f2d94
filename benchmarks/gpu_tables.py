"""The figures of `benchmarks.gpu` as Markdown: a section for training, the patch embedder, control, kernels, failures.

lines of figures.jsonl, the last one of each part -> README.md beside it
"""

from __future__ import annotations

import json
from typing import Any

FIGURES = "figures.jsonl"

Line = dict[str, Any]


def written(lines: list[Line]) -> str:
    parts = {line["part"]: line for line in lines}
    best, hardware = parts.get("ceilings", {}), dict.fromkeys(line["hardware"] for line in lines)
    text = [
        "# On an accelerator",
        "",
        "Written by `python -m benchmarks.gpu --shards CONTROL ATARI`. All figures, with ",
    ]
    text[-1] += f"the commit and the versions they were measured at, are in [{FIGURES}]({FIGURES})."
    text += ["", f"Hardware: {'; '.join(hardware)}.", ""]
    if "tflops" in best:
        copied = best["terabytes_per_second"]
        text += [f"Its best here: {best['tflops']:.4g} TFLOP/s (bfloat16 product), {copied:.2f} TB/s (copy).", ""]
    sections = training(parts), embedder(lines), control(lines), kernels(lines), failures(lines)
    return "\n".join([*text, *(line for section in sections for line in section)])


def training(parts: dict[str, Line]) -> list[str]:
    best, rows = parts.get("ceilings", {}).get("tflops"), []
    for name, line in parts.items():
        if "tokens_per_second" not in line:
            continue
        size = name.removeprefix("bare loop ").removeprefix("train ").removeprefix("GPT-2 ").split()[0]
        peers = [parts.get(peer, {}).get("tokens_per_second") for peer in (f"GPT-2 {size} ZeRO 1", f"bare loop {size}")]
        ours = name.startswith("train") and not name.endswith(("Atari", "offload")) and "micro-batch" not in name
        ratios = [f"{line['tokens_per_second'] / rate:.2f}" if ours and rate else "" for rate in peers]
        rows.append([
            name,
            line["form"],
            line["micro_batch"],
            f"{line['tokens_per_second']:,.0f}",
            f"{line['tflops']:.4g}",
            f"{100 * line['tflops'] / best:.1f}" if best else "",
            f"{line['step_ms']:.1f}",
            *ratios,
            f"{100 * line['wait_share']:.2f}" if "wait_share" in line else "",
            *(f"{line[key]:.1f}" if key in line else "" for key in ("peak_gigabytes", "expected_gigabytes")),
        ])  # fmt: skip
    heads = ["part", "blocks", "micro-batch", "tokens/s", "TFLOP/s", "% of best", "step, ms", "/ GPT-2", "/ bare loop"]
    said = "FLOP/s by Gato's convention for every row, GPT-2's too. --dry-run leaves out buckets and float32 gradients."
    text = table("Training", [*heads, "wait on data, %", "peak GB", "GB by --dry-run"], rows)
    return [*text, said, ""] if text else []


def embedder(lines: list[Line]) -> list[str]:
    rows = [
        [line["part"], line["patches"], *(f"{line[key]:.2f}" for key in ("embedder_ms", "micro_batch_ms", "share"))]
        for line in lines
        if "embedder_ms" in line
    ]
    heads = ["part", "patches", "embedder alone, ms", "a whole micro-batch, ms", "share"]
    return table("The patch embedder of Atari batches", heads, rows)


def control(lines: list[Line]) -> list[str]:
    mine = {line["part"].removeprefix("control "): line for line in lines if line["part"].startswith("control ")}
    rows = [
        [size, what, *(f"{figure:.2f}" for figure in found.values())]
        for size, line in mine.items()
        for what, found in line.items()
        if isinstance(found, dict) and "p99_ms" in found
    ]
    text = table("Control", ["size", "task, launch", "timesteps/s", "p50 ms", "p99 ms"], rows)
    for size, line in mine.items():
        said = {what: found for what, found in line.items() if what.endswith(("as plain", ": floor"))}
        text += [f"{size}: {json.dumps(said)}", ""] if said else []
    return text


def kernels(lines: list[Line]) -> list[str]:
    text = []
    for line in lines:
        if "kernels" in line:
            rows = [[f"`{name}`", f"{100 * share:.1f}", count] for name, share, count in line["kernels"]]
            text += table(f"{line['part']}, {line['milliseconds']:.1f} ms", ["kernel", "%", "calls"], rows)
    return text


def failures(lines: list[Line]) -> list[str]:
    rows = [[line["part"], f"`{line['error'].strip().splitlines()[-1][:300]}`"] for line in lines if "error" in line]
    return table("Failed", ["part", "error"], rows)


def table(title: str, heads: list[str], rows: list[list[Any]]) -> list[str]:
    """A section; nothing where there are no rows."""
    if not rows:
        return []
    cells = heads, ["---"] * len(heads), *rows
    return [f"## {title}", "", *(f"| {' | '.join(map(str, row))} |" for row in cells), ""]
