"""The paper's numbers that no other test holds; docs/model.md names the test of every one."""

import pytest
import torch

from schemas.layout import ACTION, PATCH_SIZE, POSITION_BINS, SEPARATOR
from schemas.vocabulary import DISJOINT
from shards.stream import Stream, StreamConfig
from trainer.engine import learning_rate
from trainer.model import PRESETS, Gato, ModelConfig
from trainer.recipes import RECIPES

PAPER = [name for name in RECIPES if name.split("-")[0] in ("79m", "364m", "1.18b") and "table" not in name]
SMALL = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


@pytest.mark.parametrize("name", PAPER)
def test_optimiser_schedule_and_batch(name):
    config = RECIPES[name]
    o = config.optimiser
    assert (o.beta_1, o.beta_2, o.epsilon, o.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (o.schedule, o.peak_lr, o.start_lr, o.warmup_steps, o.decay_steps) == (
        "cosine",
        1e-4,
        1e-7,
        15_000,
        1_000_000,
    )
    assert (config.steps, config.data.global_batch, config.data.stream.sequence_length) == (1_000_000, 512, 1024)
    assert config.model == PRESETS[name.split("-")[0]]
    stream = config.data.stream
    assert (stream.prompt_probability, stream.prompt_end_share) == (0.25, 0.5)
    m = config.model
    assert (m.stochastic_depth, m.local_positions, m.smooth_bins, m.rotary) == (0.1, 512, False, "none")
    assert (m.action_position, m.patch_groups, m.patch_norm) == ("shared", 32, "group")
    assert (config.loss.soft_bins, config.loss.softmax) == (0.0, "vocabulary")


def test_the_learning_rate_at_the_papers_steps():
    o = RECIPES["1.18b"].optimiser
    values = [learning_rate(step, o) for step in (0, 7_500, 15_000, 507_500, 1_000_000, 2_000_000)]
    assert values == pytest.approx([1e-7, (1e-7 + 1e-4) / 2, 1e-4, (1e-4 + 1e-5) / 2, 1e-5, 1e-5])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("79m", (8, 24, 768, 3072, 32)), ("364m", (12, 12, 1536, 6144, 128)), ("1.18b", (24, 16, 2048, 8192, 128))],
)
def test_the_papers_shapes(name, shape):
    config = PRESETS[name]
    assert (config.blocks, config.heads, config.width, config.feed_forward, config.head_size) == shape


def test_pixels_reach_the_stem_between_minus_and_plus_a_quarter():
    patches, seen = Gato(SMALL, DISJOINT).initialise(0).patches, []
    patches.stem.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None, None].expand(3, PATCH_SIZE, PATCH_SIZE, 3)
    patches.each(pixels)
    assert seen[0].shape == (3, 3, PATCH_SIZE, PATCH_SIZE)
    wanted = (2 * pixels[:, 0, 0, 0].float() / 255 - 1) / 16**0.5
    assert torch.allclose(seen[0][:, 0, 0, 0], wanted) and float(seen[0].abs().max()) == pytest.approx(0.25)


def test_patch_positions_have_128_bins_a_side():
    patches = Gato(SMALL, DISJOINT).patches
    assert POSITION_BINS == patches.row.num_embeddings == patches.column.num_embeddings == 128


def test_the_head_is_the_embedding_table_padded_to_a_multiple_of_128():
    model = Gato(SMALL, DISJOINT).initialise(0)
    assert model.tokens.num_embeddings == 34176 and 34176 % 128 == 0 <= 34176 - DISJOINT.size < 128
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = model.logits(hidden)
    assert before.shape == (3, DISJOINT.size)  # padded rows are no ids
    with torch.no_grad():
        model.tokens.weight[33030] += 1.0
    changed = (model.logits(hidden) != before).any(dim=0).nonzero().flatten()
    assert changed.tolist() == [33030]
    assert not [name for name, _ in model.named_parameters() if "head" in name]


@torch.no_grad()
def test_the_separator_is_embedded_and_has_no_position(hopper):
    model = Gato(SMALL, DISJOINT).initialise(0)
    batch = Stream([hopper], StreamConfig(sequence_length=120), 0).batch(0, 2).to("cpu")
    x, places = model.embed(batch), batch.roles == SEPARATOR
    assert bool(places.any()) and bool((batch.tokens[places] == DISJOINT.separator).all())
    assert torch.equal(x[places], model.tokens.weight[DISJOINT.separator].expand_as(x[places]))
    actions = batch.roles == ACTION
    shared = model.positions.weight[SMALL.local_positions]
    assert torch.equal(x[actions], model.tokens(batch.tokens[actions].int()) + shared)
