"""Gato as an agent (paper §2.4): the form that its model reads, and the prompt that it is given.

model + task + settings + prompt -> make_agent -> TokenAgent | TimestepAgent, a simulators.policy.Policy

Invariant: what an agent sees of an episode is what training saw of a logged one: the same tokenizers, layouts, scales.
"""

from __future__ import annotations

from pathlib import Path

from etl.tokenizers.text import TextTokenizer
from eval.agents.base import GatoAgent
from eval.agents.prompts import (
    AgentConfig,
    Prompt,
    demonstration,
    prompted,
    shipped_prompt,
    shipped_text,
    text_tokenizer,
)
from eval.agents.timesteps import TimestepAgent
from eval.agents.tokens import TokenAgent
from schemas.episode import TaskSpec
from shards.reader import Dataset
from trainer.model import Gato
from trainer.model.export import ExportInfo

__all__ = [
    "AgentConfig",
    "GatoAgent",
    "Prompt",
    "TimestepAgent",
    "TokenAgent",
    "agent_alone",
    "agent_for",
    "demonstration",
    "make_agent",
    "prompted",
]


def make_agent(
    model: Gato,
    info: ExportInfo,
    task: TaskSpec,
    config: AgentConfig,
    prompt: Prompt | None = None,
    text: TextTokenizer | None = None,
) -> GatoAgent:
    """The agent that plays a task by a model, under settings that `AgentConfig.check` let pass. ValueError where
    settings, task and model do not go together."""
    kind = TimestepAgent if model.by_timesteps else TokenAgent
    return kind(model, info, task, config, prompt, text)


def agent_for(model: Gato, info: ExportInfo, dataset: Dataset, task: int, config: AgentConfig) -> GatoAgent:
    """The agent of a dataset's task, prompted and with the text tokenizer of its dataset."""
    spec = dataset.manifest.tasks[task].spec
    config = prompted(config, info, spec)
    return make_agent(model, info, spec, config, demonstration(dataset, task, config, info), text_tokenizer(dataset))


def agent_alone(model: Gato, info: ExportInfo, folder: Path, spec: TaskSpec, config: AgentConfig) -> GatoAgent:
    """The agent of a task without its dataset: the prompt and the text tokenizer are those in the folder of the
    weights. ValueError where one is needed that is not there, CheckpointError where it is damaged."""
    config = prompted(config, info, spec)
    text = shipped_text(folder, info, spec)
    return make_agent(model, info, spec, config, shipped_prompt(folder, info, spec.name, config), text)
