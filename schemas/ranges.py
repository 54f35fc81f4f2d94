"""Refusing a setting that makes no sense, under the name of its command-line option."""

from __future__ import annotations


def require(setting: str, value: float, least: float, most: float) -> None:
    """ValueError names `setting`, an attribute's path as a.b_c, as its option --a.b-c, unless least <= value <= most.
    NaN is always refused."""
    if not least <= value <= most:
        low, high = (f"{end}" if isinstance(end, int) else f"{end:g}" for end in (least, most))
        raise ValueError(f"--{setting.replace('_', '-')} {value}: must be from {low} to {high}")
