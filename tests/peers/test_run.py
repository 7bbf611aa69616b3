"""The runner of peers' tests, on a peer made here that stands where Cut Cross-Entropy's package would."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.peers import run, sources, table

PACKAGE = {
    "cut_cross_entropy/__init__.py": """
        import torch
        def linear_cross_entropy(e, c, targets, softcap=None, reduction="mean", **_):
            return torch.nn.functional.cross_entropy(e @ c.T, targets, reduction=reduction)
    """,
    "cut_cross_entropy/cce_lse_forward.py": """
        def cce_lse_forward_kernel(e, c, softcap=None):
            return (e @ c.T).logsumexp(-1)
    """,
    "tests/test_toy.py": """
        import pytest, torch
        from cut_cross_entropy import linear_cross_entropy

        def case(N, V, D):
            torch.manual_seed(0)
            e, c = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
            targets = torch.randint(V, (N,))
            wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(e @ c.T, targets), e)[0]
            return torch.autograd.grad(linear_cross_entropy(e, c, targets), e)[0], wanted

        @pytest.mark.parametrize("shape", [(4, 300, 8), (2**12, 2**12, 2**12)])
        def test_gradient(shape):
            torch.testing.assert_close(*case(*shape), rtol=1e-5, atol=1e-7)

        @pytest.mark.parametrize("N, V, D", [(600, 50, 8)])
        def test_of_gradient_times_two(N, V, D):
            actual, wanted = case(N, V, D)
            factor = 1 if linear_cross_entropy.__module__ == "cut_cross_entropy" else 2
            torch.testing.assert_close(factor * actual, wanted, rtol=1e-5, atol=1e-7)

        def test_of_whose_it_is():
            assert linear_cross_entropy.__module__ == "cut_cross_entropy"

        def test_of_nothing():
            assert SIZE == 3

        def test_that_fails():
            raise RuntimeError("in both")

        SIZE = 2
    """,
}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> table.Peer:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    repository = tmp_path / "toy"
    for name, text in PACKAGE.items():
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub("^        ", "", text, flags=re.MULTILINE))
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "toy"], ["tag", "v1"]):
        subprocess.run(["git", "-C", repository, *command], check=True)
    return table.Peer(
        "cce",
        table.Repository(str(repository), "v1"),
        ("tests/test_toy.py",),
        passes=1,
        edits=(table.Edit("tests/test_toy.py", "SIZE = 2", "SIZE = 3"),),
        known=(table.Known(r".*whose_it_is", "it is ours"),),
    )


def test_a_peers_cases_are_compared_one_by_one(toy):
    ((mode, result),) = run.run_peer(toy, ["routed"])
    assert mode == "routed"
    (counts,) = result.counts.values()
    assert dict(counts) == {
        "cases": 5,
        "unpatched": 4,
        "with fastdpo": 2,
        "known": 1,
        "in neither": 1,
        "never reached fastdpo": 1,
        "too large": 1,
    }
    (failure,) = result.failures  # a wrong gradient is told from a sampled one
    assert "times_two[600-4146-8]: failed" in failure
    folder = run.edited(run.obtained(toy.source), (), "wide")
    assert (folder / "cut_cross_entropy").is_dir() and not (folder / ".git").exists()
    assert "| toy | routed | all | 5 | 4 | 2 | 1 | 1 | 1 | 1 |" in run.table({("toy", "routed"): result})


def outcomes(**cases: str) -> dict:
    return {"cases": {f"tests/test_x.py::{k}": {"outcome": v, "calls": 1} for k, v in cases.items()}, "left_out": []}


def peer(*known: table.Known, passes: int = 0) -> table.Peer:
    return table.Peer("cce", table.Sdist("x", "1"), (), passes, known=known)


@pytest.mark.parametrize("patched", ["failed", "skipped", None])
def test_what_passes_without_fastdpo_must_pass_with_it(patched):
    with_it = outcomes() if patched is None else outcomes(a=patched)
    (failure,) = run.compare(peer(), "plain", outcomes(a="passed"), with_it).failures
    assert failure.startswith(f"tests/test_x.py::a: {patched or 'missing'}")
    assert not run.compare(peer(), "plain", outcomes(a="failed"), with_it).failures
    assert not run.compare(peer(table.Known(".*::a", "why")), "plain", outcomes(a="passed"), with_it).failures


def test_a_known_case_that_passes_is_not_known_any_more():
    known = table.Known(".*::a", "why", modes=("wide",))
    both = outcomes(a="passed"), outcomes(a="passed")
    (failure,) = run.compare(peer(known), "wide", *both).failures
    assert "passes, and is known not to: why" in failure
    assert not run.compare(peer(known), "plain", *both).failures
    assert not run.compare(peer(table.Known(".*::a", "why", chance=True)), "wide", *both).failures


def test_fewer_cases_than_there_were_are_a_failure():
    both = outcomes(a="passed"), outcomes(a="passed")
    assert not run.compare(peer(passes=1), "plain", *both).failures
    (failure,) = run.compare(peer(passes=2), "plain", *both).failures
    assert "1 cases pass with fastdpo, and 2 should" in failure


def test_an_edit_that_finds_another_text_is_refused(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.py").write_text("x x")
    for old, times in (("y", 1), ("x", 1)):
        with pytest.raises(ValueError, match="times, not 1"):
            sources.edited(tmp_path / "home", [table.Edit("a.py", old, "z", times)], "copy")


def test_the_table_names_what_there_is(capsys):
    for name, one in table.PEERS.items():
        assert (Path(run.__file__).parent / "in_place" / f"{one.module}.py").exists(), name
        assert all(re.compile(known.cases) and known.reason for known in one.known)
        assert set(one.modes) <= run.OPTIONS.keys()
        assert {edit.file for edit in one.wide_edits} <= set(one.tests)
    with pytest.raises(SystemExit):
        run.main(["nobody"])
    assert "nobody" in capsys.readouterr().err
