"""What comes from outside is data: nothing unpickles it, no name in it leads out of its folder.

Fuzzing of the readers themselves is in tests/fuzz and tests/shards/test_faults.py; what is trusted, in
docs/security.md.
"""

import ast
import gzip
import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch

from eval.exports import find_export
from schemas.files import safe_name, sha256_of
from simulators.experts import perceptron
from tests.audit import audit
from tests.commands import run
from tests.test_rooms import MODULES, ROOT
from trainer import checkpoint
from trainer.checkpoint import CheckpointError, latest
from trainer.model.export import load_export, parse_export

# Modules whose readers run code from a file, and those that hand objects to processes of the same user on purpose.
CODE_FROM_FILES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
KNOWN = {"simulators/experts/sb3.py"}  # reads Stable-Baselines3's .zip, "that you trust", by their own library


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_code_from_a_file(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & CODE_FROM_FILES, f"{path}: {names}"
    for function, words, node in calls(tree):
        assert function not in ("eval", "exec", "torch.load", "os.system"), f"{path}:{node.lineno}"
        assert not function.endswith((".extractall", "read_pickle")), f"{path}:{node.lineno}"
        if function in ("np.load", "numpy.load", "np.lib.format.read_array"):
            assert words.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
        assert words.get("shell") != "True" and words.get("allow_pickle") != "True", f"{path}:{node.lineno}"
    assert "sb3" not in path.name or str(path.relative_to(ROOT)) in KNOWN


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def bombs(mark):
    """Files that run code where they are unpickled: bare, torch's, numpy's, in a zip, in gzip."""
    bare = pickle.dumps(Bomb(mark))
    torchs, arrays, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Bomb(mark), torchs)
    objects = np.empty(1, object)
    objects[0] = Bomb(mark)
    np.save(arrays, objects, allow_pickle=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("policy.npy", arrays.getvalue())
        file.writestr("data.pkl", bare)
    return [bare, torchs.getvalue(), arrays.getvalue(), archive.getvalue(), gzip.compress(arrays.getvalue())]


def test_a_bomb_is_one(tmp_path):
    pickle.loads(bombs(tmp_path / "mark")[0]).close()
    assert (tmp_path / "mark").is_file()


def attempt(call, *arguments):
    """Whatever is refused is refused by an error that is meant for it."""
    try:
        return call(*arguments)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        assert "Bomb" not in str(error)
        return None


@pytest.fixture
def export(tmp_path):
    return shutil.copytree(find_export("tiny"), tmp_path / "export")


def test_pickles_in_the_place_of_every_file_that_is_read(logs, hopper, export, tmp_path):
    mark, place = tmp_path / "mark", tmp_path / "there"
    for number, bomb in enumerate(bombs(mark)):
        place.mkdir()
        for source, name in (("d4rl", "a.hdf5"), ("minari", "data/main_data.hdf5"), ("text", "a.jsonl"),
                             ("atari", "1/replay_logs/$store$_observation_ckpt.0.gz")):  # fmt: skip
            log = place / source / name
            log.parent.mkdir(parents=True)
            if source == "atari":
                shutil.copytree(logs / "dqn_replay" / "Pong" / "1", place / source / "1", dirs_exist_ok=True)
            log.write_bytes(bomb)
            words = ("--source", source, "--input", place / source, "--output", place / f"{source}-shards")
            done = run("etl.build", *words, check=False)
            assert "Traceback" not in done.stderr, (source, number, done.stderr)
        for name in ("dataset.json", "index.arrow", "shards.arrow", "rejected.jsonl", "shard-000000.tar"):
            dataset = shutil.copytree(hopper, place / f"dataset-{name}")
            (dataset / name).write_bytes(bomb)
            done = run("shards.verify", dataset, check=False)
            assert done.returncode == 1 and "Traceback" not in done.stderr, (name, number, done.stderr)
        policy = place / "policy.npz"
        policy.write_bytes(bomb)
        attempt(perceptron.load, policy)
        (export / "weights.safetensors").write_bytes(bomb)
        about = json.loads((export / "model.json").read_text())
        about["weights_sha256"] = sha256_of(export / "weights.safetensors")
        (export / "model.json").write_text(json.dumps(about))
        with pytest.raises(Exception) as refused:
            load_export(export)
        assert not isinstance(refused.value, pickle.UnpicklingError)
        shutil.rmtree(place)
        assert not mark.exists(), number


def test_a_checkpoints_record_names_no_other_file(tmp_path):
    """Even one whose own digest is right."""
    for name in ("../weights.safetensors", "/etc/passwd", "part-00000.safetensors/../x", "part-x.safetensors", ""):
        state = checkpoint.ResumeState("", 8, {})
        record = checkpoint.Record(checkpoint.CHECKPOINT_VERSION, 1, 8, 1, 1, 0, None, state, {name: "0" * 64})
        checkpoint.publish(tmp_path, record, 1, 0)
        with pytest.raises(CheckpointError, match="step-00000001.json: damaged"):
            latest(tmp_path)


def test_a_tasks_name_leads_out_of_no_folder(export, tmp_path):
    about = json.loads((export / "model.json").read_text())
    about["tasks"] = [about["tasks"][0] | {"name": "../../../escaped"}]
    (export / "model.json").write_text(json.dumps(about))
    assert parse_export((export / "model.json").read_bytes()).tasks[0].name == "../../../escaped"
    output = tmp_path / "a" / "b" / "c" / "results"
    words = ("--gato", export, "--models", "random", "gato", "--episodes", "1", "--step-limit", "5", "--processes", "1")
    where = ("--output", output, "--film-seconds", "1", "--root", tmp_path / "none")
    done = run("eval.compare", *words, *where, check=False)
    assert list(output.glob("parts/*escaped*")) and list(output.glob("rollouts/*escaped*")), done.stderr
    assert not [path for path in tmp_path.rglob("*escaped*") if output not in path.parents]


def test_safe_names():
    assert safe_name("hopper-medium_v2.0-gato-0") == "hopper-medium_v2.0-gato-0"
    strange = ["../x", "..", ".", "", "a/b", "a\\b", "a\0b", "a b", "x" * 5000, "ä/ö", "\ud800"]
    made = [safe_name(name) for name in strange]
    assert len(set(made)) == len(made)
    assert all(name and "/" not in name and "\0" not in name and name.strip(".") and len(name) < 200 for name in made)


ADVISORY = """
id: PYSEC-1
modified: 2024-10-10T17:22:00Z
aliases: [CVE-1]
affected:
- package: {ecosystem: PyPI, name: Some_Package}
  ranges:
  - {type: GIT, events: [{introduced: "0"}]}
  - {type: ECOSYSTEM, events: [{introduced: "1.2"}, {fixed: 1.10.1}, {introduced: "3"}]}
  versions: ["0.9"]
"""


@pytest.mark.parametrize("version, hit", [("0.9", 1), ("1.1", 0), ("1.2", 1), ("1.9", 1), ("1.10.1", 0), ("3.0", 1)])
def test_the_audit_of_dependencies_knows_which_versions_are_affected(tmp_path, version, hit):
    (tmp_path / "lock").write_text(f"# pinned\nother==1.5\nsome.package=={version}\n")
    (tmp_path / "a.yaml").write_text(ADVISORY)
    (tmp_path / "b.yaml").write_text(ADVISORY + "withdrawn: 2024-11-01T00:00:00Z\n")
    found, summary = audit(tmp_path / "lock", tmp_path)
    assert found == [f"some-package {version}: PYSEC-1 CVE-1"] * hit
    assert summary == f"2 packages, 1 advisories, the newest of 2024-10-10: {hit} apply"
