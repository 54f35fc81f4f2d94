"""Gato from Python: write logs, build datasets, stream and train, load weights, act and compare.

Every name is imported when it is first asked for, so that `import gato` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gato.agents import Agent, Model, load
    from gato.comparing import compare
    from gato.data import Dataset, Stream, build
    from gato.logs import Episode, write_logs
    from gato.training import TrainingError, train

__all__ = [
    "Agent",
    "Dataset",
    "Episode",
    "Model",
    "Stream",
    "TrainingError",
    "build",
    "compare",
    "load",
    "train",
    "write_logs",
]

_HOMES = {
    **dict.fromkeys(("Agent", "Model", "load"), "gato.agents"),
    "compare": "gato.comparing",
    **dict.fromkeys(("Dataset", "Stream", "build"), "gato.data"),
    **dict.fromkeys(("Episode", "write_logs"), "gato.logs"),
    **dict.fromkeys(("TrainingError", "train"), "gato.training"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gato' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
