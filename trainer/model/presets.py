"""Model shapes: the paper's three (appendix C.1) and `tiny` for one CPU core.

The paper's labels do not add up under any one reading; `Gato.parameter_counts`
gives the true counts, and docs/model.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from schemas.episode import STRICT


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. Widths in numbers, not in bytes."""

    __pydantic_config__ = STRICT

    blocks: int = 4
    heads: int = 4
    width: int = 128
    feed_forward: int = 512
    head_size: int = 32
    feed_forward_form: Literal["gelu", "geglu"] = "gelu"
    """gelu: two matrices, the usual GPT; geglu: three, the paper's."""
    action_position: Literal["shared", "none", "own"] = "shared"
    """One encoding shared by all action tokens, or none: versions of the paper differ. own (ours): each of an
    action's tokens has the one of its index in the timestep, as an observation's tokens have."""
    rotary: Literal["none", "token"] = "none"
    """token (ours): attention knows how many tokens back a key lies, by rotary embedding; none: the paper names no
    such term, and the model has to find the present timestep among the window's by other means."""
    qk_norm: bool = False
    """Queries and keys are scaled to one length before they meet (ours)."""
    sequence: Literal["tokens", "timesteps"] = "tokens"
    """tokens: an element a token (paper). timesteps (ours): an element a timestep, the sum of its observation's
    embedded tokens, each scaled by its place, from which all of an action's tokens are predicted at once, see
    trainer/model/gato.py. Only a prompt's actions are shown, where prompts carry no loss."""
    values: bool = False
    """Beside the bins, a number for each continuous action token, trained by squared error, which play decodes (ours).
    The tokens that are fed back are the bins that hold it."""
    returns: bool = False
    """Each timestep shows the return of its episode, as `schemas.dataset.ReturnScale` scales it, along a learned
    direction; at play the one that is asked for (ours, after Decision Transformer)."""
    text_gates: bool = False
    """What a timestep's text says scales and moves its patches, channel by channel, before they are summed to the
    timestep's element (ours, after FiLM, arXiv 1709.07871)."""
    shared_scales: tuple[str, ...] = ()
    """Domains of one body, such as metaworld: their tasks of one layout share a scale of observations, which a task
    that was not trained on is played with, too. Elsewhere each environment has its own."""
    local_positions: int = 512
    patch_channels: int = 32
    """Channels of the patch ResNet; the paper does not give them."""
    patch_groups: int = 8
    """Groups of its GroupNorm (paper: 32)."""
    patch_norm: Literal["group", "channel"] = "group"
    """group: the paper's GroupNorm; channel (ours): each channel normalised for itself over a patch's places, so that
    a flat patch is embedded as about nothing and what stands out in others is seen."""
    stochastic_depth: float = 0.0
    """Probability of skipping a sub-layer, for each sequence on its own (paper: 0.1)."""
    dropout: float = 0.0
    """Probability of a zero in the outputs of the sub-layers, for each sequence, sub-layer and channel; the same at all
    places of a sequence (paper, fine-tuning: 0.1)."""
    smooth_bins: bool = True
    """Start the embeddings of ordered bins as smooth functions of the value (False: the paper's plain start)."""


def _paper(blocks: int, heads: int, width: int, feed_forward: int, head_size: int) -> ModelConfig:
    return ModelConfig(
        blocks=blocks,
        heads=heads,
        width=width,
        feed_forward=feed_forward,
        head_size=head_size,
        patch_channels=96,
        patch_groups=32,
        stochastic_depth=0.1,
        smooth_bins=False,
    )


PRESETS = {
    "tiny": ModelConfig(action_position="own", rotary="token", patch_norm="channel"),
    "79m": _paper(8, 24, 768, 3072, 32),
    "364m": _paper(12, 12, 1536, 6144, 128),
    "1.18b": _paper(24, 16, 2048, 8192, 128),
}
