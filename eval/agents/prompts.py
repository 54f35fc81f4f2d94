"""How an agent plays: the settings of its decoding, and the demonstration that it is prompted with (paper §2.4).

    AgentConfig -> prompted, for a task -> demonstration -> Prompt: timesteps that the window begins with
    without the task's data: shipped_prompt and shipped_text, from the folder of the weights

Invariant: a prompt is of the training episode with the highest return, never of one that is held out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file

from etl.tokenizers.text import TextTokenizer
from schemas.dataset import TEXT_MODEL_NAME
from schemas.episode import TaskSpec
from schemas.ranges import require
from schemas.task import STRICT
from shards.reader import Dataset
from trainer.model.export import PROMPTS, ExportInfo, intact

GIVE = "give the task's dataset (--datasets FOLDER; in Python dataset=FOLDER)"


@dataclass(frozen=True)
class AgentConfig:
    """How actions are decoded."""

    __pydantic_config__ = STRICT

    decoding: Literal["auto", "sample", "greedy", "mean", "value"] = "auto"
    """sample from the restricted softmax; greedy; mean of bins or value (continuous actions only), the number that a
    model with values learned; auto: value, and greedy for discrete actions, for a model with values; else mean, and
    sample for discrete actions."""
    temperature: float = 1.0
    asked_return: float | None = None
    """The episode's return that a model with returns is asked for; by default the upper quartile of the task's data."""
    prompt: Literal["auto", "end", "start", "none"] = "auto"
    """A demonstration's last timesteps, as half of the prompts in training; its first, as the paper has it (§2.4);
    none; or auto: none, but the last ones where several of the model's tasks share an environment and only a prompt
    tells which is meant (no return does). docs/ablations.md has what each gives."""
    prompt_share: float = 0.5
    """Share of the window that starts out filled with the prompt."""
    window: Literal["rolling", "exact"] = "rolling"
    batch_invariant: bool = True
    """On a CPU, matrix products of fewer than 4 rows are made of 4: libraries have other kernels for those, with other
    last bits, and an episode would depend on how many still run. Costs speed where few environments are played."""
    launch: Literal["auto", "plain", "graph", "compiled"] = "auto"
    """How a timestep is started: kernel by kernel; as a CUDA graph, whose actions are the same; as one of kernels that
    torch.compile merged, faster and rounded otherwise; or auto: graph on a GPU with the rolling window, else plain."""

    def check(self) -> None:
        """ValueError for a number out of its range, and for settings that do not go together."""
        require("agent.temperature", self.temperature, 1e-6, 1e6)
        require("agent.prompt-share", self.prompt_share, 0, 1)
        if self.asked_return is not None:
            require("agent.asked-return", self.asked_return, -1e38, 1e38)
        if self.launch in ("graph", "compiled") and self.window == "exact":
            raise ValueError(f"--agent.launch {self.launch}: needs --agent.window rolling; use plain with exact")


@dataclass(frozen=True)
class Prompt:
    """Timesteps of a demonstration: tokens (T, stored) uint16, patches (T, *patch_shape) uint8 or None."""

    tokens: np.ndarray
    patches: np.ndarray | None


def text_tokenizer(dataset: Dataset) -> TextTokenizer | None:
    """The tokenizer of the dataset's own text model; None where it holds no text."""
    model = dataset.text_model()
    return None if model is None else TextTokenizer(model, dataset.manifest.vocabulary)


def prompted(config: AgentConfig, info: ExportInfo, task: TaskSpec) -> AgentConfig:
    """The configuration with its prompt decided for a task."""
    if config.prompt != "auto":
        return config
    shared = any(other.name != task.name and other.environment == task.environment for other in info.tasks)
    return replace(config, prompt="end" if shared and not info.model.returns else "none")


def shipped_prompt(folder: Path, info: ExportInfo, task: str, config: AgentConfig) -> Prompt | None:
    """A task's prompt from the folder of the weights; None where none is wanted. ValueError where none was shipped."""
    if config.prompt == "none":
        return None
    found = load_file(intact(folder / PROMPTS, info.prompts_sha256)) if info.prompts_sha256 else {}
    key = f"{task}/{config.prompt}"
    if f"{key}/tokens" not in found:
        raise ValueError(f"{folder}: task '{task}' needs a prompt, and none was shipped with these weights; {GIVE}, or "
                         "play without (prompt 'none')")  # fmt: skip
    return Prompt(found[f"{key}/tokens"], found.get(f"{key}/patches"))


def shipped_text(folder: Path, info: ExportInfo, task: TaskSpec) -> TextTokenizer | None:
    """The text tokenizer from the folder of the weights; None for a task without text. ValueError where none is
    there."""
    if all(field.kind != "text" for field in task.observation):
        return None
    if not info.text_sha256:
        raise ValueError(f"{folder}: task '{task.name}' reads text, and the tokenizer is not with these weights, which "
                         f"are from before 2026-11-29; {GIVE}")  # fmt: skip
    return TextTokenizer(intact(folder / TEXT_MODEL_NAME, info.text_sha256), info.vocabulary)


def best_demonstration(dataset: Dataset, task: int, prompt: Literal["auto", "end", "start"], context: int) -> Prompt:
    """The last or first timesteps of the training episode with the highest return, as many as `context` tokens hold."""
    timesteps = max(1, context // dataset.layouts[task].length)
    rows = dataset.rows(task, held_out=False)
    returns, episodes = (dataset.column(name)[rows] for name in ("episode_return", "episode"))
    rows = rows[episodes == episodes[np.argmax(returns)]]  # its pieces, in order
    start, steps, whole = (dataset.column(name)[rows] for name in ("start", "timesteps", "episode_timesteps"))
    rows = rows[start < timesteps if prompt == "start" else start + steps > whole - timesteps]
    shown = slice(timesteps) if prompt == "start" else slice(-timesteps, None)
    members = [dataset.tokens, dataset.patches] if dataset.layouts[task].patches else [dataset.tokens]
    tokens, *patches = (np.concatenate([member(int(row)) for row in rows])[shown] for member in members)
    return Prompt(tokens, patches[0] if patches else None)


def demonstration(dataset: Dataset, task: int, config: AgentConfig, info: ExportInfo) -> Prompt | None:
    """The prompt of an agent of this configuration; None without one."""
    return None if config.prompt == "none" else best_demonstration(dataset, task, config.prompt, info.sequence_length)
