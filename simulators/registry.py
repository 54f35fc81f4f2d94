"""Registry of suites: which there are, and whose an id is.

    registered by --import, entry points `gato.suites`, simulators/suites/*.py -> Suite by name, Suite by id

A plug-in's suite comes before the project's own, so it may claim what gymnasium would only look up. The suite of all
other gymnasium ids is asked last.

Invariant: asking imports no simulator.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import Any

from schemas.episode import EnvironmentSpec
from simulators import suites
from simulators.suite import SimulatorError, Suite

ENTRY_POINTS = "gato.suites"
_registered: dict[str, Suite] = {}


def register(suite: Suite) -> None:
    """Make a suite known; replaces one of the same name. For a module that `--import` names."""
    _registered[suite.name] = suite


def all_suites() -> dict[str, Suite]:
    """Every suite by name, in the order in which they are asked for an id."""
    ours = _built_in()
    theirs = {name: suite for name, suite in (_installed() | _registered).items() if name not in ours}
    return theirs | {name: _registered.get(name, suite) for name, suite in ours.items()}


def suite_named(name: str) -> Suite:
    """The suite of that name. SimulatorError lists those that there are."""
    found = all_suites()
    if name not in found:
        remedy = "install the package that provides it, or name its module by --import"
        raise SimulatorError(f"unknown suite '{name}'; known: {', '.join(sorted(found))}; {remedy}")
    return found[name]


def suite_of_id(id: str) -> Suite:
    """The suite that an environment's id belongs to."""
    return next(suite for suite in all_suites().values() if suite.owns(id))


def environment(id: str, kwargs: dict[str, Any] | None = None) -> EnvironmentSpec:
    """The spec of an id, with arguments of its constructor; whether there is such an environment is not asked."""
    return EnvironmentSpec(suite_of_id(id).name, id, dict(kwargs or {}))


def versions() -> dict[str, str]:
    """Installed versions of what decides a simulator's behaviour, by distribution."""
    wanted = dict.fromkeys(name for suite in all_suites().values() for name in suite.distributions)
    found = {}
    for distribution in wanted:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def clips_rewards(environment: EnvironmentSpec | None, source: str) -> bool:
    """True if logs of that environment in that source's format hold rewards clipped to ±1."""
    suite = all_suites().get(environment.suite) if environment else None
    return suite is not None and suite.clips_rewards(source)


@cache
def _built_in() -> dict[str, Suite]:
    names = sorted(module.name for module in pkgutil.iter_modules(suites.__path__) if not module.name.startswith("_"))
    found = [importlib.import_module(f"{suites.__name__}.{name}").SUITE for name in names]
    # one that owns whatever is left comes last
    return {suite.name: suite for suite in sorted(found, key=lambda suite: suite.owns(""))}


@cache
def _installed() -> dict[str, Suite]:
    return {suite.name: suite for suite in _loaded(ENTRY_POINTS)}


def _loaded(group: str) -> Iterator[Any]:
    """Objects of a group's entry points. SimulatorError names the distribution of one that cannot be loaded."""
    for point in metadata.entry_points(group=group):
        try:
            yield point.load()
        except Exception as error:  # another project's module may raise anything
            whose = point.dist.name if point.dist else "?"
            detail = f"{type(error).__name__}: {error}"
            raise SimulatorError(f"{whose}: entry point {point.name} = {point.value} of {group} cannot be loaded "
                                 f"({detail}); repair or uninstall it") from error  # fmt: skip
