"""The documentation's site: its pages, its links, the benchmarks' history, and that `make docs` builds it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import doc_blocks
import pytest
from doc_blocks import ROOT

from benchmarks.report import history
from tools.site import links


def config() -> str:
    return (ROOT / "mkdocs.yml").read_text()


def pages() -> list[str]:
    """Of the site, by its own names."""
    own = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    return [*own, *links.PAGES, links.HISTORY]


def text_of(uri: str) -> str:
    return history.page() if uri == links.HISTORY else (ROOT / links.origin(uri)).read_text()


def test_every_page_is_in_the_navigation_once():
    named = re.findall(r"- (?:[^:\n]+: )?([\w/]+\.md)$", config(), re.MULTILINE)
    assert sorted(named) == sorted(pages())


@pytest.mark.parametrize("uri", pages())
def test_every_link_leads_to_a_page_or_a_file_of_the_site(uri):
    lost = []

    def see(target: str) -> str:
        if not target.startswith(("http://", "https://")) and links.placed(target, links.origin(uri)) is None:
            lost.append(target)
        return target

    links.rewritten(text_of(uri), see)
    assert not lost, f"{uri}: {lost}"


def test_links_are_rewritten_for_the_site():
    for target, uri, expected in (
        ("../benchmarks/README.md", "divergence.md", "benchmarks.md"),
        ("../../examples/trl_dpo.py", "start/trl.md", "../source/examples/trl_dpo.py.md"),
        ("results/plots/step.png", "benchmarks.md", "files/benchmarks/results/plots/step.png"),
        ("../docs/building.md", "benchmarks.md", "building.md"),
        ("docs/design.md", "contributing.md", "design.md"),
        ("results/2026-11-training.json", "history.md", "files/benchmarks/results/2026-11-training.json"),
        ("../trainers.md", "start/index.md", "../trainers.md"),
        ("nothing.md", "index.md", "nothing.md"),
        ("https://example.org/x.md", "index.md", "https://example.org/x.md"),
    ):
        assert links.relative(target, uri) == expected
    text = "[a](x.md#b) [c](y)\n```\n[d](z)\n```\n"
    assert links.rewritten(text, lambda target: target + "!") == "[a](x.md!#b) [c](y!)\n```\n[d](z)\n```\n"


def test_sources_that_pages_link_to_are_shown_whole():
    assert links.wanted("[a](../fastdpo/routing.py) [b](../examples/distributed)", "docs/routing.md") >= {
        "fastdpo/routing.py",
        "examples/distributed",
        "examples/distributed/pipeline.py",
    }
    assert (ROOT / "fastdpo" / "routing.py").read_text() in links.source_page("fastdpo/routing.py")
    assert "(distributed/pipeline.py.md)" in links.source_page("examples/distributed")


def test_the_history_has_every_result_and_a_new_one_is_a_line(tmp_path):
    page = history.page()
    files = [path.name for path in history.RESULTS.glob("*.json")]
    assert len(files) > 10 and not [name for name in files if f"(results/{name})" not in page]
    assert history.NO_GPU in page
    for name in files:
        shutil.copy(history.RESULTS / name, tmp_path / name)
    record = json.loads((tmp_path / "2026-11-cpu-step.json").read_text())
    before, record["environment"]["date"] = record["environment"]["date"], "2027-01-05"
    next(row for row in record["rows"] if row["step"] == "fastdpo routed")["median s"] = 0.123
    (tmp_path / "2027-01-cpu-step.json").write_text(json.dumps(record))
    (tmp_path / "2027-01-02-h100.json").write_text(
        json.dumps({"title": "t", "device": {"name": "H100"}, "date": "2027-01-02"})
    )
    lines = history.page(tmp_path).splitlines()
    (new,) = [i for i, line in enumerate(lines) if line.startswith("| [2027-01-05](results/2027-01-cpu-step.json)")]
    assert "| 0.12 |" in lines[new] and lines[new + 1].startswith(f"| [{before}](results/2026-11-cpu-step.json)")
    assert "Measured: h100." in lines and history.NO_GPU not in lines
    (tmp_path / "unnamed.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unnamed\.json"):
        history.page(tmp_path)


def test_what_the_site_needs_is_pinned_and_named_once():
    (extra,) = re.findall(r"^docs = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    needed = re.findall(r'"([^"]+)"', extra)
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(needed) == 3 and set(needed) <= set(pinned)
    assert f"constraints.txt {' '.join(needed)}\n" in (ROOT / "Makefile").read_text()
    assert "font: false" in config() and "/site/\n" in (ROOT / ".gitignore").read_text()


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "losses.html").read_text()
    assert "tdpo2" in reference and "{losses}" not in reference and "Equivalent" in reference
    assert (tmp_path / "source" / "fastdpo" / "routing.py.html").exists()


def test_every_document_of_the_repository_is_read_for_blocks():
    assert {links.origin(uri) for uri in pages() if uri != links.HISTORY} | {"README.md"} == {
        path.relative_to(ROOT).as_posix() for path in doc_blocks.DOCUMENTS
    }
