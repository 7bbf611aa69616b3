"""Every Python block of README.md and of the site's pages runs; doc_contexts.py says what it finds there."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

import doc_blocks
import doc_contexts
import doc_ranks
from doc_blocks import ROOT

import fastdpo

PYTHON = doc_blocks.blocks("python", "py", "python3", "pycon")
SHELL = doc_blocks.blocks("bash", "sh", "shell", "console")
YAML = doc_blocks.blocks("yaml", "yml")
HERE = sorted({block.document for block in PYTHON})
RANKS = [block for block in PYTHON if (found := doc_contexts.setting_of(block)) is not None and found.ranks]


@pytest.fixture
def unpatched():
    yield
    fastdpo.unpatch_trl()


@pytest.mark.parametrize("document", HERE)
def test_the_blocks_of(document, unpatched, monkeypatch, tmp_path, recwarn):
    monkeypatch.chdir(tmp_path)
    space, ran = doc_contexts.given(), 0
    for block in PYTHON:
        if block.document != document:
            continue
        setting = doc_contexts.setting_of(block)
        if setting is not None and setting.ranks:
            continue
        if setting is not None and setting.provide is not None:
            setting.provide(space, monkeypatch, tmp_path)
        try:
            exec(block.compiled(), space)
        except NameError as error:
            pytest.fail(f"{block}: {error}; doc_contexts.given() or a Setting has to provide it")
        if setting is not None and setting.check is not None:
            setting.check(space)
        ran += 1
    assert ran or document == "docs/distributed.md"


@pytest.mark.parametrize("block", RANKS, ids=str)
def test_a_block_of_several_ranks(block, ranks):
    prepare = doc_contexts.setting_of(block).ranks
    found = ranks(2)(doc_ranks.run, prepare, block.code, str(block))
    if prepare == "pipeline":
        assert torch.isfinite(found[1]["losses"]).all() and len(found[1]["losses"]) == 2
        return
    assert all(torch.isfinite(value).all() for seen in found for value in seen.values())
    if prepare in ("tensor_parallel", "context_parallel"):
        assert torch.equal(found[0]["loss"], found[1]["loss"])
    else:  # pairs of their own, and one head
        assert found[0]["loss"] != found[1]["loss"]
        assert torch.equal(found[0]["gradient of the head"], found[1]["gradient of the head"])
        assert found[0]["gradient of the head"].any()


def test_every_setting_has_its_block_and_every_stand_in_its_line():
    used = [doc_contexts.setting_of(block) for block in PYTHON]
    unused = [x for x in doc_contexts.SETTINGS if x not in used and (ROOT / x.document).name != "README.md"]
    assert not unused, f"no block has it any more: {unused}"
    text = (ROOT / "docs" / "blocks.md").read_text()
    assert doc_contexts.table() in text, f"docs/blocks.md should have\n\n{doc_contexts.table()}\n"


def test_no_block_of_python_is_missed():
    """A fence without a language, or with a new one, is looked at."""
    known = {"python", "bash", "yaml", "", "toml", "text", "json"}
    found = {block.language for path in doc_blocks.DOCUMENTS for block in doc_blocks.blocks_of(path)}
    assert found <= known, found - known
    assert {"README.md", "docs/start/trl.md", "docs/distributed.md", "docs/choose.md"} <= set(HERE)
    count = sum(
        len(re.findall(r"^ *```(?:python|py)\b", path.read_text(), re.MULTILINE)) for path in doc_blocks.DOCUMENTS
    )
    assert len(PYTHON) == count > 20


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_what_a_shell_block_names_is_there(block):
    """Targets of make, modules of ours, scripts."""
    makefile = (ROOT / "Makefile").read_text()
    for line in block.code.splitlines():
        command = line.split(" #")[0].strip()
        for target in re.findall(r"^make ([\w-]+)", command):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{block}: make {target}"
        for module in re.findall(r"python -m ((?:fastdpo|benchmarks|tools)[\w.]*)", command):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{block}: {module}"
        for script in re.findall(r"(examples/[\w/.]+\.(?:py|yaml))", command):
            assert (ROOT / script).exists(), f"{block}: {script}"


@pytest.mark.parametrize("block", YAML, ids=str)
def test_a_block_of_yaml_is_read(block):
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(block.code), dict)


def test_a_block_that_is_wrong_is_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "1. a list:\n\n   ```python\n   fastdpo.linear_logps(hidden, weight)\n   ```\n\n```bash\nmake nothing\n```\n"
    )
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    python, shell = doc_blocks.blocks_of(page)
    assert python.line == 4 and python.code == "fastdpo.linear_logps(hidden, weight)\n"
    with pytest.raises(TypeError, match="labels"):
        exec(python.compiled(), doc_contexts.given())
    with pytest.raises(AssertionError, match="make nothing"):
        test_what_a_shell_block_names_is_there(shell)


def test_figures_in_the_pages_are_those_of_the_results():
    """As the README's: a figure in a sentence changes with its result."""
    from benchmarks.report.tables import RESULTS, error

    def record(name: str) -> dict:
        return json.loads((RESULTS / f"2026-11-{name}.json").read_text())

    seconds = {row["step"]: f"{row['median s']:.2f}" for row in record("cpu-step")["rows"]}
    frozen = [row for row in record("cpu-sweep")["rows"] if row["along"] == "frozen"]
    memory = {row["path"]: row["MiB"] for row in frozen if not row["frozen"]}
    most = {row["path"]: row["most tokens"] for row in record("cpu-fits")["rows"] if row["GiB"] == 2}
    bf16 = [row for row in record("cpu-accuracy")["rows"] if row["inputs"] == "bfloat16"]
    logp = {row["path"]: row["sequence log-prob, nats"] for row in bf16}
    bias, training = record("cpu-bias"), record("training")
    by = {(row["path"] == "routed", row["threshold"]): row for row in bias["rows"]}
    ours, theirs = by[True, 2.0**-10], by[False, bias["notes"]["default filter"]]
    logits = 8192 * 151936 * 4 / 2**30

    def mean(path: str, key: str) -> float:
        values = [run[key] for run in training["runs"] if run["path"] == path]
        return sum(values) / len(values)

    assert ours["dhidden bias"] <= ours["dhidden standard error"]
    faq = [
        f"are {logits:.1f} GiB in fp32",
        f"take {memory['fastdpo routed']:.0f} MiB in place of {memory['eager']:.0f} MiB",
        f"at least {most['fastdpo routed']} tokens fit where eager logits let {most['eager']} in",
        f"takes {seconds['liger']} s for a step where eager logits take {seconds['eager']} s and fastdpo "
        f"{seconds['fastdpo routed']} s",
        f"by up to {logp['eager']:.2f} nats on a trained head",
        f"fp32 logits move it by {error(logp['fastdpo routed'])}.",
        f"over {bias['notes']['seeds']} seeds the bias is within one standard error",
        f"computes {100 * ours['share']:.0f}% of the pairs and a single draw is off by {error(ours['dhidden noise'])}",
        f"computes {100 * theirs['share']:.0f}% and is off by {error(theirs['dhidden bias'])}",
        f"After {training['notes']['steps']} steps the parameters were {mean('routed', 'distance'):.2f} from the exact "
        f"run's, of {mean('exact', 'travelled'):.1f} travelled (bf16 logits: {mean('trl bf16', 'distance'):.2f})",
    ]
    text = " ".join((ROOT / "docs" / "faq.md").read_text().split())
    for sentence in faq:
        assert sentence in text, sentence
    from fastdpo.losses import LOSSES

    assert f"(DPO and {len(LOSSES) - 1} relatives)" in (ROOT / "docs" / "index.md").read_text()
