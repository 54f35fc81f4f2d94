"""True sizes, no leak, masks, packing, cache: the model against slower forms of itself."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from schemas.layout import ACTION
from schemas.vocabulary import DISJOINT
from shards.batch import Batch
from shards.stream import Stream, StreamConfig
from trainer.engine import branch_scales, prepare_blocks
from trainer.loss import FusedCrossEntropy, LossConfig, Objective, Targets, cross_entropy, select, soft_targets
from trainer.model import PRESETS, Gato, ModelConfig, transformer
from trainer.model import gato as gato_module
from trainer.model.patch import MULTIPLIER, PatchEmbedding, different_rows
from trainer.model.transformer import causal_segment_mask

SMALL = ModelConfig(blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


@pytest.fixture(scope="module")
def batch(hopper, pong):
    stream = Stream([hopper, pong], StreamConfig(sequence_length=120, mixture_block=8), seed=3)
    return stream.batch(0, 8).to("cpu")


@pytest.fixture(scope="module")
def model():
    return Gato(SMALL, DISJOINT).initialise(0).eval()


def test_a_channels_own_norm_shows_a_dot_on_a_flat_patch():
    shown, flat = {}, {}
    pixels = torch.full((4, 16, 16, 1), 87, dtype=torch.uint8)
    pixels[1, 7:9, 7:9], pixels[2], pixels[3] = 200, 0, 174
    for norm in ("group", "channel"):
        patches = Gato(replace(SMALL, patch_norm=norm), DISJOINT).initialise(0).patches
        with torch.no_grad():
            out = patches(pixels, torch.zeros(4, 2, dtype=torch.uint8))
            out -= patches.row.weight[0] + patches.column.weight[0]
        shown[norm] = float((out[1] - out[0]).norm() / out[0].norm())
        flat[norm] = float((out[2] + out[3] - 2 * out[0]).norm() / out[0].norm())
    assert shown["channel"] > 3 * shown["group"]
    assert flat["channel"] < 1e-3 < flat["group"]  # of a flat patch only the level is left, as it is


def test_different_rows_are_those_that_torch_finds_by_sorting_them_all():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (50, 32), generator=generator)
    drawn[:20, :31] = drawn[0, :31]
    drawn = drawn[torch.randint(0, 50, (400,), generator=generator)]
    of_one_key = torch.tensor([[MULTIPLIER, 0], [0, 1], [MULTIPLIER, 0], [1, 0]])
    for words in (drawn, of_one_key, drawn[:1]):
        for found, reference in zip(different_rows(words), torch.unique(words, dim=0, return_inverse=True)):
            assert found.dtype == reference.dtype and torch.equal(found, reference)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_patches_that_repeat_are_embedded_once_with_the_same_vectors_and_gradients(channels, count):
    patches = Gato(SMALL, DISJOINT).initialise(0).patches
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 16, 16, channels), dtype=torch.uint8, generator=generator)
    pixels = pixels[torch.randint(0, 5, (count,), generator=generator)]
    embedded: list[int] = []
    patches.stem.register_forward_pre_hook(lambda module, arguments: embedded.append(len(arguments[0])))
    found = []
    for look in (patches.appearance, patches.each):
        patches.zero_grad()
        y = look(pixels)
        (y**2).sum().backward()
        found.append([y.detach(), *(p.grad for p in patches.parameters() if p.grad is not None)])
    assert embedded == [len(pixels.unique(dim=0)) if count else 0, count]
    assert len(found[0]) == len(found[1]) == 15
    for mine, reference in zip(*found):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-5), (mine, reference)


@pytest.mark.parametrize(
    ("preset", "embedding", "vision", "transformer"),
    [
        ("tiny", 4_440_192, 119_008, 788_736),
        ("79m", 26_641_152, 1_555_488, 56_649_216),
        ("364m", 53_282_304, 2_932_512, 339_815_424),
        ("1.18b", 71_043_072, 3_850_528, 1_208_160_256),
    ],
)
def test_parameter_counts(preset, embedding, vision, transformer):
    with torch.device("meta"):
        counts = Gato(PRESETS[preset], DISJOINT).parameter_counts()
    assert counts == {
        "embedding": embedding,
        "vision": vision,
        "transformer": transformer,
        "total": embedding + vision + transformer,
    }
    config = PRESETS[preset]
    blocks = 4 * config.width * config.heads * config.head_size + 2 * config.width * config.feed_forward
    norms = 4 * config.width * config.blocks + 2 * config.width
    assert transformer == blocks * config.blocks + norms  # the formula, counted by hand


def test_geglu_has_three_matrices():
    with torch.device("meta"):
        plain = Gato(SMALL, DISJOINT).parameter_counts()["transformer"]
        gated = Gato(replace(SMALL, feed_forward_form="geglu"), DISJOINT).parameter_counts()["transformer"]
    assert gated - plain == SMALL.blocks * SMALL.width * SMALL.feed_forward


@torch.no_grad()
def test_changing_an_action_never_changes_the_logits_that_predict_it(model, batch):
    before = model(batch)
    for row in range(len(batch.tokens)):
        places = torch.nonzero(batch.roles[row] == ACTION).flatten().tolist()
        for place in (places[0], places[len(places) // 2], places[-1]):
            changed = replace(batch, tokens=batch.tokens.clone())
            changed.tokens[row, place] = 33024 + (changed.tokens[row, place] - 33024 + 511) % 1024
            after = model(changed)
            assert torch.equal(before[row, :place], after[row, :place])
            assert not torch.allclose(before[row, place:], after[row, place:])  # but it is seen behind itself


@torch.no_grad()
def test_packed_equals_separate(model, batch):
    hidden = model(batch)
    checked = 0
    for row in range(len(batch.tokens)):
        for segment in batch.segments[row].unique().tolist():
            places = torch.nonzero(batch.segments[row] == segment).flatten()
            flat = places + row * batch.tokens.shape[1]
            mine = torch.isin(batch.patch_index, flat)
            alone = Batch(
                **{n: getattr(batch, n)[row : row + 1, places] for n in ("tokens", "roles", "positions", "supervised")},
                segments=batch.segments[row : row + 1, places],
                patches=batch.patches[mine],
                patch_index=batch.patch_index[mine] - flat[0],
                patch_positions=batch.patch_positions[mine],
                tasks=batch.tasks[row : row + 1],
                sequence=batch.sequence[row : row + 1],
            )
            assert torch.allclose(model(alone)[0], hidden[row, places], atol=1e-5)
            checked += 1
    assert checked > len(batch.tokens), "no sequence held two segments"


def test_the_mask_is_causal_and_keeps_to_segments():
    segments = torch.tensor([[0, 0, 1, 1, -1]])
    mask = causal_segment_mask(segments)[0, 0]
    for q in range(5):
        for k in range(5):
            assert mask[q, k] == (k <= q and segments[0, q] == segments[0, k])


def slow_attention(q, k, v, allowed):
    """Softmax attention written out, (T, D) each."""
    scores = (q @ k.T) / q.shape[1] ** 0.5
    scores = np.where(allowed, scores, -np.inf)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (odds / odds.sum(axis=1, keepdims=True)) @ v


@torch.no_grad()
def test_attention_matches_the_slow_reference(model, batch):
    attention = model.blocks[0].attention
    x = torch.randn(1, 120, SMALL.width, generator=torch.Generator().manual_seed(0))
    mask = causal_segment_mask(batch.segments[:1])
    got = attention(x, mask)[0].numpy()
    q, k, v = attention.qkv(x)[0].reshape(120, 3, 2, 16).permute(1, 2, 0, 3).numpy().astype(np.float64)
    heads = [slow_attention(q[h], k[h], v[h], mask[0, 0].numpy()) for h in range(2)]
    assert np.allclose(np.concatenate(heads, axis=1) @ attention.out.weight.numpy().T, got, atol=1e-5)


def test_fused_loss_equals_the_plain_one_with_its_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator)
    table = torch.randn(DISJOINT.padded_size, 16, generator=generator) * 0.3
    targets = torch.randint(33024, 34048, (50,), generator=generator)
    ordered = torch.rand(50, generator=generator) < 0.5
    upstream = torch.tensor(0.37)
    gradients = []
    for chunk in (None, 7, 50, 999):
        h, w = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        soft = soft_targets(targets, ordered, DISJOINT.action_continuous, 3.0)
        if chunk is None:
            loss = cross_entropy(h @ w[: DISJOINT.size].T, *soft).sum()
        else:
            loss = FusedCrossEntropy.apply(h, w, *soft, DISJOINT.size, chunk)
        (loss * upstream).backward()
        gradients.append((loss.item(), h.grad, w.grad))
    for loss, h_gradient, w_gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        assert torch.allclose(h_gradient, gradients[0][1], atol=1e-6)
        assert torch.allclose(w_gradient, gradients[0][2], atol=1e-6)


def test_soft_targets_match_the_slow_reference():
    targets, ordered = torch.tensor([33024, 33500, 34047, 33500]), torch.tensor([True, True, True, False])
    neighbours, weights = soft_targets(targets, ordered, DISJOINT.action_continuous, 2.0)
    for n, target in enumerate(targets.tolist()):
        want = {target: 1.0}
        if ordered[n]:
            near = [b for b in range(target - 6, target + 7) if 33024 <= b < 34048]
            odds = [np.exp(-0.5 * ((b - target) / 2) ** 2) for b in near]
            want = {b: o / sum(odds) for b, o in zip(near, odds)}
        got: dict[int, float] = {}
        for b, weight in zip(neighbours[n].tolist(), weights[n].tolist()):
            got[b] = got.get(b, 0.0) + weight
        assert {b for b, w in got.items() if w > 0} == set(want)
        assert all(abs(got[b] - want[b]) < 1e-6 for b in want)
    hard, one = soft_targets(targets, ordered, DISJOINT.action_continuous, 0.0)
    assert hard.tolist() == targets[:, None].tolist() and one.unique().tolist() == [1.0]


def test_loss_sees_exactly_the_supervised_tokens(model, batch):
    hidden, targets, *_ = select(model, batch)
    wanted = [int(t) for row, on in zip(batch.tokens, batch.supervised) for t in row[on]]
    assert targets.tolist() == wanted and len(hidden) == len(wanted) > 0
    objective = Objective(model, LossConfig(), Targets((True, False), text=True, text_shown=True))
    # the loss does not move when an observation's own logits would: only places before actions count
    plain = cross_entropy(model.logits(hidden), targets[:, None], torch.ones(len(targets), 1)).sum()
    assert objective(batch).item() == pytest.approx(plain.item(), rel=1e-5)


def test_hidden_of_chosen_places_is_the_whole_one_there_with_its_gradients(batch):
    branch_scale = branch_scales(batch.sequence.numpy(), replace(SMALL, stochastic_depth=0.3, dropout=0.1), 0)
    found = []
    for whole in (True, False):
        gato = Gato(SMALL, DISJOINT).initialise(0)
        predict_index = batch.supervised.roll(-1, dims=1)
        hidden = gato(batch, branch_scale)[predict_index] if whole else gato(batch, branch_scale, batch.predict_index)
        hidden.square().sum().backward()
        found.append((hidden, {name: p.grad for name, p in gato.named_parameters()}))
    (plain, plain_gradients), (hidden, gradients) = found
    assert torch.allclose(hidden, plain, atol=1e-5) and len(plain) == int(batch.supervised.sum())
    for name, gradient in plain_gradients.items():
        if gradient is not None:
            assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name
    predicted, targets, *_ = select(gato, batch, branch_scale)
    assert torch.equal(predicted, hidden) and targets.tolist() == batch.tokens[:, 1:][predict_index[:, :-1]].tolist()


def test_a_batch_knows_its_targets_and_where_its_segments_begin(batch):
    B, L = batch.tokens.shape
    places, begins = [], []
    for row in range(B):
        for place in range(L):
            if batch.supervised[row, place]:
                places.append(row * L + place - 1)
            if place == 0 or batch.segments[row, place] != batch.segments[row, place - 1]:
                begins.append(row * L + place)
    assert batch.predict_index.tolist() == places
    cu_seqlens = batch.cu_seqlens.tolist()
    assert (
        cu_seqlens[: len(begins)] == begins
        and set(cu_seqlens[len(begins) :]) == {B * L}
        and len(cu_seqlens) % (2 * B) == 0
    )
    assert batch.packed == (len(begins) > B) and batch.packed


def segments_one_by_one(q, k, v, cu_seqlens):
    """`segment_attention` as its docstring has it, a segment at a time."""
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * T, H, D).transpose(0, 1) for x in (q, k, v))
    parts = [slice(a, b) for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]) if a < b]
    y = torch.cat([scaled_dot_product_attention(q[:, p], k[:, p], v[:, p], is_causal=True) for p in parts], dim=1)
    return y.transpose(0, 1).view(B, T, H, D).transpose(1, 2)


@torch.no_grad()
def test_attention_by_segments_is_the_masked_one(model, batch, monkeypatch):
    masked = model(batch)
    monkeypatch.setattr(transformer, "segment_attention", segments_one_by_one)
    monkeypatch.setattr(gato_module, "flash_serves", lambda x: True)
    assert torch.allclose(model(batch), masked, atol=1e-5)


def test_attention_by_segments_has_shapes_and_gradients():
    """The operator's own account of itself; its values need a GPU, see test_gpu_path.py."""
    q, k, v = (torch.empty(2, 4, 64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    y = transformer.segment_attention(q.float(), k.float(), v, torch.empty(8, device="meta", dtype=torch.int32))
    assert y.shape == q.shape and y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_nothing_in_a_training_step_waits_for_a_tensors_value(batch, monkeypatch):
    """Fake tensors have shapes and no values, and refuse what would need one: where a GPU's host would wait for it."""
    monkeypatch.setattr(PatchEmbedding, "appearance", PatchEmbedding.each)  # as on a GPU
    branch_scale = branch_scales(batch.sequence.numpy(), replace(SMALL, stochastic_depth=0.3), 0)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        gato = Gato(replace(SMALL, rotary="token"), DISJOINT)
        objective = Objective(
            gato, LossConfig(soft_bins=3.0, softmax="targets"), Targets((True, False), text=False, text_shown=False)
        )
        shapes = {f.name: fake.from_tensor(v) for f in fields(batch) if torch.is_tensor(v := getattr(batch, f.name))}
        assert batch.packed
        objective(replace(batch, **shapes), fake.from_tensor(branch_scale)).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in gato.parameters())
        with pytest.raises(DataDependentOutputException):
            bool((shapes["segments"] == 0).all())


COMPILED = [pytest.param(True, checkpointing, marks=pytest.mark.process) for checkpointing in (False, True)]


@pytest.mark.parametrize(("compile", "activation_checkpointing"), [*COMPILED, (False, True)])
def test_prepared_blocks_equal_plain_ones_with_their_gradients(batch, compile, activation_checkpointing):
    config = replace(SMALL, rotary="token", action_position="own", stochastic_depth=0.3)
    branch_scale = branch_scales(batch.sequence.numpy(), config, 0)
    one = replace(batch, segments=torch.zeros_like(batch.segments), packed=False)  # which needs no mask
    found = []
    for prepared in (False, True):
        gato = Gato(config, DISJOINT).initialise(0)
        names = list(gato.state_dict())
        if prepared:
            prepare_blocks(gato, compile, activation_checkpointing)
        objective = Objective(gato, LossConfig(soft_bins=3.0), Targets((True, False), text=True, text_shown=True))
        loss = objective(batch, branch_scale) + objective(one)
        loss.backward()
        assert list(gato.state_dict()) == names
        found.append((loss.item(), {name: p.grad for name, p in gato.named_parameters()}))
    (plain, plain_gradients), (other, gradients) = found
    assert other == pytest.approx(plain, rel=1e-6)
    for name, gradient in plain_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name
