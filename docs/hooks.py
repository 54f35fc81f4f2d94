"""MkDocs hooks: the pages that lie outside docs/, one reference page per package, and links that work in both places.

repository: README.md, docs/*.md, ... -> site: index.md, *.md, reference/PACKAGE.md

Links in Markdown files are written for the repository. Here each is resolved there and written again for the site; a
link to a file that is no page of the site becomes plain text.

Invariant: a link of the repository that reaches a page reaches the same page on the site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "deepspeed_configs/README.md": "deepspeed_configs/README.md",
    "eval/weights/suite/README.md": "eval/weights/suite/README.md",
    "eval/weights/tiny/README.md": "eval/weights/tiny/README.md",
}
PACKAGES = ("gato", "schemas", "simulators", "shards", "etl", "trainer", "eval")
LINK = re.compile(r"(?<!`)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for package in PACKAGES:
        lines = [f"# {package}", ""]
        for module in modules(ROOT / package):
            lines += [f"::: {module}", ""]
        files.append(File.generated(config, f"reference/{package}.md", content="\n".join(lines)))
    return files


def modules(package: Path) -> Iterator[str]:
    """Dotted names of a package's public modules, the package itself first."""
    for path in sorted(package.rglob("*.py"), key=lambda path: path.with_suffix("").as_posix().replace("__init__", "")):
        relative = path.relative_to(ROOT).with_suffix("")
        names = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        if not any(name.startswith("_") for name in names):
            yield ".".join(names)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page; code blocks stay as they are."""
    place = page.file.src_uri
    source = next((outer for outer, inner in OUTSIDE.items() if inner == place), f"docs/{place}")

    def rewrite(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match[0]
        reached = os.path.normpath(PurePosixPath(source).parent / path)
        goal = OUTSIDE.get(reached, reached.removeprefix("docs/"))
        if files.get_file_from_path(goal) is None:
            return text
        return f"{image}[{text}]({os.path.relpath(goal, PurePosixPath(place).parent)}{mark}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)
