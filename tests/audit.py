"""`python -m tests.audit FOLDER`: what is known of the pinned packages, without a network.

requirements.lock, advisories of a checkout of github.com/pypa/advisory-database (OSV's form) -> those that apply

Invariant: a version is affected if an advisory lists it, or lies in one of its ranges; withdrawn ones do not count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"


def pinned(lock: Path) -> dict[str, Version]:
    """Versions by canonical name."""
    lines = [line.partition("==") for line in lock.read_text("utf-8").splitlines() if "==" in line]
    return {canonicalize_name(name): Version(version) for name, _, version in lines}


def advisories(folder: Path) -> Iterator[dict[str, Any]]:
    """All that were not withdrawn."""
    for path in sorted(folder.rglob("*.yaml")):
        advisory = yaml.load(path.read_bytes(), yaml.CSafeLoader)
        if not advisory.get("withdrawn"):
            yield advisory


def applies(affected: dict[str, Any], version: Version) -> bool:
    """Whether a version is one of an advisory's."""
    inside = str(version) in affected.get("versions", [])
    for ranges in affected.get("ranges", []):
        within = False
        for event in ranges["events"] if ranges["type"] == "ECOSYSTEM" else []:
            if "introduced" in event:
                within |= version >= Version(event["introduced"])
            elif "fixed" in event:
                within &= version < Version(event["fixed"])
            elif "last_affected" in event:
                within &= version <= Version(event["last_affected"])
        inside |= within
    return inside


def audit(lock: Path, folder: Path) -> tuple[list[str], str]:
    """A line for each advisory that applies; a line on how much was looked at."""
    versions, known = pinned(lock), list(advisories(folder))
    found = [
        f"{name} {versions[name]}: {advisory['id']} {' '.join(advisory.get('aliases') or [])}".rstrip()
        for advisory in known
        for affected in advisory["affected"]
        if (name := canonicalize_name(affected["package"]["name"])) in versions and applies(affected, versions[name])
    ]
    newest = max((str(advisory["modified"])[:10] for advisory in known), default="none")
    return found, f"{len(versions)} packages, {len(known)} advisories, the newest of {newest}: {len(found)} apply"


if __name__ == "__main__":
    lines, summary = audit(LOCK, Path(sys.argv[1]))
    print("\n".join([*lines, summary]))
    sys.exit(bool(lines))
