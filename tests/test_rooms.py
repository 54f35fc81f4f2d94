"""Every module is in its room and imports only downward, by its syntax tree, wherever in the file an import is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# room -> what its modules may import of ours besides the room itself; lower rooms first
ALLOWED = {
    "schemas": set(),
    "deepspeed_configs": set(),
    "shards": {"schemas"},
    "simulators": {"schemas"},
    "etl": {"schemas", "simulators", "shards.writer", "shards.folder", "shards.reader"},
    "trainer": {"schemas", "shards", "deepspeed_configs"},
    "eval": {"schemas", "shards", "simulators", "etl.tokenizers", "trainer.model", "trainer.checkpoint"},
    "gato": {"schemas", "shards", "simulators", "etl", "trainer", "eval"},
    "benchmarks": {"schemas", "shards", "simulators", "etl", "trainer", "eval", "gato"},
    "examples": {"gato", "simulators", "etl", "schemas"},
}
MODULES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))
FEW = 20  # Python files in a folder that one can take in at a glance


def imported(tree: ast.AST, path: Path) -> set[str]:
    """Every module that is imported anywhere in a file; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def imports_of(path: Path) -> set[str]:
    return imported(ast.parse(path.read_text()), path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_downward(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        if name.split(".")[0] in ALLOWED:
            inside = any(name == allowed or name.startswith(allowed + ".") for allowed in {room, *ALLOWED[room]})
            assert inside, f"{path.relative_to(ROOT)} imports {name}"


def test_deepspeed_lives_in_one_file():
    users = [path for path in MODULES if any(name.split(".")[0] == "deepspeed" for name in imports_of(path))]
    assert [str(path.relative_to(ROOT)) for path in users] == ["trainer/engine.py"]


def test_the_test_sees_imports_of_every_form():
    text = """
def inside():
    from deepspeed.utils import safe_get_full_fp32_param
    import_module("trainer.engine")
    if True:
        import eval.compare as c
"""
    wanted = {"deepspeed.utils.safe_get_full_fp32_param", "trainer.engine", "eval.compare"}
    assert imported(ast.parse(text), ROOT) == wanted


def test_every_room_is_here():
    """A new folder of modules must be given its place."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"docs", "tests"}
    assert folders <= set(ALLOWED), f"no room: {folders - set(ALLOWED)}"


@pytest.mark.parametrize("room", sorted(room for room in ALLOWED if (ROOT / room).is_dir()))
def test_folders_have_few_files(room):
    for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
        count = len(list(folder.glob("*.py")))
        assert count <= FEW, f"{folder.relative_to(ROOT)} has {count} modules; group them in folders"
