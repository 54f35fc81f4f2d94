"""Provenance of a measurement: commit, versions and hardware, which go into every result row."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import simulators

ROOT = Path(__file__).resolve().parent.parent
NOTED = "carried/commit"


def host(threads: int) -> dict[str, str]:
    """Columns `commit`, `versions` (JSON) and `hardware` of the result rows."""
    return {"commit": commit(), "versions": json.dumps(versions(), sort_keys=True), "hardware": hardware(threads)}


def versions() -> dict[str, str]:
    """Installed versions of what decides an episode, by distribution."""
    return simulators.versions() | {"torch": torch.__version__, "numpy": np.__version__}


def commit(root: Path = ROOT) -> str:
    """Commit of the checkout `root`, or of a copy without git what benchmarks/carry.py noted beside it; else empty."""
    if not (root / ".git").exists():  # an installed package may lie in somebody else's checkout
        noted = root / NOTED
        return noted.read_text("utf-8").strip() if noted.is_file() else ""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def hardware(threads: int) -> str:
    """Name of the GPU, or of the CPU with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def processor() -> str:
    """The CPU's name, or the machine's kind where the CPU does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
