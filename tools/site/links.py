"""Where the documentation's site has what a link leads to, and what it shows of a file that a page links to.

    ../benchmarks/README.md      benchmarks.md                            a page of PAGES
    ../fastdpo/routing.py        source/fastdpo/routing.py.md             a page with the file's text
    ../examples/distributed      source/examples/distributed.md           a page with a list of its files
    results/plots/step.png       files/benchmarks/results/plots/step.png  the file

So a link that is right on the repository's own pages is right in the site too, which needs no address and no network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {  # page of the site: file of the repository
    "benchmarks.md": "benchmarks/README.md",
    "notes.md": "benchmarks/results/NOTES.md",
    "tests.md": "tests/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "conduct.md": "CODE_OF_CONDUCT.md",
    "security.md": "SECURITY.md",
}
HISTORY = "history.md"
HISTORY_BESIDE = "benchmarks/history.md"  # where its links start
ELSEWHERE = {"README.md": "index.md", **{file: page for page, file in PAGES.items()}}
COPIED = (".png", ".json", ".jsonl", ".cff")
LANGUAGES = {
    ".py": "python",
    ".h": "cpp",
    ".cpp": "cpp",
    ".cu": "cuda",
    ".yaml": "yaml",
    ".toml": "toml",
    ".md": "markdown",
}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^\s*```")


def rewritten(text: str, change) -> str:
    """`text` with ``change(target)`` for the target of every link outside of fenced code."""
    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= FENCE.match(line) is not None
        lines.append(line if fenced else LINK.sub(lambda match: match[1] + change(match[2]) + match[3], line))
    return "\n".join(lines)


def placed(target: str, beside: str) -> str | None:
    """Where the site has what `target` leads to from the repository's file `beside`; None for what is no file of it."""
    if ":" in target or target.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(beside), target))
    found = ROOT / path
    if path.startswith("..") or not found.exists():
        return None
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if found.suffix in COPIED else f"source/{path}.md"


def source_page(path: str) -> str:
    found = ROOT / path
    head = f"---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if found.is_dir():
        names = sorted(x.name for x in found.iterdir() if x.suffix in LANGUAGES and not x.name.startswith("."))
        return head + "\n".join(f"- [`{name}`]({posixpath.basename(path)}/{name}.md)" for name in names) + "\n"
    return f"{head}````{LANGUAGES.get(found.suffix, 'text')}\n{found.read_text()}\n````\n"


def with_contents(path: str) -> list[str]:
    """`path` and, of a folder, its files."""
    if not (ROOT / path).is_dir():
        return [path]
    return [path] + [f"{path}/{x.name}" for x in sorted((ROOT / path).iterdir()) if x.suffix in LANGUAGES]


def origin(uri: str) -> str:
    """The repository's file that the page `uri` is."""
    return HISTORY_BESIDE if uri == HISTORY else PAGES.get(uri, f"docs/{uri}")


def relative(target: str, uri: str) -> str:
    """`target`, a link of the page `uri`, as it is to stand in the site; as it is where it leads nowhere."""
    there = placed(target, origin(uri))
    return target if there is None else posixpath.relpath(there, posixpath.dirname(uri) or ".")


def wanted(text: str, beside: str) -> set[str]:
    """The files that links of `text` lead to, and that are not pages of the site by themselves."""
    found: set[str] = set()

    def see(target: str) -> str:
        if (placed(target, beside) or "").startswith(("source/", "files/")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(beside), target))
            found.update(with_contents(path))
        return target

    rewritten(text, see)
    return found
