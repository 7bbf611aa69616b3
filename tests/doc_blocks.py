"""The fenced blocks of the documents, README.md included, and those of docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
]
DOCUMENTS += [
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "results" / "NOTES.md",
    ROOT / "tests" / "README.md",
]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,}|~{3,})(?P<language>[\w+-]*)")
LITERAL = re.compile(r"::\n\n(?P<code>(?: {4}.*\n|\n)+)")


class Block(NamedTuple):
    document: str  # from the repository's root
    line: int  # of its first line of code
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def compiled(self):
        """With the document's line numbers, so that a traceback leads there."""
        return compile("\n" * (self.line - 1) + self.code, str(ROOT / self.document), "exec")


def blocks_of(path: Path) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, first, lines = fence, number + 1, []
        elif opened is not None and fence and fence["mark"].startswith(opened["mark"]) and not fence["language"]:
            code = "\n".join(text.removeprefix(opened["indent"]) for text in lines) + "\n"
            found.append(Block(path.relative_to(ROOT).as_posix(), first, opened["language"], code))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{path}: the block of line {first - 1} does not end"
    return found


def blocks(*languages: str) -> list[Block]:
    return [block for path in DOCUMENTS for block in blocks_of(path) if block.language in languages]


def literals(documented) -> list[str]:
    """The code of a docstring's literal blocks, which the site shows as Python."""
    text = inspect.cleandoc(documented.__doc__) + "\n"
    return [textwrap.dedent(match["code"]).strip("\n") + "\n" for match in LITERAL.finditer(text)]
