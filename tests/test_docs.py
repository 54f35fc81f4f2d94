"""The documentation is true: links lead somewhere, code blocks run, commands parse, named files and tests exist.

*.md -> links, blocks, commands, names -> the files, parsers and functions that they are about

The Python blocks of a page are run in order, in a folder of their own. A comment above a block changes that:
`<!-- not run: why -->` compiles it only, `<!-- file: NAME -->` writes it to a file, and `<!-- slow -->` leaves it,
commands included, and what follows on the page to `make slow`.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest
import tyro

from etl import build
from trainer import launcher
from trainer import main as trainer_main

ROOT = Path(__file__).resolve().parent.parent
IGNORED = {".venv", "node_modules", "build", "data", "runs", "results"}
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("*/*/*/README.md"),
    )
    if path.relative_to(ROOT).parts[0] not in IGNORED and not path.name.startswith(".")
)
FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"(?<!`)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
SCRIPTS = {
    "gato-build": "etl.build",
    "gato-record": "etl.record",
    "gato-inspect": "etl.inspect",
    "gato-verify": "shards.verify",
    "gato-compare": "eval.compare",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What a forge makes of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name(page)}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(goal), (
                f"{name(page)}: {target}: no such heading; there are {sorted(anchors(goal))}"
            )


def test_every_page_is_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in LINK.findall(prose(page)):
            goal = (page.parent / target.partition("#")[0]).resolve()
            if goal.suffix == ".md" and goal.is_file():
                ahead.append(goal)
    assert {name(page) for page in (ROOT / "docs").rglob("*.md")} - {name(page) for page in seen} == set()


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(mark, language, body) of a page's blocks that are Python, or marked."""
    found = [(match["mark"] or "", match["language"], match["body"]) for match in FENCE.finditer(page.read_text())]
    return [(mark, language, body) for mark, language, body in found if mark or language == "python"]


def run_blocks(page: Path, slow: bool) -> None:
    scope: dict[str, object] = {"__name__": page.stem}
    for number, (mark, language, body) in enumerate(blocks(page), start=1):
        if mark == "slow" and not slow:
            return
        if mark.startswith("file: "):
            Path(mark.removeprefix("file: ")).write_text(body)
        elif language == "python":
            code = compile(body, f"{name(page)}, block {number}", "exec")
            if not mark.startswith("not run"):
                exec(code, scope)
        elif mark == "slow":
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            subprocess.run(["bash", "-euc", body], check=True, timeout=550, env=os.environ | {"PATH": path})


WITH_BLOCKS = [page for page in PAGES if blocks(page)]
SLOW = [page for page in WITH_BLOCKS if any(mark == "slow" for mark, *_ in blocks(page))]


@pytest.fixture
def place(tmp_path, hopper, monkeypatch):
    """A folder as a user's: data/shards/d4rl is there, and Python finds what lies in it."""
    (tmp_path / "data/shards").mkdir(parents=True)
    (tmp_path / "data/shards/d4rl").symlink_to(hopper)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "reach", raising=False)  # another test's; so is its id, put back below
    registered = dict(gymnasium.registry)
    yield tmp_path
    gymnasium.registry.update(registered)
    sys.modules.pop("reach", None)


@pytest.mark.process
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name)
def test_blocks_run(page, place):
    run_blocks(page, slow=False)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_slow_blocks_run(page, place):
    run_blocks(page, slow=True)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every block of commands and every cell of a table; not of the log, which is history."""
    for page in PAGES:
        if page.name in ("log.md", "CHANGELOG.md"):
            continue
        text = page.read_text()
        lines = [m["body"] for m in FENCE.finditer(text) if m["language"] in ("", "sh", "bash")]
        lines += [cell for row in re.findall(r"^\|.*$", text, re.MULTILINE) for cell in re.findall(r"`([^`]+)`", row)]
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            if re.match(r"(python -m (etl|eval|shards)\.\w+ |(python|deepspeed).* trainer/main|gato-\w+ )", line):
                yield name(page), line.split(" # ")[0].strip()


@pytest.mark.parametrize("page, command", sorted(set(commands())))
def test_commands_parse(page, command):
    words = shlex.split(command)
    if "trainer/main.py" in words:
        trainer_main.parse(words[words.index("trainer/main.py") + 1 :])
        return
    if words[0] == "gato-train":
        trainer_main.parse(launcher.split_arguments(words[1:])[1])
        return
    module = SCRIPTS.get(words[0]) or words[2]
    arguments = words[1:] if words[0] in SCRIPTS else words[3:]
    if module == "etl.build":
        unnamed = "--input" in arguments and "--source" not in arguments  # its logs, which would say so, are not here
        options, rest = build.parsed([*arguments, "--source", "d4rl"] if unnamed else arguments)
        build.beam_flags(rest, options.workers)  # refuses what neither knows
        return
    options = importlib.import_module(module).Options
    tyro.cli(options, args=arguments)


def test_one_timestep_passes_through_at_most_twenty_files_that_hold_what_is_named():
    text = (ROOT / "docs/one-timestep.md").read_text()
    steps = re.findall(r"^\d+\. `([\w/]+\.py)`: (.*(?:\n   .*)*)", text, re.MULTILINE)
    files = [file for file, _ in steps]
    assert 10 <= len(files) == len(set(files)) <= 20
    for file, text in steps:
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        called = re.findall(r"`([A-Za-z_]\w+)`", text)
        missing = set(called) - {"terminals", "timeouts"} - defined  # two columns of the log
        assert not missing, f"{file} defines no {missing}"


def test_tests_and_files_that_the_pages_name_exist():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for page in (
        "docs/model.md",
        "docs/data.md",
        "docs/training.md",
        "docs/runners.md",
        "docs/commands.md",
        "README.md",
    ):
        text = (ROOT / page).read_text()
        for test in set(re.findall(r"\btest_\w+\b(?!\.py|/)", text)):
            assert f"def {test}(" in tests, f"{page}: no test {test}"
        for file in set(re.findall(r"`((?:[a-z_]+/)+[\w.]+\.(?:py|json|sh|md))`", text)):
            assert (ROOT / file).exists(), f"{page}: no file {file}"


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"gato_open-([\d.]+)-py3", (ROOT / "README.md").read_text())) == {version}


def test_pages_name_no_folder_of_a_developers_machine():
    tracked = subprocess.run(["git", "ls-files", "*.md", ".github", "*.yml"], cwd=ROOT, capture_output=True, text=True)
    for file in tracked.stdout.split():
        found = re.findall(r"(?:^|[\s`(])(/(?:home|work|root|Users|tmp)/[\w/.-]+)", (ROOT / file).read_text())
        assert not found, f"{file} names {found}; {os.sep}path/to stands for a user's folder"
