"""Device, clock and memory for the parts of `benchmarks.gpu`."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.trainer import started
from trainer.metrics import PEAK_TFLOPS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LINE = "figures "

Figures = dict[str, Any]


def join_alone() -> torch.device:
    """A process group of one without a launcher, whose NCCL looks for no other machine."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_IB_DISABLE", "1")
    return started(5.0)


def keep(figures: Figures) -> Figures:
    """Print what is known so far: the last such line counts, also of a part that is cut."""
    print(LINE + json.dumps(figures), flush=True)
    return figures


def timed(work: Callable[[int], object], seconds: float, least: int, most: int, first: int = 0) -> list[float]:
    """Seconds of each of the turns `first`, `first` + 1 ..., the device waited for: `least` turns, then as many as
    fit `seconds`, `most` at most. Without a GPU two turns, which measure nothing."""
    if not GPU:
        least = most = min(least, 2)
    found: list[float] = []
    while len(found) < least or (len(found) < most and sum(found) < seconds):
        begun = time.perf_counter()
        work(first + len(found))
        if GPU:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return found


def peak_flops() -> float:
    """FLOP/s of the device by its data sheet, bfloat16; 0 if unknown."""
    name = torch.cuda.get_device_name() if GPU else ""
    return 1e12 * next((rate for part, rate in PEAK_TFLOPS.items() if part in name), 0.0)


def rates(tokens: int, convention: float, executed: float, seconds: list[float]) -> Figures:
    """Of a step of `tokens`: tokens/s, milliseconds, TFLOP/s and shares of the peak by both counts of FLOPs per
    token."""
    middle = statistics.median(seconds)
    rate, peak = tokens / middle, peak_flops()
    found = {
        "tokens_per_second": rate,
        "step_ms": 1e3 * middle,
        "slowest_ms": 1e3 * max(seconds),
        "steps": len(seconds),
    }
    found |= {"tflops": rate * convention / 1e12, "executed_tflops": rate * executed / 1e12}
    return found | ({"mfu": rate * convention / peak, "executed_mfu": rate * executed / peak} if peak else {})


def forget_peak() -> None:
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def peaks() -> Figures:
    if not GPU:
        return {}
    taken = {"peak": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    return {f"{name}_gigabytes": value / 1e9 for name, value in taken.items()}
