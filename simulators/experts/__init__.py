"""Policies whose play becomes logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from simulators.policy import PolicyError

__all__ = ["SHIPPED", "PolicyError", "open_safetensors"]
SHIPPED = Path(__file__).resolve().parent
"""Folder of the experts' weights."""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read as numpy arrays. PolicyError for one that cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{path}: not a readable safetensors file ({error})") from None
