"""Multi-layer perceptrons from a file: observation vector -> continuous action, in numpy.

    {key: array} -> one vector (keys in lexicographic order) -> normalise, clip -> layers -> action

Two containers are read, neither of which can run code. Safetensors is ours: `layers.N.weight`
(out, in), `layers.N.bias` (out,), where the policy was trained on normalised observations also
`observation.mean` and `observation.variance`, and in the header `hidden_activation`,
`output_activation` (`tanh`, `relu` or `none`) and `observation_clip`. An `.npz` holds `W0 b0 W1 b1 ...`
with `hidden`, `out` and perhaps `mean`, `std`, `clip`, `out_scale`, `out_shift`.

An action may lie beyond its range, which the caller clips it to (simulators.policy.NoisyPolicy).

Invariant: a loaded policy's layers fit each other, and an action is a function of the observation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from safetensors.numpy import save

from schemas.files import atomic_write
from simulators.experts import PolicyError, open_safetensors

VARIANCE_EPSILON = 1e-8
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "none": lambda x: x,
}


@dataclass
class Perceptron:
    """`weights[n]` (out, in) and `biases[n]` (out,); `mean`, `std` (in,) normalise the observation, which is then
    clipped to ±`clip`; the action is `output` * `scale` + `shift`, which the caller clips to its range."""

    name: str
    weights: list[np.ndarray]
    biases: list[np.ndarray]
    mean: np.ndarray
    std: np.ndarray
    clip: float = np.inf
    hidden_activation: str = "tanh"
    output_activation: str = "none"
    scale: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for where in ("hidden_activation", "output_activation"):
            if getattr(self, where) not in ACTIVATIONS:
                raise PolicyError(
                    f"{self.name}: {where} '{getattr(self, where)}' is none of {', '.join(ACTIVATIONS)}; "
                    "export the policy with one of these"
                )
        size = self.mean.shape
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if weight.ndim != 2 or weight.shape[1:] != size or bias.shape != weight.shape[:1]:
                raise PolicyError(
                    f"{self.name}: layer {n} has weight {weight.shape} and bias {bias.shape}, but its input is {size}; "
                    "the file is not one perceptron, export it again"
                )
            size = bias.shape

    @property
    def algorithm(self) -> str:
        return self.metadata.get("algorithm", "perceptron")

    def check(self, observation_size: int, action_size: int, environment: str) -> None:
        """PolicyError unless this policy's input and output fit the environment."""
        for where, own, wanted in (
            ("input (layer 0)", self.mean.size, observation_size),
            (f"output (layer {len(self.weights) - 1})", self.biases[-1].size, action_size),
        ):
            if own != wanted:
                raise PolicyError(
                    f"{self.name}: {where} has size {own}, {environment} needs {wanted}; "
                    "name the environment this policy was trained on"
                )

    def reset(self) -> None:
        """A perceptron keeps nothing between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Arrays of one timestep -> action (A,) float32, not clipped to its range."""
        x = np.concatenate([np.ravel(observation[key]) for key in sorted(observation)]).astype(np.float64)
        x = np.clip((x - self.mean) / self.std, -self.clip, self.clip)
        last = len(self.weights) - 1
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = ACTIVATIONS[self.output_activation if n == last else self.hidden_activation](weight @ x + bias)
        return (x * self.scale + self.shift).astype(np.float32)


def load(path: Path) -> Perceptron:
    """Read a `.safetensors` or `.npz` policy. PolicyError names the file and what is wrong in it."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise PolicyError(f"{path}: a perceptron is a .safetensors or .npz file")
    return (_load_safetensors if path.suffix == ".safetensors" else _load_npz)(path)


def save_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], file_dtype: Any = np.float32
) -> None:
    """Write `layers.N.*` and `observation.*` as `file_dtype` with a header that `load` reads."""
    arrays = {key: np.ascontiguousarray(value, file_dtype) for key, value in sorted(tensors.items())}
    with atomic_write(path) as file:
        file.write(save(arrays, dict(metadata)))


def _load_safetensors(path: Path) -> Perceptron:
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights, biases = _layers(path, tensors, "layers.{}.weight", "layers.{}.bias")
    variance = tensors.get("observation.variance", np.ones(weights[0].shape[1]))
    return Perceptron(
        name=str(path),
        weights=weights,
        biases=biases,
        mean=tensors.get("observation.mean", np.zeros(variance.shape)).astype(np.float64),
        std=np.sqrt(variance.astype(np.float64) + VARIANCE_EPSILON) if "observation.variance" in tensors else variance,
        # the header names a clip even for policies trained on raw observations, where none applies
        clip=float(metadata.get("observation_clip", "10")) if "observation.variance" in tensors else np.inf,
        hidden_activation=metadata.get("hidden_activation", "tanh"),
        output_activation=metadata.get("output_activation", "none"),
        metadata=metadata,
    )


def _load_npz(path: Path) -> Perceptron:
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {key: file[key] for key in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise PolicyError(f"{path}: not a readable .npz without pickles ({error})") from None
    if tensors.get("time_feature", False):
        raise PolicyError(f"{path}: field 'time_feature' is set; policies that read the clock are not supported")
    weights, biases = _layers(path, tensors, "W{}", "b{}")
    inputs = weights[0].shape[1]
    output = str(tensors.get("out", "id"))
    return Perceptron(
        name=str(path),
        weights=weights,
        biases=biases,
        mean=np.asarray(tensors.get("mean", np.zeros(inputs)), np.float64),
        std=np.asarray(tensors.get("std", np.ones(inputs)), np.float64),
        clip=float(tensors.get("clip", np.inf)),
        hidden_activation=str(tensors.get("hidden", "tanh")),
        output_activation="none" if output == "id" else output,
        scale=tensors.get("out_scale", 1.0),
        shift=tensors.get("out_shift", 0.0),
        metadata={key: str(value) for key, value in tensors.items() if value.dtype.kind == "U"},
    )


def _layers(
    path: Path, tensors: Mapping[str, np.ndarray], weight: str, bias: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases 0, 1, ... as float64; a layer without bias gets zeros."""
    weights: list[np.ndarray] = []
    biases: list[np.ndarray] = []
    while (key := weight.format(len(weights))) in tensors:
        matrix = np.atleast_2d(tensors[key]).astype(np.float64)
        biases.append(tensors.get(bias.format(len(weights)), np.zeros(len(matrix))).astype(np.float64))
        weights.append(matrix)
    if not weights:
        raise PolicyError(f"{path}: no field '{weight.format(0)}', so no perceptron; it holds {', '.join(tensors)}")
    return weights, biases
