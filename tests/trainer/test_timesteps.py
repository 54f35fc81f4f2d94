"""An element a timestep: against a plain form, timestep by timestep; what is seen, and what is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from etl.tokenizers import continuous
from eval.agent import AgentConfig, GatoAgent, demonstration
from schemas.layout import ACTION, OBSERVATION, SEPARATOR
from schemas.vocabulary import DISJOINT
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from trainer.checkpoint import ExportInfo, TrainingInfo
from trainer.config import OptimiserConfig
from trainer.loss import LossConfig, Objective, select, strided_cross_entropy
from trainer.model import Gato, ModelConfig
from trainer.model.transformer import causal_segment_mask
from trainer.optimiser import make_optimiser
from trainer.scales import observation_scales

SMALL = ModelConfig(
    blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16, rotary="token", sequence="timesteps"
)
LENGTH = 90  # that no timestep of Hopper's 15 or Pong's 22 tokens need end at


@pytest.fixture(scope="module")
def stream(hopper, pong):
    config = StreamConfig(sequence_length=LENGTH, mixture_block=8, prompt_probability=0.7, prompt_loss=False)
    return Stream([hopper, pong], config, seed=3)


@pytest.fixture(scope="module")
def model(stream):
    model = Gato(SMALL, DISJOINT).initialise(0).eval()
    model.standardise(observation_scales(stream, 64))
    return model


@torch.no_grad()
def test_values_are_standardised_column_by_column(stream, model):
    batch, task = stream.batch(0, 64).to("cpu"), next(n for n, name in enumerate(stream.tasks) if "hopper" in name)
    values = continuous.decode_observation(batch.tokens.numpy().clip(32000, 33023).astype(np.uint16), DISJOINT)
    for place in range(11):
        at = ((batch.positions == place) & (batch.roles == OBSERVATION)).numpy()
        factor, move = model.spreads[task, place].tolist()
        shown = values[at] * factor + move
        assert abs(shown.mean()) < 1e-3 and shown.std() == pytest.approx(1, abs=1e-3)
    assert model.spreads[1 - task].unique(dim=0).tolist() == [[1.0, 0.0]]  # pictures have no such column


def plain(model, batch):
    """Hidden states of the targets, each sequence, timestep and target by itself."""
    found, tokens = [], model.tokens(batch.tokens.int())
    patches = model.patches(batch.patches, batch.patch_positions)
    for n, place in enumerate(batch.patch_index.tolist()):
        tokens[place // LENGTH, place % LENGTH] = patches[n]
    for row in range(len(tokens)):
        begins = torch.nonzero(batch.positions[row] == 0).flatten().tolist()
        elements = []
        for first, stop in zip(begins, [*begins[1:], LENGTH]):
            total = torch.zeros(model.config.width)
            for place in range(first, stop):
                role, index = batch.roles[row, place], batch.positions[row, place].long()
                hidden = role == SEPARATOR or (role == ACTION and batch.supervised[row, place])
                if not hidden:
                    scale, position = model.scales.weight[index], model.positions.weight[index]
                    share = 0.1 if 32000 <= batch.tokens[row, place] < 33024 else 1.0
                    total = total + tokens[row, place] * share * scale + position
                    if 32000 <= batch.tokens[row, place] < 33024:
                        token = batch.tokens[row, place].numpy().astype(np.uint16)
                        value = continuous.decode_observation(token, DISJOINT)
                        factor, move = model.spreads[batch.tasks[row], index]
                        total = total + (float(value) * factor + move).clamp(-10, 10) * model.slopes.weight[index]
            elements.append(total)
        mask = causal_segment_mask(batch.segments[row, begins][None])
        rope = model.rope(torch.arange(len(begins)))
        x = torch.stack(elements)[None]
        for block in model.blocks:
            x = block(x, mask, rope=rope)
        for place in torch.nonzero(batch.supervised[row]).flatten().tolist():
            own = model.norm(x)[0, sum(first <= place for first in begins) - 1]
            found.append(own * model.scales.weight[batch.positions[row, place].long()])
    return torch.stack(found)


@torch.no_grad()
def test_hidden_states_are_those_of_the_plain_form(stream, model):
    for first in (0, 8):
        batch = stream.batch(first, 8).to("cpu")
        assert batch.packed or first
        torch.testing.assert_close(select(model, batch)[0], plain(model, batch), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_target_is_never_shown_and_a_prompts_action_is(stream, model):
    batch = stream.batch(0, 8).to("cpu")
    before, changes = select(model, batch)[0], {True: 0.0, False: 0.0}
    for row in range(len(batch.tokens)):
        for place in torch.nonzero(batch.roles[row] == ACTION).flatten().tolist()[:4]:
            tokens = batch.tokens.clone()
            tokens[row, place] = 33024 + (tokens[row, place] - 33024 + 511) % 1024
            change = float((select(model, replace(batch, tokens=tokens))[0] - before).abs().max())
            target = bool(batch.supervised[row, place])
            changes[target] = max(changes[target], change)
    assert changes[True] == 0 < changes[False]


def test_every_parameter_but_the_unused_learns(stream, model):
    objective = Objective(model, LossConfig(soft_bins=8.0, softmax="targets"), [True, False], text=False)
    objective(stream.batch(0, 8).to("cpu")).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("prompt", ["none", "end"])
def test_play_is_training(hopper, model, prompt):
    """An agent's logits are those of a training sequence of the same timesteps, prompt and all."""
    dataset = Dataset(hopper)
    spec, vocabulary = dataset.manifest.tasks[0].spec, dataset.manifest.vocabulary
    fingerprint, scales = vocabulary.fingerprint, observation_scales(Stream([hopper], StreamConfig(LENGTH), 0), 64)
    model.standardise(scales)
    info = ExportInfo(
        "gato.model", 1, SMALL, vocabulary, fingerprint, LENGTH, 0, (spec,), {}, TrainingInfo(), observations=scales
    )
    options = AgentConfig(prompt=prompt, decoding="greedy", prompt_share=0.34)
    agent = GatoAgent(model, info, spec, options, demonstration(dataset, 0, options))
    config = StreamConfig(sequence_length=LENGTH, prompt_probability=0.0)
    stream = Stream([hopper], config, seed=0)
    batch = stream.batch(0, 1)
    steps, shown = LENGTH // 15, 0 if agent.prompt is None else 2
    stored = agent.tokenizer.layout.stored_columns
    grid = batch.tokens[0].reshape(steps, 15)
    batch.segments[:] = 0
    if agent.prompt is not None:
        grid[:shown, stored] = agent.prompt.tokens[-shown:]
        batch.supervised[0, : shown * 15] = False
    with torch.no_grad():
        hidden = select(model, batch.seal().to("cpu"))[0].view(steps - shown, 3, -1)
        logits = model.logits(hidden)[..., agent.ids[0].start : agent.ids[0].stop]
    for at in range(steps - shown):
        values = agent.tokenizer.decode_observation(grid[shown + at : shown + at + 1, stored[:11]].astype(np.uint16))
        if at == 0:
            agent.reset(1)
        found = []
        agent._choose = lambda given, points, found=found: (found.append(given), given.argmax(dim=1))[1]
        agent.act(values, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))
        torch.testing.assert_close(torch.cat(found), logits[at], atol=1e-5, rtol=1e-4)


def test_an_episode_is_played_alike_alone_and_among_others(hopper, model):
    dataset = Dataset(hopper)
    spec, vocabulary = dataset.manifest.tasks[0].spec, dataset.manifest.vocabulary
    fingerprint, scales = vocabulary.fingerprint, observation_scales(Stream([hopper], StreamConfig(LENGTH), 0), 64)
    model.standardise(scales)
    info = ExportInfo(
        "gato.model", 1, SMALL, vocabulary, fingerprint, LENGTH, 0, (spec,), {}, TrainingInfo(), observations=scales
    )
    options = AgentConfig(prompt="end")
    rng = np.random.default_rng(0)
    seen = [{"observation": rng.normal(size=(5, 11)).astype(np.float32)} for _ in range(9)]

    def played(rows):
        agent = GatoAgent(model, info, spec, options, demonstration(dataset, 0, options))
        agent.reset(len(rows))
        active = np.ones(len(rows), bool)
        return [agent.act({"observation": o["observation"][rows]}, np.zeros(len(rows)), active, rng) for o in seen]

    together, alone = played(np.arange(5)), played(np.array([3]))
    assert all(np.array_equal(a[[3]], b) for a, b in zip(together, alone))
    with pytest.raises(ValueError, match="--agent.launch graph"):
        GatoAgent(model, info, spec, AgentConfig(launch="graph"))


def test_a_strided_loss_has_the_minimum_of_the_whole_one():
    """Logits of a Gaussian are best for every first bin, and discrete actions are scored as ever."""
    centre, spread = torch.tensor([[100.0], [512.3], [1000.0]]), 24.0
    bins = torch.arange(1024.0)
    logits = -0.5 * ((bins - centre) / spread) ** 2
    for first in range(8):
        given = logits.clone().requires_grad_()
        # rows of a unit matrix, so that the hidden states are the logits
        strided_cross_entropy(given, torch.eye(1024), centre[:, 0], first, 8, spread).backward()
        assert given.grad.abs().max() < 1e-6


def test_a_strided_loss_learns_what_the_whole_one_does(stream):
    losses = {}
    for stride in (1, 8):
        torch.manual_seed(0)
        model = Gato(SMALL, DISJOINT).initialise(0)
        objective = Objective(model, LossConfig(soft_bins=24.0, softmax="targets", stride=stride), [True, False], False)
        whole = Objective(model, LossConfig(soft_bins=24.0, softmax="targets"), [True, False], False)
        optimiser = make_optimiser(model, OptimiserConfig(matrices="muon", bins="smooth", peak_lr=5e-3, start_lr=5e-3))
        for step in range(30):
            batch = stream.batch(8 * step, 8).to("cpu")
            (objective(batch) / len(batch.predict_index)).backward()
            optimiser.step()
            optimiser.zero_grad()
        losses[stride] = [whole(stream.batch(first, 16).to("cpu")).item() for first in (0, 400)]
    assert losses[8] == pytest.approx(losses[1], rel=0.02)
