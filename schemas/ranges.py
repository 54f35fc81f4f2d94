"""Refusing a setting that makes no sense, under the name of its command-line option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Options = TypeVar("Options")


def typed(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Options of a dataclass from values that Python code gives, where no command line has checked their types. A list
    becomes a tuple and text a path, as the field's type says. ValueError names the option whose value is of another
    type, or none of the words that it may be."""
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(part for part in first["loc"] if isinstance(part, str)).replace("_", "-")
        raise ValueError(f"--{setting} {first['input']!r}: {first['msg']}") from None


def require(setting: str, value: float, least: float, most: float) -> None:
    """ValueError names `setting`, an attribute's path as a.b_c, as its option --a.b-c, unless least <= value <= most.
    NaN is always refused."""
    if not least <= value <= most:
        low, high = (f"{end}" if isinstance(end, int) else f"{end:g}" for end in (least, most))
        raise ValueError(f"--{setting.replace('_', '-')} {value}: must be from {low} to {high}")
