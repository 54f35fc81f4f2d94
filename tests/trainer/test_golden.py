"""Recorded losses of 50 steps: any change to the model, the data order, the loss or the optimiser shows here. For a
change that is meant, `python -m tests.trainer.test_golden` records them again, and the commit says so."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run
from tests.etl.test_build import d4rl_file
from tests.etl.test_sources_atari import write as write_atari
from tests.trainer.launch import losses, train

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 50
COMMON = (
    "--loss.chunk 64 --optimiser.peak-lr 2e-3 --optimiser.start-lr 1e-7 --optimiser.warmup-steps 5 "
    "--optimiser.decay-steps 50 --data.stream.prompt-probability 0.25 --run.evaluate-every 1000 --run.save-every 1000"
)
FORMS = {
    "paper": "--model.no-smooth-bins --model.rotary none --model.action-position shared "
    "--model.patch-norm group --model.feed-forward-form geglu --loss.soft-bins 0 --loss.softmax vocabulary",
    "ours": "--model.smooth-bins --model.rotary token --model.action-position own --model.feed-forward-form gelu "
    "--model.patch-norm channel --loss.soft-bins 8 --loss.softmax targets",
    "timesteps": "--model.sequence timesteps --model.values --model.returns --model.blocks 2 --model.rotary token "
    "--model.patch-norm channel --optimiser.matrices muon --optimiser.bins smooth --loss.soft-bins 8 --loss.stride 8 "
    "--loss.softmax targets --loss.discrete 8",
}


def datasets(folder: Path) -> list[Path]:
    """A control task whose actions follow from its observations, and one of pictures."""
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(800, 4)).astype(np.float32)
    timeouts = np.arange(800) % 40 == 39
    done = np.zeros(800, bool)
    (folder / "logs").mkdir()
    d4rl_file(
        folder / "logs" / "made-medium-v4.hdf5", episodes=20, length=40, observations=seen,
        actions=np.tanh(seen[:, :2] * 2), rewards=seen[:, 0], timeouts=timeouts, terminals=done,
    )  # fmt: skip
    write_atari(folder / "dqn" / "Pong" / "1" / "replay_logs", lengths=(60, 60, 60))
    for source, logs in (("d4rl", "logs"), ("atari", "dqn")):
        run("etl.build", "--source", source, "--input", folder / logs, "--output", folder / "shards" / source)
    return [folder / "shards" / "d4rl", folder / "shards" / "atari"]


def curve(folder: Path, data: list[Path], form: str) -> list[float]:
    train(folder / form, data, *COMMON.split(), *FORMS[form].split(), steps=STEPS)
    return losses(folder / form)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return datasets(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.process
def test_losses_are_as_they_were(data, tmp_path, form):
    now, then = curve(tmp_path, data, form), json.loads(GOLDEN.read_text())[form]
    assert len(now) == STEPS and now[-1] < now[0] - 0.5
    assert now == pytest.approx(then, rel=2e-4)  # other processors add in another order


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        built = datasets(place)
        written = {form: [round(loss, 6) for loss in curve(place, built, form)] for form in FORMS}
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
