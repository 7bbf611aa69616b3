"""The CPU benchmarks that sweep: sizes are what they say, what is not run says why, and searches end as they should."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]


def test_a_point_has_the_tokens_it_says():
    from benchmarks.cpu.sweep import SWEEPS, Point

    head = replace(Point(512, 1024, 256), prompt_share=0.0).inputs()
    for point in {p for points in SWEEPS.values() for p in points if p.tokens <= 4096}:
        problem = replace(point, vocab=1024, hidden=256).problem(head)
        assert (problem.labels != -100).sum() == point.tokens
        assert problem.labels.numel() == point.rows
        assert problem.weight.requires_grad == (not point.frozen)
        assert problem.hidden.shape[0] == 4  # two chosen, two rejected


def test_a_sweep_from_end_to_end(tmp_path, monkeypatch, capsys):
    from benchmarks.cpu import sweep as bench_sweep
    from benchmarks.cpu.sweep import Point

    small = Point(tokens=64, vocab=1024, hidden=256)
    monkeypatch.setattr(bench_sweep, "SWEEPS", {"tokens": [small, replace(small, tokens=128)], "vocab": [small]})
    output = tmp_path / "sweep.json"
    paths = ["cce", "fastdpo routed"]  # each point of each is two processes
    monkeypatch.setattr(sys, "argv", ["bench_sweep.py", "--paths", *paths, "--rounds", "1", "--output", str(output)])
    bench_sweep.main()
    rows = json.loads(output.read_text())["rows"]
    assert [(row["along"], row["tokens"], row["path"]) for row in rows] == [
        (axis, tokens, path) for axis, tokens in (("tokens", 64), ("tokens", 128), ("vocab", 64)) for path in paths
    ]
    for row in rows:
        if row["path"] == "cce":
            assert row["seconds"] is None and "need a GPU" in row["failed"]
        else:
            assert row["seconds"] > 0 and row["MiB"] is not None and row["failed"] is None
    assert rows[1]["seconds"] == rows[5]["seconds"]  # the same point is measured once


def test_what_would_take_too_long_or_too_much_is_not_run():
    from types import SimpleNamespace

    from benchmarks.cpu.sweep import Point, Sweep

    sweep = Sweep(SimpleNamespace(longest=10.0, limit=1.0))
    small, large = Point(tokens=1024), Point(tokens=16384)
    assert sweep.reason_not_to("fastdpo routed", large) is None  # nothing is known yet
    sweep.rates["fastdpo routed"] = 1.0 / (small.tokens * small.vocab * small.hidden)
    assert sweep.reason_not_to("fastdpo routed", small) is None
    assert sweep.reason_not_to("fastdpo routed", large) == "not run: about 16 s"
    assert "GiB" in sweep.reason_not_to("eager", large) and sweep.reason_not_to("trl compacted", large) is None


@pytest.mark.parametrize("per_token, fixed", [(1.0, 0), (0.37, 900), (0.004, 100), (3.0, 5000)])
def test_the_search_for_the_largest_context(monkeypatch, per_token, fixed):
    """MiB of `tokens` are fixed + per_token * tokens."""
    from types import SimpleNamespace

    from benchmarks.cpu import memory as bench_memory

    tried = []

    def used(args, path, tokens, gib):
        tried.append(tokens)
        mib = fixed + per_token * tokens
        return (mib, None) if mib <= gib * 1024 else (None, "more than that")

    monkeypatch.setattr(bench_memory, "in_process", used)
    found = bench_memory.largest(SimpleNamespace(most=65536), "trl", 2.0)
    limit = (2048 - fixed) / per_token
    assert all(tokens % 2 == 0 for tokens in tried) and len(tried) < 16
    if limit < 2:
        assert found["most tokens"] == 0 and not found["at least"]
    elif limit >= 65536:
        assert found["most tokens"] == 65536 and found["at least"]
    else:
        assert limit / 1.11 <= found["most tokens"] <= limit and not found["at least"]
        assert found["MiB then"] == fixed + per_token * found["most tokens"]


def test_growth_sees_what_is_freed_again(tmp_path):
    """In a process of its own, as the benchmarks measure: a long-lived one has freed memory to reuse."""
    from benchmarks.cpu.resident import in_child

    script = tmp_path / "freed.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.cpu.resident import growth\n"
        "def call():\n    x = b'1' * (int(sys.argv[1]) << 20); time.sleep(0.1)\n"
        "print(growth(call))\n"
    )
    grown, failed = in_child(str(script), 64)
    assert failed is None and 60 < grown < 80
    assert in_child(str(script), 0)[0] < 8


def test_what_does_not_fit_ends_the_process(tmp_path):
    from benchmarks.cpu.resident import in_child

    script = tmp_path / "big.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.cpu.resident import growth\n"
        "def call():\n    x = bytearray(200 << 20); time.sleep(5)\n"
        "print(growth(call, float(sys.argv[1])))\n"
    )
    assert in_child(str(script), 100) == (None, "more than 100 MiB")


def test_the_context_model_is_what_its_bytes_say():
    from tools.context import GIB, NAMES, most, needed

    for name in NAMES:
        for gib in (4, 16):
            n = most(name, gib, 128256, 4096)
            assert needed(name, n, 128256, 4096) <= gib * GIB < needed(name, n + 1, 128256, 4096)
        assert most(name, 4, 128256, 4096, frozen=True) >= most(name, 4, 128256, 4096)
    assert needed("fastdpo", 8192, 32000, 2048) == 4 * 2048 * (32000 + 8192) + 128 * 2**20 + 256 * 8192
