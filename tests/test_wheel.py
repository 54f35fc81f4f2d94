"""The built wheel, installed in an empty environment outside any checkout: it holds every file, and does it all."""

import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("schemas", "simulators", "shards", "etl", "trainer", "eval", "gato", "deepspeed_configs")
pytestmark = pytest.mark.process
SIMULATORS = ("ale_py", "minigrid", "mujoco", "gymnasium_robotics")
SMALL = (
    "--model.blocks 1 --model.heads 2 --model.width 32 --model.feed-forward 64 --model.head-size 16 "
    "--model.patch-channels 16 --data.global-batch 4 --data.micro-batch 4 --data.stream.sequence-length 120 "
    "--run.evaluate-sequences 2"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: the build leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        copytree(ROOT / room, folder / room, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory):
    """A folder outside the checkout with an environment that holds the wheel alone; the packages that it depends on are
    lent by this one, whose .pth files (an editable checkout) do not count there."""
    folder = tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    packages = next((folder / "venv" / "lib").glob("python3*/site-packages"))
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "lent.pth").write_text("\n".join(lent) + "\n")
    return folder


def run(home: Path, script: str, *arguments: object) -> str:
    """A command of the environment, in a folder without any project; its stdout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(home / "venv" / "bin" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(home: Path, code: str) -> str:
    return run(home, "python", "-c", code)


def test_the_wheel_holds_every_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    names = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert len(names) > 100 and names - held == set()
    assert {f"{room}/py.typed" for room in ROOMS} <= held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "docs", "examples", "build"))]


def test_everything_imports_from_the_wheel_without_a_simulator(home):
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {SIMULATORS}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Missing())
import etl.build, etl.record, etl.inspect, shards.verify, eval.compare, trainer.main, trainer.launcher, gato
[getattr(gato, name) for name in gato.__all__]
import schemas, simulators, deepspeed_configs
rooms = [sys.modules[room] for room in {ROOMS}]
assert all(room.__file__.startswith(sys.prefix) for room in rooms), rooms
from trainer.engine import config_names, read_config
assert all(read_config(name) for name in config_names()) and len(config_names()) == 10
"""
    python(home, code)


def test_by_console_scripts(home):
    pytest.importorskip("mujoco")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run(home, "gato-record", "-e", "Hopper-v4", "--policy", "expert", "--steps", 400, "-o", "logs")
    run(home, "gato-build", "--source", "d4rl", "--input", "logs", "--output", "shards")
    assert "whole" in run(home, "gato-verify", "--full", "shards")
    run(home, "gato-inspect", "shards", "-o", "page.html")
    assert "hopper-expert-v4" in (home / "page.html").read_text()
    assert "zero0_cpu" in run(home, "gato-train", "--dry-run", "--recipe", "tiny")
    launcher = ("--num_gpus", 1, "--master_port", port)
    data = ("--data.folders", "shards", "--run.output", "trained")
    trained = run(home, "gato-train", *launcher, "--recipe", "tiny", "--steps", 20, *SMALL.split(), *data)
    assert "finished at step 20" in trained and (home / "trained" / "export" / "model.json").is_file()
    table = run(home, "gato-compare", "--root", "nothing", "--models", "random", "gato", "--episodes", 1,
                "--step-limit", 20, "--film-seconds", 0, "--processes", 1, "-o", "table")  # fmt: skip
    assert "hopper" in table and (home / "table" / "report.html").is_file()


def test_by_python(home):
    code = """
import numpy as np, gato
from gymnasium import spaces
rng = np.random.default_rng(0)
def episode(T=30):
    body = rng.normal(size=(T, 3))
    return {"observations": {"body": body}, "actions": np.tanh(body[:, :2]) * 2, "rewards": body[:, 0]}
box = spaces.Box(-2, 2, (2,), np.float32)
log = gato.write_logs("own-logs", [episode() for _ in range(5)], "my-task", action_space=box)
data = gato.build(log, "own-shards")
assert next(iter(gato.Stream(data, sequence_length=60, batch_size=2))).tokens.shape == (2, 60)
small = {"model.blocks": 1, "model.heads": 2, "model.width": 32, "model.feed_forward": 64, "model.head_size": 16,
         "model.patch_channels": 16, "data.global_batch": 4, "data.micro_batch": 4, "data.stream.sequence_length": 60}
print(gato.train("tiny", data, "own-run", steps=20, **small))
"""
    assert python(home, code).splitlines()[-1] == str(home / "own-run" / "export")
