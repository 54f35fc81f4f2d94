"""What a GPU will run, verified without one: on fake and meta tensors, or with the form that a GPU takes chosen here.
Tests that need a GPU make their own data: no simulator, no Beam."""

from contextlib import contextmanager
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import by_convention, executed, head_ids
from benchmarks.gpu_checks import failed, head_difference
from benchmarks.gpu_control import graph_as_plain
from benchmarks.gpu_parts import gpt2_config
from benchmarks.gpu_results import build
from schemas.layout import ACTION, OBSERVATION, SEPARATOR
from schemas.vocabulary import DISJOINT, PAPER
from shards.batch import Batch
from shards.reader import Dataset
from tests.conftest import run
from trainer.engine import zero_config
from trainer.loss import FusedCrossEntropy, LossConfig, Objective, Targets, aligned, cross_entropy
from trainer.model import PRESETS, Gato, ModelConfig, segments
from trainer.model.transformer import one_query_attention
from trainer.recipes import RECIPES

SMALL = ModelConfig(blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


def made(B: int = 4, L: int = 96, places: int = 12, packed: bool = True) -> Batch:
    """A batch of a body with 8 observation and 3 action tokens, numpy arrays."""
    rng = np.random.default_rng(0)
    batch = Batch.empty(np.zeros(B, np.int64), L, 0, 1)
    roles = np.array([OBSERVATION] * 8 + [SEPARATOR] + [ACTION] * (places - 9), np.uint8)
    batch.roles[:] = np.resize(roles, L)
    batch.positions[:] = np.resize(np.arange(places), L)
    batch.tokens[:] = np.where(batch.roles == ACTION, 33024, 32000) + rng.integers(0, 1024, (B, L))
    batch.tokens[batch.roles == SEPARATOR] = DISJOINT.separator
    batch.segments[:] = (np.arange(L) >= 5 * places) & (np.arange(B) % 2 == 0)[:, None] if packed else 0
    batch.supervised[:] = batch.roles == ACTION
    batch.sequence[:] = np.arange(B)
    return batch.seal()


class Products(TorchDispatchMode):
    """Types of the operands of matrix products; those of attention apart, which is decomposed without a GPU."""

    def __init__(self):
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.types |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@contextmanager
def autocast(device):
    """torch.autocast, which refuses a GPU that is not there."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


BUILT = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake tensors of a GPU need torch's CUDA build")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=BUILT)])
def test_under_autocast_every_matrix_product_is_in_bfloat16(device):
    """Also the head's; on tensors without values, which may claim to be on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        objective = Objective(
            Gato(SMALL, DISJOINT), LossConfig(soft_bins=3.0), Targets((True,), text=True, text_shown=True)
        )
        batch = made(packed=False).to(device)
        with Products() as products, autocast(device):
            loss = objective(batch)
        assert loss.dtype == torch.float32 and products.types == {torch.bfloat16}


def test_a_model_is_built_where_it_is_wanted():
    with torch.device("meta"):
        gato = Gato(replace(PRESETS["1.18b"], sequence="timesteps"), DISJOINT)
    assert {x.device.type for x in (*gato.parameters(), *gato.buffers())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the random numbers of a GPU")
def test_a_model_that_is_initialised_on_a_gpu_has_the_same_spread():
    with torch.device("cuda"):
        gato = Gato(SMALL, DISJOINT).initialise(0)
    assert gato.tokens.weight.is_cuda and abs(float(gato.tokens.weight[:32000].std()) - 0.02) < 1e-3


@pytest.mark.parametrize("size", [1000, 1024])
def test_rows_that_fill_the_head_up_take_no_part(size):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (37, aligned(size)))
    targets = torch.randint(0, size, (37, 1), generator=generator)
    ones, found = torch.ones(37, 1), []
    for form in ("fused", "plain"):
        if form == "fused":
            loss = FusedCrossEntropy.apply(hidden, weight, targets, ones, size, 10)
        else:
            loss = cross_entropy(hidden @ weight[:size].T, targets, ones).sum()
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert aligned(size) % 64 == 0 and not found[0][2][size:].any()
    assert all(torch.allclose(mine, plain, atol=1e-4) for mine, plain in zip(*found))
    assert head_difference(rows=64, width=32) < 1e-2


@pytest.mark.parametrize("vocabulary", [DISJOINT, PAPER])
def test_the_table_has_rows_for_an_aligned_head(vocabulary):
    assert vocabulary.size <= aligned(vocabulary.size) <= vocabulary.padded_size


def test_the_kernel_is_decided_by_what_is_right_and_fast(monkeypatch):
    """The decision itself; stand-ins, because the kernels need a GPU."""
    length, sequences, device = 32, 4, torch.device("cpu")
    cu_seqlens, numbers = segments.example(sequences, length, device)
    assert bool((cu_seqlens.diff() >= 0).all()) and int(cu_seqlens[-1]) == sequences * length
    assert torch.equal(numbers, torch.bucketize(torch.arange(len(numbers)), cu_seqlens.unique(), right=True))

    def masked(q, k, v, cu_seqlens, longest):
        return segments.masked(numbers[: len(q)], longest)(q, k, v)

    def wrong(q, k, v, cu_seqlens, longest):
        return masked(q, k, v, cu_seqlens, longest) * 1.1

    def missing(*_):
        raise NotImplementedError

    for flash, cudnn, chosen in ((masked, wrong, "flash"), (missing, masked, "cudnn"), (missing, missing, "flash")):
        monkeypatch.setattr(segments, "flash", flash)
        monkeypatch.setattr(segments, "cudnn", cudnn)
        took = segments.decide(device, 2, 16, length, sequences)
        assert segments.in_use() == chosen and (took["cudnn"] < float("inf")) == (cudnn is masked)
    segments.use("flash")


@pytest.mark.parametrize(
    ("given", "names"), [("", ["", ""]), ("flash", ["flash"] * 2), ("=flash,128=cudnn", ["cudnn", "flash"])]
)
def test_the_environment_may_name_the_kernel(given, names, monkeypatch):
    monkeypatch.setenv("GATO_ATTENTION", given)
    assert [segments.named(size) for size in (128, 32)] == names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
@pytest.mark.parametrize(("heads", "head_size"), [(16, 128), (24, 32)])
def test_attention_by_segments_is_the_masked_one_on_a_gpu(heads, head_size):
    took = segments.decide(torch.device("cuda"), heads, head_size, 1024, 8)
    assert took["flash"] < float("inf"), took


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_timestep_acts_as_the_plain_one(tmp_path):
    dataset = Dataset(build("d4rl", d4rl_log(tmp_path), tmp_path / "shards"))
    with torch.device("cuda"):
        model = Gato(PRESETS["tiny"], dataset.manifest.vocabulary).initialise(0).eval()
    assert graph_as_plain("tiny", dataset, 0, model, 40)


def d4rl_log(folder):
    """A folder with a log of four observed numbers and two actions, made without a simulator."""
    (folder / "logs").mkdir()
    rng, rows = np.random.default_rng(0), 800
    with h5py.File(folder / "logs" / "made-medium-v4.hdf5", "w") as file:
        file["observations"] = rng.normal(size=(rows, 4)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
        file["rewards"] = rng.normal(size=rows).astype(np.float32)
        file["terminals"] = np.arange(rows) % 40 == 39
        file["timeouts"] = np.zeros(rows, bool)
    return folder / "logs"


@pytest.mark.process
def test_shards_built_without_beam_are_those_of_the_build_command(tmp_path):
    logs = d4rl_log(tmp_path)
    run("etl.build", "--source", "d4rl", "-i", logs, "-o", tmp_path / "beam", "--shard-megabytes", "0.02")
    manifest = Dataset(build("d4rl", logs, tmp_path / "pool", 0.02)).manifest
    assert manifest.shards.rows > 1 and manifest.fingerprint == Dataset(tmp_path / "beam").manifest.fingerprint


def test_one_query_attends_as_any_other():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=generator) for n in (1, 70, 70))
    mask = torch.zeros(1, 70).masked_fill(torch.arange(70) >= 64, -torch.inf)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(one_query_attention(q, k, v, mask), plain, atol=1e-6)


def test_executed_flops_are_those_that_torch_counts():
    """But for attention, which torch counts as if it were neither causal nor in segments."""
    batch = made()
    objective = Objective(Gato(SMALL, DISJOINT), LossConfig(chunk=0), Targets((True,), text=True, text_shown=True))
    with FlopCounterMode(display=False) as counter:
        objective(batch.to("cpu")).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    segments_ = np.diff(batch.cu_seqlens.astype(np.int64))
    attention = SMALL.blocks * 6 * int(np.square(segments_).sum()) * SMALL.heads * SMALL.head_size
    found = executed(SMALL, DISJOINT.size, [batch]) * batch.tokens.size
    assert found - attention == pytest.approx(products, rel=1e-3)
    assert executed(SMALL, DISJOINT.size, [made(packed=False)]) * batch.tokens.size > found


def test_the_smaller_the_model_the_more_the_convention_flatters():
    batch, shares = made(2, 1020, packed=False), []
    for size in ("1.18b", "364m", "79m"):
        ids = head_ids(LossConfig(), DISJOINT, text=False)
        shares.append(executed(PRESETS[size], ids, [batch]) / by_convention(PRESETS[size], DISJOINT, 1020))
    assert 0.95 > shares[0] > shares[1] > shares[2] > 0.6


def test_zero_0_in_bfloat16_takes_muon():
    config = replace(RECIPES["79m"], deepspeed="zero0", optimiser=replace(RECIPES["79m"].optimiser, matrices="muon"))
    body = zero_config(config, 1)
    assert body["torch_autocast"]["enabled"] and body["zero_optimization"]["stage"] == 0
    with pytest.raises(ValueError, match="zero0"):
        zero_config(replace(config, deepspeed="zero1"), 1)


@pytest.mark.parametrize("name", [name for name, config in RECIPES.items() if "_cpu" not in config.deepspeed])
def test_a_step_on_gpus_is_eight_micro_batches_or_all_that_the_paper_s_batch_leaves(name):
    data = RECIPES[name].data
    processes = {"1.18b-8gpu": 8, "1.18b-nodes": 32}.get(name, 1)
    accumulation = data.global_batch // (processes * data.micro_batch)
    assert accumulation >= 8 or (name == "1.18b-nodes" and accumulation == 1)


def test_gpt2_has_one_kernel_for_its_gelu():
    config = gpt2_config_or_skip("79m")
    assert config.activation_function == "gelu_pytorch_tanh" and config.vocab_size % 64 == 0
    assert (config.n_embd, config.n_head, config.n_layer, config.n_inner) == (768, 24, 8, 3072)


def gpt2_config_or_skip(size):
    pytest.importorskip("transformers")
    return gpt2_config(RECIPES[size], DISJOINT.padded_size)


def test_a_check_that_fails_is_named():
    good = {"pong: graph as plain": True, "head: difference of the loss": 1e-4}
    assert failed(good) == []
    bad = {"pong: graph as plain": False, "head: difference of the loss": float("nan")}
    assert failed(good | bad) == ["pong: graph as plain", "head: difference of the loss"]
