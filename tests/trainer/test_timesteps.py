"""An element a timestep: against a plain form, timestep by timestep; what is seen, and what is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from etl.tokenizers import continuous
from eval.agents import AgentConfig, demonstration, make_agent
from schemas.layout import ACTION, OBSERVATION, PAD, SEPARATOR, TEXT
from schemas.vocabulary import DISJOINT, bin_centres
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from tests.shards.made import Task, make
from trainer.checkpoint import CheckpointError
from trainer.config import OptimiserConfig
from trainer.loss import LossConfig, Objective, cross_entropy, select, soft_targets, strided_cross_entropy, targets_of
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo, load_export, save_export
from trainer.model.gato import timestep_slots
from trainer.model.transformer import causal_segment_mask
from trainer.optimiser import make_optimiser
from trainer.scales import observation_scales

SMALL = ModelConfig(
    blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16, rotary="token", sequence="timesteps",
    values=True, returns=True,
)  # fmt: skip
LENGTH = 90  # that no timestep of Hopper's 15 or Pong's 22 tokens need end at


@pytest.fixture(scope="module")
def stream(hopper, pong):
    config = StreamConfig(sequence_length=LENGTH, mixture_block=8, prompt_probability=0.7, prompt_loss=False)
    return Stream([hopper, pong], config, seed=3)


@pytest.fixture(scope="module")
def model(stream):
    model = Gato(SMALL, DISJOINT).initialise(0).eval()
    model.standardise(observation_scales(stream, 64))
    model.outputs.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def exported(dataset, stream):
    """The task of a dataset, and what an export of a run on the stream says."""
    spec, vocabulary = dataset.manifest.tasks[0].spec, dataset.manifest.vocabulary
    return spec, ExportInfo(
        "gato.model", 3, SMALL, vocabulary, vocabulary.fingerprint, LENGTH, 0, (spec,), {}, TrainingInfo(),
        observations=observation_scales(stream, 64), returns=stream.return_scales,
    )  # fmt: skip


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


def test_tasks_of_a_domain_that_is_one_body_share_a_scale_and_give_it_to_unseen_ones(tmp_path):
    # the 33rd episode's tokens are observations
    tasks = [Task("reach", (5,) * 33), Task("push", (20,) * 33), Task("hop", (5,) * 33, observation=5)]
    unseen, maze = Task("pull", (9,)), Task("maze", (9,), observation=0, patches=(1, 1))
    folder = make(tmp_path / "made", [*tasks, unseen, maze])
    config = StreamConfig(sequence_length=60, mixture_block=8, excluded_tasks=("pull", "maze"))
    stream = Stream([folder], config, seed=0)
    own, shared = observation_scales(stream, 96), observation_scales(stream, 96, shared=("made",))
    assert own["reach"] != own["push"] and own["hop"] == shared["hop"]
    assert shared["reach"] == shared["push"] != own["push"]

    def info(shares):
        specs = tuple(timeline.spec for timeline in stream.timelines)
        model = replace(SMALL, shared_scales=shares)
        return ExportInfo("gato.model", 3, model, DISJOINT, DISJOINT.fingerprint, 60, 0, specs, {}, TrainingInfo(),
                          observations=shared, returns={})  # fmt: skip

    model = Gato(SMALL, DISJOINT).initialise(0)
    agent = make_agent(model, info(("made",)), unseen.spec, AgentConfig())
    assert torch.equal(agent.spread[:3], model.spread_of(shared["push"])[:3])
    with pytest.raises(ValueError, match="'pull': this model has no scale of its observations"):
        make_agent(model, info(()), unseen.spec, AgentConfig())
    assert make_agent(model, info(()), maze.spec, AgentConfig()).spread.unique(dim=0).tolist() == [[0.0, 0.0]]


def gate_patches(model, batch, tokens):
    """In `tokens` (B, L, W), one patch after the other: what the texts of its timestep make of it."""
    for place in batch.patch_index.tolist():
        row, place = divmod(place, LENGTH)
        begins = [at for at in range(LENGTH) if batch.positions[row, at] == 0 and batch.roles[row, at] != PAD]
        first = max(at for at in begins if at <= place)
        stop = min([at for at in begins if at > place], default=LENGTH)
        texts = torch.zeros(model.config.width)
        for at in range(first, stop):
            if batch.roles[row, at] == TEXT:
                index = batch.positions[row, at].long()
                texts = texts + tokens[row, at] * model.scales.weight[index] + model.positions.weight[index]
        scale, move = model.gates(texts).chunk(2)
        tokens[row, place] += F.gelu(tokens[row, place] * scale + move)


def plain(model, batch):
    """Hidden states of the targets, each sequence, timestep and target by itself."""
    found, tokens = [], model.tokens(batch.tokens.int())
    patches = model.patches(batch.patches, batch.patch_positions)
    for n, place in enumerate(batch.patch_index.tolist()):
        tokens[place // LENGTH, place % LENGTH] = patches[n]
    if model.config.text_gates:
        gate_patches(model, batch, tokens)
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
                    factor, move = model.spreads[batch.tasks[row], index]
                    a_value = 32000 <= batch.tokens[row, place] < 33024 and factor != 0
                    share = 0.1 if a_value else 1.0
                    total = total + tokens[row, place] * share * scale + position
                    if a_value:
                        token = batch.tokens[row, place].numpy().astype(np.uint16)
                        value = continuous.decode_observation(token, DISJOINT)
                        total = total + (float(value) * factor + move).clamp(-10, 10) * model.slopes.weight[index]
            separator = model.vocabulary.separator in batch.tokens[row, first:stop]
            elements.append(total + separator * batch.returns[row, batch.segments[row, first]] * model.asked.weight[0])
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


@pytest.fixture
def missions(tmp_path):
    """Pictures with a text and with none, and a model whose texts gate them."""
    tasks = [Task("mission", (9, 30), text=4, patches=(2, 2), action=1, observation=0),
             Task("game", (9, 30), patches=(2, 2), action=1), Task("body", (30,))]  # fmt: skip
    folder = make(tmp_path / "made", tasks)
    config = StreamConfig(sequence_length=LENGTH, mixture_block=8, prompt_probability=0.0, text_loss=False)
    stream = Stream([folder], config, seed=0)
    model = Gato(replace(SMALL, text_gates=True), DISJOINT).initialise(0).eval()
    model.standardise(observation_scales(stream, 64))
    return folder, stream, model


@torch.no_grad()
def test_texts_gate_the_patches_of_their_own_timestep(missions):
    _, stream, model = missions
    batch = stream.batch(0, 8).to("cpu")
    assert len(set(batch.tasks.tolist())) == 3
    hidden = select(model, batch)[0]
    torch.testing.assert_close(hidden, plain(model, batch), atol=1e-5, rtol=1e-4)
    model.gates[1].weight.zero_()
    assert (select(model, batch)[0] - hidden).abs().max() > 1e-3


@torch.no_grad()
def test_an_agent_gates_patches_as_training_does(missions):
    folder, stream, model = missions
    dataset = Dataset(folder)
    spec = dataset.manifest.tasks[0].spec
    info = replace(exported(dataset, stream)[1], model=model.config, tasks=(spec,))
    agent = make_agent(model, info, spec, AgentConfig(), text=object())  # only whether there is one is asked
    agent.asked = None
    batch = stream.batch(0, 8).to("cpu")
    row = batch.tasks.tolist().index(stream.tasks.index(spec.name))
    first = int(torch.nonzero(batch.positions[row] == 0)[0])
    columns = slice(first, first + agent.layout.length - agent.layout.action)
    inside = [columns.start <= place - row * LENGTH < columns.stop for place in batch.patch_index.tolist()]
    pixels = batch.patches[torch.tensor(inside)].numpy().reshape(1, *agent.layout.patch_shape)
    batch.patch_positions[torch.tensor(inside)] = agent.patch_centres.to(batch.patch_positions.dtype)
    elements = model.embed(replace(batch, returns=torch.zeros_like(batch.returns)), slots=timestep_slots(batch))
    seen = agent._elements(batch.tokens[row, columns].long()[None], pixels)[0]
    torch.testing.assert_close(seen, elements[row, columns].sum(dim=0), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_discrete_observations_are_no_values_in_training_and_at_play(tmp_path):
    """Their ids may be those of continuous values. FrozenLake and Taxi were learned, and played at random."""
    tasks = [Task("cell", (30, 9), observation=1, choices=16, action=1), Task("body", (30,), action=1),
             Task("facing", (30, 9), observation=1, choices=4, patches=(2, 2), action=1)]  # fmt: skip
    folder = make(tmp_path / "made", [*tasks, replace(tasks[0], name="unseen")])
    config = StreamConfig(sequence_length=LENGTH, mixture_block=8, prompt_probability=0.0, excluded_tasks=("unseen",))
    stream, dataset = Stream([folder], config, seed=0), Dataset(folder)
    model = Gato(SMALL, DISJOINT).initialise(0).eval()
    scales = observation_scales(stream, 64)
    model.standardise(scales)
    info = replace(exported(dataset, stream)[1], observations=scales)
    info = replace(info, tasks=tuple(one.spec for one in dataset.manifest.tasks if one.spec.name != "unseen"))
    for one in dataset.manifest.tasks:
        agent = make_agent(model, info, one.spec, AgentConfig())
        trained = stream.tasks.index("cell" if one.spec.name == "unseen" else one.spec.name)
        assert torch.equal(agent.spread, model.spreads[trained, agent.positions.long()])
    assert scales["cell"].std[0] == scales["facing"].std[4] == 0.0 < scales["body"].std[0]
    batch = stream.batch(0, 8).to("cpu")
    batch.tokens[batch.roles == OBSERVATION] = 32001 + batch.tokens[batch.roles == OBSERVATION] % 4
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
    objective = Objective(model, LossConfig(soft_bins=8.0, softmax="targets"), targets_of(stream))
    assert targets_of(stream).ordered == tuple("hopper" in name for name in stream.tasks)
    objective(stream.batch(0, 8).to("cpu")).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("prompt", ["none", "end"])
def test_play_is_training(hopper, stream, model, prompt):
    """An agent's logits and values are those of a training sequence of the same timesteps, prompt, return and all."""
    dataset = Dataset(hopper)
    spec, info = exported(dataset, stream)
    options = AgentConfig(prompt=prompt, decoding="greedy", prompt_share=0.34)
    agent = make_agent(model, info, spec, options, demonstration(dataset, 0, options, info))
    valued = make_agent(model, info, spec, replace(options, decoding="value"), agent.prompt)
    config = StreamConfig(sequence_length=LENGTH, prompt_probability=0.0)
    batch = Stream([hopper], config, seed=0).batch(0, 1)
    batch.tasks[:] = stream.tasks.index(spec.name)
    scale = info.returns[spec.name]
    batch.returns[:] = (scale.target - scale.mean) / scale.std
    steps, shown = LENGTH // 15, 0 if agent.prompt is None else 2
    stored = agent.tokenizer.layout.stored_columns
    grid = batch.tokens[0].reshape(steps, 15)
    batch.segments[:] = 0
    if agent.prompt is not None:
        grid[:shown, stored] = agent.prompt.tokens[-shown:]
        batch.supervised[0, : shown * 15] = False
    with torch.no_grad():
        hidden, _, positions, _ = select(model, batch.seal().to("cpu"))
        decoded = model.values_at(hidden, positions).view(steps - shown, 3)
        logits = model.logits(hidden.view(steps - shown, 3, -1))[..., agent.ids[0].start : agent.ids[0].stop]
    assert decoded.std() > 0.1
    for at in range(steps - shown):
        values = agent.tokenizer.decode_observation(grid[shown + at : shown + at + 1, stored[:11]].astype(np.uint16))
        if at == 0:
            agent.reset(1)
            valued.reset(1)
        found = []
        agent._choose = lambda given, points, found=found: (found.append(given), given.argmax(dim=1))[1]
        agent.act(values, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))
        torch.testing.assert_close(torch.cat(found), logits[at], atol=1e-5, rtol=1e-4)
        action = valued.act(values, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))
        # of the bin that holds it
        np.testing.assert_allclose(action[0], decoded[at].clamp(-1, 1), atol=1 / 1024 + 1e-4)


def test_a_prompt_leaves_room_for_the_present_in_the_window(hopper, stream, model):
    dataset = Dataset(hopper)
    spec, info = exported(dataset, stream)
    options = AgentConfig(prompt="end", prompt_share=1.0)
    agent = make_agent(model, info, spec, options, demonstration(dataset, 0, options, info))
    agent.reset(1)
    for _ in range(3):
        agent.act({"observation": np.zeros((1, 11))}, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))
        assert agent.kept.shape[1] + agent.shown.shape[1] == agent.window


def test_an_episode_is_played_alike_alone_and_among_others(hopper, stream, model):
    dataset = Dataset(hopper)
    spec, info = exported(dataset, stream)
    options = AgentConfig(prompt="end")
    rng = np.random.default_rng(0)
    seen = [{"observation": rng.normal(size=(5, 11)).astype(np.float32)} for _ in range(9)]

    def played(rows):
        agent = make_agent(model, info, spec, options, demonstration(dataset, 0, options, info))
        agent.reset(len(rows))
        active = np.ones(len(rows), bool)
        return [agent.act({"observation": o["observation"][rows]}, np.zeros(len(rows)), active, rng) for o in seen]

    together, alone = played(np.arange(5)), played(np.array([3]))
    assert all(np.array_equal(a[[3]], b) for a, b in zip(together, alone))
    with pytest.raises(ValueError, match="--agent.launch graph"):
        make_agent(model, info, spec, AgentConfig(launch="graph"))


def test_what_is_asked_for_decides_what_is_played(hopper, stream, model):
    dataset = Dataset(hopper)
    spec, info = exported(dataset, stream)
    seen = {"observation": np.zeros((1, 11), np.float32)}

    def played(asked):
        agent = make_agent(model, info, spec, AgentConfig(asked_return=asked))
        agent.reset(1)
        return agent.act(seen, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))

    scale = info.returns[spec.name]
    assert np.array_equal(played(None), played(scale.target))
    assert not np.array_equal(played(None), played(scale.target - 3 * scale.std))


def test_a_task_is_scaled_as_others_of_its_environment_or_refused(hopper, stream, model):
    dataset = Dataset(hopper)
    spec, info = exported(dataset, stream)
    other = replace(spec, name="hopper-other")
    ours, theirs = (make_agent(model, info, task, AgentConfig()) for task in (spec, other))
    assert torch.equal(ours.spread, theirs.spread) and torch.equal(ours.asked, theirs.asked)
    with pytest.raises(ValueError, match="no scale of its observations"):
        make_agent(model, info, replace(other, environment=None), AgentConfig())


def test_the_objective_is_its_parts(stream, model):
    """Cross-entropy of ordered bins, weighted squared error of their centres, weighted cross-entropy of the rest."""
    config = LossConfig(soft_bins=8.0, softmax="targets", squared=50.0, discrete=3.0)
    batch = stream.batch(0, 8).to("cpu")
    with torch.no_grad():
        hidden, targets, positions, tasks = select(model, batch)
        body = torch.tensor([("hopper" in name) for name in stream.tasks])[tasks]
        assert body.any() and not body.all()
        ids = model.vocabulary.action_continuous
        centre = torch.as_tensor(bin_centres(1024))[(targets - ids.start).clamp(0, 1023)]
        squared = ((model.values_at(hidden, positions) - centre) ** 2)[body].sum()
        neighbours, weights = soft_targets(targets, body, ids, 8.0)
        logits = hidden @ model.tokens.weight[33024:34048].T
        losses = cross_entropy(logits, neighbours - 33024, weights)
        expected = losses[body].sum() + 50 * squared + 3 * losses[~body].sum()
        for chunk in (0, 64):
            found = Objective(model, replace(config, chunk=chunk), targets_of(stream))(batch)
            assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_an_export_keeps_its_scales(hopper, stream, model, tmp_path):
    spec, info = exported(Dataset(hopper), stream)
    save_export(tmp_path / "now", dict(model.state_dict()), info)
    again, read = load_export(tmp_path / "now")
    assert (read.observations, read.returns) == (info.observations, info.returns)
    before, after = make_agent(model, info, spec, AgentConfig()), make_agent(again, read, spec, AgentConfig())
    assert torch.equal(before.spread, after.spread) and torch.equal(before.asked, after.asked)
    save_export(tmp_path / "older", dict(model.state_dict()), replace(info, version=2))
    with pytest.raises(CheckpointError, match="train again"):
        load_export(tmp_path / "older")


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
        model.standardise(observation_scales(stream, 64))
        objective = Objective(model, LossConfig(soft_bins=24.0, softmax="targets", stride=stride), targets_of(stream))
        whole = Objective(model, LossConfig(soft_bins=24.0, softmax="targets"), targets_of(stream))
        optimiser = make_optimiser(model, OptimiserConfig(matrices="muon", bins="smooth", peak_lr=5e-3, start_lr=5e-3))
        for step in range(30):
            batch = stream.batch(8 * step, 8).to("cpu")
            (objective(batch) / len(batch.predict_index)).backward()
            optimiser.step()
            optimiser.zero_grad()
        losses[stride] = [whole(stream.batch(first, 16).to("cpu")).item() for first in (0, 400)]
    assert losses[8] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("sequence", ["timesteps", "tokens"])
def test_leaving_out_text_rows_changes_no_gradient(stream, sequence):
    model = Gato(replace(SMALL, sequence=sequence), DISJOINT).initialise(0)
    if sequence == "timesteps":
        model.standardise(observation_scales(stream, 64))
    objective = Objective(model, LossConfig(soft_bins=8.0, softmax="targets"), targets_of(stream))
    found = []
    for first in (objective.first, 0):
        objective.first = first
        model.zero_grad()
        loss = objective(stream.batch(0, 8).to("cpu"))
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert first == 0 < DISJOINT.text.stop and all(map(torch.equal, *found))


def test_an_instruction_is_shown_and_predicted_only_if_asked_for(tmp_path):
    folder = make(tmp_path / "made", [Task("fetch", (40, 30, 20), text=3), Task("book", (9, 9), action=0, text=6)])
    config = StreamConfig(sequence_length=45, mixture_block=8, prompt_probability=0.0)
    paper, stream = (Stream([folder], replace(config, text_loss=loss), seed=0) for loss in (True, False))
    assert paper.fingerprint != stream.fingerprint
    before, batch = paper.batch(0, 16).to("cpu"), stream.batch(0, 16).to("cpu")
    acting = (batch.tasks == stream.tasks.index("fetch"))[:, None]
    assert torch.equal(before.tokens, batch.tokens)
    assert torch.equal(batch.supervised, before.supervised & ~(acting & (before.roles == TEXT)))
    assert (before.supervised & acting & (before.roles == TEXT)).any() and (batch.supervised & ~acting).any()

    alone = Stream([folder], replace(config, text_loss=False, tasks=("fetch",)), seed=0)
    model = Gato(SMALL, DISJOINT).initialise(0)
    model.standardise(observation_scales(alone, 64))
    asked = targets_of(alone)
    assert (asked.text, asked.text_shown) == (False, True)
    batch = alone.batch(0, 8).to("cpu")
    batch.tokens[batch.roles == ACTION] = DISJOINT.action_continuous.start  # which the made ones are not
    Objective(model, LossConfig(soft_bins=8.0, softmax="targets"), asked)(batch).backward()
    words = batch.tokens[batch.roles == TEXT].unique().long()
    assert (model.tokens.weight.grad[words].abs().sum(dim=1) > 0).all()  # what is read is learned
