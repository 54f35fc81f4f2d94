"""The figures of `benchmarks.gpu` as Markdown: checks, training, the patch embedder, control, kernels, failures.

lines of figures.jsonl, the last one of each part -> README.md beside it
"""

from __future__ import annotations

import json
from typing import Any

FIGURES = "figures.jsonl"

Line = dict[str, Any]


def written(lines: list[Line]) -> str:
    parts = {line["part"]: line for line in lines}
    best, hardware = parts.get("checks", {}), dict.fromkeys(line["hardware"] for line in lines)
    text = [
        "# On an accelerator",
        "",
        "Written by `python -m benchmarks.gpu --shards CONTROL ATARI`. All figures, with ",
    ]
    text[-1] += f"the commit and the versions they were measured at, are in [{FIGURES}]({FIGURES})."
    if any(line.get("rehearsal") for line in lines):
        text += ["", "**A rehearsal at `tiny`: nothing here was measured at the sizes that are named.**"]
    text += ["", f"Hardware: {'; '.join(hardware)}.", ""]
    if "best_tflops" in best:
        copied = best["terabytes_per_second"]
        text += [f"Its best here: {best['best_tflops']:.4g} TFLOP/s (bfloat16 product), {copied:.2f} TB/s (copy).", ""]
    sections = checks(best), training(parts), embedder(lines), control(lines), kernels(lines), failures(lines)
    return "\n".join([*text, *(line for section in sections for line in section)])


def checks(line: Line) -> list[str]:
    """What was compared with its plain form, before anything was timed."""
    named = ("attention", "head", "failed")
    found = {what: value for what, value in line.items() if what.startswith(named) or what.endswith("as plain")}
    return [f"Checks: {json.dumps(found)}", ""] if found else []


def training(parts: dict[str, Line]) -> list[str]:
    best, rows = parts.get("checks", {}).get("best_tflops"), []
    for name, line in parts.items():
        if "tokens_per_second" not in line:
            continue
        size = name.removeprefix("bare loop ").removeprefix("train ").removeprefix("GPT-2 ").split()[0]
        peers = [parts.get(peer, {}).get("tokens_per_second") for peer in (f"GPT-2 {size} ZeRO 1", f"bare loop {size}")]
        ours = name.startswith("train") and not name.endswith(("Atari", "offload")) and "micro-batch" not in name
        ratios = [f"{line['tokens_per_second'] / rate:.2f}" if ours and rate else "" for rate in peers]
        shares = [f"{100 * line[key]:.1f}" if key in line else "" for key in ("mfu", "executed_mfu")]
        rows.append([
            name + (" (cut)" if "cut" in line else ""),
            line["form"],
            line["micro_batch"],
            f"{line['tokens_per_second']:,.0f}",
            f"{line['tflops']:.4g}",
            *shares,
            f"{100 * line['executed_tflops'] / best:.1f}" if best else "",
            f"{line['step_ms']:.1f}",
            *ratios,
            f"{100 * line['wait_share']:.2f}" if "wait_share" in line else "",
            *(f"{line[key]:.1f}" if key in line else "" for key in ("peak_gigabytes", "expected_gigabytes")),
        ])  # fmt: skip
    heads = ["part", "blocks", "micro-batch", "tokens/s", "TFLOP/s", "MFU, %", "executed MFU, %", "executed, % of best"]
    heads += ["step, ms", "/ GPT-2", "/ bare loop", "wait on data, %", "peak GB", "GB by --dry-run"]
    said = (
        "TFLOP/s and MFU by the usual convention, Gato's for every row, GPT-2's too; executed: Gato's products that "
        "are computed, since the head sees supervised tokens alone and attention is causal. / GPT-2: with its blocks "
        "in the form that its row names. --dry-run leaves out buckets and float32 gradients."
    )
    text = table("Training", heads, rows)
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
    rows = [[line["part"], f"`{last_line(line['error'])}`"] for line in lines if "error" in line]
    return table("Failed", ["part", "error"], rows)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def table(title: str, heads: list[str], rows: list[list[Any]]) -> list[str]:
    """A section; nothing where there are no rows."""
    if not rows:
        return []
    cells = heads, ["---"] * len(heads), *rows
    return [f"## {title}", "", *(f"| {' | '.join(map(str, row))} |" for row in cells), ""]
