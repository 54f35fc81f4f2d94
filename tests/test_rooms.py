"""Every module sits in its room and imports only downward."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "schemas": set(),
    "shards": {"schemas"},
    "simulators": {"schemas"},
    "etl": {"schemas", "simulators", "shards.writer", "shards.folder", "shards.reader"},
    "trainer": {"schemas", "shards"},
    "eval": {"schemas", "shards", "simulators", "etl.tokenizers", "trainer.model", "trainer.checkpoint"},
}
MODULES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ALLOWED}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_downward(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        inside = any(name == allowed or name.startswith(allowed + ".") for allowed in {room, *ALLOWED[room]})
        assert inside, f"{path.relative_to(ROOT)} imports {name}"


def test_deepspeed_lives_in_one_file():
    users = [path for path in MODULES if "import deepspeed" in path.read_text()]
    assert [str(path.relative_to(ROOT)) for path in users] == ["trainer/engine.py"]
