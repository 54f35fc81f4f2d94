"""Modules of users, imported for what they register: environments, suites, sources.

    --import MODULE (several times) -> importlib.import_module, in the command and in each of its worker processes

Invariant: a module is imported once per process, and before anything is looked up in a registry.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import gymnasium
import tyro

from schemas.files import sha256_of

FLAG = "--import"
Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import"), tyro.conf.UseAppendAction]
"""Type of the option: modules to import first. They register environments, suites or sources."""


class PluginError(ValueError):
    """A module cannot be imported; the message names it and the remedy."""


def import_module(name: str) -> ModuleType:
    """A user's module; the current folder counts, as it does for `python -m`. Raises what the module raises."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def load(modules: Iterable[str]) -> None:
    """Import each module. PluginError names one that fails."""
    for name in modules:
        try:
            gymnasium.register_envs(import_module(name))
        except Exception as error:  # a user's module may raise anything
            detail = f"{type(error).__name__}: {error}"
            raise PluginError(f"--import {name}: {detail}; give a module's name, its folder being the current one "
                              "or on PYTHONPATH") from error  # fmt: skip


def load_early(arguments: Sequence[str]) -> None:
    """Import what a command line names, before its options are known: a module may bring options of its own."""
    given = [value for flag, value in zip(arguments, arguments[1:]) if flag == FLAG]
    load(given + [a.removeprefix(f"{FLAG}=") for a in arguments if a.startswith(f"{FLAG}=")])


def module_of(entry_point: Any) -> str:
    """Name of the module of a gymnasium entry point, 'MODULE:CLASS' or what makes the environment."""
    return entry_point.split(":")[0] if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")


def module_sha256(names: Iterable[str]) -> list[str]:
    """sha256 of the files of modules, ascending; without this package's and those of installed distributions, whose
    versions say what they do."""
    files = {_file_of(name) for name in names if name and name.split(".")[0] != __package__}
    own = (file for file in files if file.is_file() and not {"site-packages", "dist-packages"} & set(file.parts))
    return sorted(map(sha256_of, own))


def _file_of(name: str) -> Path:
    """The file of a module, imported or not; an empty path where it has none."""
    found = getattr(sys.modules.get(name), "__file__", None)
    if name not in sys.modules:
        with suppress(Exception):  # of its parents, which are imported: they may raise anything
            found = getattr(importlib.util.find_spec(name), "origin", None)
    return Path(found or "")
