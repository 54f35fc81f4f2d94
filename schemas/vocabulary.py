"""Token id ranges: which integers mean text, observation, action and separator.

A vocabulary is pure data. Its fingerprint is written into every manifest and checkpoint, so tokens made under one
layout are never read under another.

Invariant: ranges of one vocabulary are half-open, lie in [0, size) and every id fits in uint16.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

# What files made before a vocabulary got its present name call it. Its fingerprint is still that of the former name, so
# that all of them go together.
FORMER_NAMES = {"seed": "disjoint"}
_HASHED_NAMES = {now: former for former, now in FORMER_NAMES.items()}


class VocabularyMismatch(ValueError):
    """Tokens or weights were made under another vocabulary."""


@dataclass(frozen=True)
class IdRange:
    """Half-open range of token ids [start, start + size)."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Vocabulary:
    """One assignment of ids (paper §2.1). `mu` and `scale` are the companding constants μ and M
    of the paper's appendix B; `bins` is the number of uniform bins of a continuous value."""

    name: str
    text: IdRange
    observation_continuous: IdRange
    observation_discrete: IdRange
    action_continuous: IdRange
    action_discrete: IdRange
    separator: int
    size: int
    bins: int = 1024
    mu: float = 100.0
    scale: float = 256.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", FORMER_NAMES.get(self.name, self.name))

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON form, 64 hex digits."""
        body = json.loads(json.dumps(self, default=vars)) | {"name": _HASHED_NAMES.get(self.name, self.name)}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    @property
    def padded_size(self) -> int:
        """Rows of the embedding table: `size` rounded up to a multiple of 128."""
        return -(-self.size // 128) * 128

    def range(self, role: str, kind: str) -> IdRange:
        """Range for role 'observation' or 'action' and kind 'continuous' or 'discrete'."""
        return {
            ("observation", "continuous"): self.observation_continuous,
            ("observation", "discrete"): self.observation_discrete,
            ("action", "continuous"): self.action_continuous,
            ("action", "discrete"): self.action_discrete,
        }[role, kind]

    def require(self, fingerprint: str, where: str) -> None:
        """Raise VocabularyMismatch unless `fingerprint` is this vocabulary's."""
        if fingerprint != self.fingerprint:
            raise VocabularyMismatch(
                f"{where}: made under another vocabulary (fingerprint {fingerprint[:12]}, "
                f"expected {self.fingerprint[:12]} of '{self.name}'); rebuild it with --vocabulary {self.name}"
            )


def bin_centres(bins: int) -> np.ndarray:
    """Centres of `bins` uniform bins over [-1, 1], float64 (bins,)."""
    return (np.arange(bins) + 0.5) * (2.0 / bins) - 1.0


def bin_values(vocabulary: Vocabulary) -> np.ndarray:
    """The values that the bins of a continuous observation represent, float64 (bins,): the inverse of the mu-law
    (paper, appendix B) at the bins' centres."""
    centres, mu, scale = bin_centres(vocabulary.bins), vocabulary.mu, vocabulary.scale
    return np.sign(centres) * ((scale * mu + 1.0) ** np.abs(centres) - 1.0) / mu


DISJOINT = Vocabulary(
    name="disjoint",
    text=IdRange(0, 32000),
    observation_continuous=IdRange(32000, 1024),
    observation_discrete=IdRange(32000, 1024),
    action_continuous=IdRange(33024, 1024),
    action_discrete=IdRange(33024, 1024),
    separator=34048,
    size=34049,
)


PAPER = Vocabulary(
    name="paper",
    text=IdRange(0, 32000),
    observation_continuous=IdRange(32000, 1024),
    observation_discrete=IdRange(0, 1024),
    action_continuous=IdRange(32000, 1024),
    action_discrete=IdRange(0, 1024),
    separator=33024,
    size=33025,
)

VOCABULARIES = {vocabulary.name: vocabulary for vocabulary in (DISJOINT, PAPER)}


def by_name(name: str) -> Vocabulary:
    """The vocabulary of a name, or of a former name; ValueError lists the known names."""
    name = FORMER_NAMES.get(name, name)
    if name not in VOCABULARIES:
        raise ValueError(f"unknown vocabulary '{name}'; known: {', '.join(sorted(VOCABULARIES))}")
    return VOCABULARIES[name]
