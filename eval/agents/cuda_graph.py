"""A timestep of the agent as one launch: captured once as a CUDA graph, then replayed on new inputs.

(x, numbers, points) -> copied to where the capture reads them -> its kernels again -> tokens

A timestep of a large model is some thousand small kernels, which a GPU runs faster than a host starts them one by one.
On a CPU there is nothing to capture: the timestep runs again on the same inputs, and everything else is the same code.

Invariant: a replay runs on the memory of its capture, so inputs keep their shapes and the agent keeps its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.model import Gato
from trainer.model.gato import Blocks
from trainer.model.transformer import Cache

VARIANTS = 256  # shapes that blocks are compiled for, two for a task and number of environments; beyond, they run plain
WARM_UPS = 3  # libraries choose kernels and take workspaces in the first calls, which a capture may not


def compiled(model: Gato) -> Blocks:
    """The model's blocks with their kernels merged; the model itself stays as it is. On a GPU kernels are tried in
    several shapes: products of a matrix and one vector, most of a timestep, depend on it."""
    torch._dynamo.config.recompile_limit = VARIANTS
    options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if model.tokens.weight.is_cuda else None
    return [torch.compile(block, dynamic=False, options=options) for block in model.blocks]


class Replay:
    """`timestep` of inputs shaped like these. It reads and writes `cache`, and may be run several times for the same
    token numbers: it writes the same slots."""

    def __init__(self, timestep: Callable[..., Tensor], inputs: tuple[Tensor, ...], cache: Cache):
        self.timestep, self.cache, self.inputs = timestep, cache, tuple(given.clone() for given in inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        if inputs[0].is_cuda:
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.timestep(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.timestep(*self.inputs)

    def fits(self, inputs: tuple[Tensor, ...]) -> bool:
        return all(mine.shape == given.shape for mine, given in zip(self.inputs, inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        if self.graph is None:
            return self.timestep(*self.inputs)
        self.graph.replay()
        return self.output.clone()
