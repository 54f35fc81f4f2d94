"""Policies whose play becomes logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


class PolicyError(ValueError):
    """A policy cannot be used; the message names the file or name, the field and the remedy."""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read as numpy arrays. PolicyError for one that cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{path}: not a readable safetensors file ({error})") from None
