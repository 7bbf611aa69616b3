"""The memory model beside every committed CPU measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdpo.costs.memory import GIB, MIB, PATHS, Batch, longest, most_tokens, peak, resized

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = {"trl compacted": "trl"} | {path: path for path in PATHS}
SEQUENCES = 4  # of benchmarks.cpu.sweep: two pairs


def measured() -> list[tuple[str, Batch, float]]:
    """(path, batch, bytes on top of the inputs); what was not measured is left out."""
    found = []

    def record(name: str) -> dict:
        return json.loads((RESULTS / f"2026-11-cpu-{name}.json").read_text())

    def add(row: dict, batch: Batch, growth: float) -> None:
        if row["path"] in NAMES:
            found.append((NAMES[row["path"]], batch, growth))

    for row in record("sweep")["rows"]:
        if row["MiB"] is not None:
            n, share = row["tokens"], row["prompt_share"]
            batch = Batch(
                n, row["vocab"], row["hidden"], 4, round(n / (1 - share)), SEQUENCES // 2, row["frozen"], True, False
            )
            add(row, batch, row["MiB"] * MIB + batch.dweight + batch.dhidden)
    for name, key in (("memory", "N"), ("memory-bf16", "N"), ("fits", "most tokens")):
        document = record(name)
        notes = document["notes"]
        item = {"float32": 4, "bfloat16": 2}[notes["dtype"]]
        for row in document["rows"]:
            sizes, frozen = (row[key], notes["V"], notes["H"]), notes["head"] == "frozen"
            batch = Batch(*sizes, item, frozen=frozen, reference=False, on_gpu=False)
            if name == "fits":
                grown = row["MiB then"] * MIB - batch.inputs
            else:
                grown = row["MiB"] * MIB + batch.dhidden + batch.dweight
            add(row, batch, grown)
    return found


@pytest.mark.parametrize("path", PATHS)
def test_within_15_percent_of_the_measured_memory_and_as_near_as_it_says(path):
    errors = [
        abs(peak(path, batch) / (batch.inputs + growth) - 1) for name, batch, growth in measured() if name == path
    ]
    assert len(errors) > 10
    assert max(errors) < 0.15
    assert PATHS[path].error - 0.03 < max(errors) <= PATHS[path].error


@pytest.mark.parametrize("path", ["eager", "trl", "liger"])
def test_what_a_peer_takes_on_top_is_as_near(path):
    """Without the inputs, which dilute an error."""
    errors = [abs(PATHS[path].growth(batch) / growth - 1) for name, batch, growth in measured() if name == path]
    assert max(errors) < 0.04


def test_fastdpo_on_a_gpu_is_counted_at_its_bound():
    batch = Batch(8192, 32000, 2048, reference=False)
    for path in ("fastdpo exact", "fastdpo routed"):
        assert peak(path, batch) == 4 * 2048 * (32000 + 8192) + 128 * MIB + 256 * 8192


def test_the_workspace_on_a_cpu_is_within_the_bound():
    for tokens, vocab, hidden in ((512, 32000, 64), (8192, 131072, 8192), (65536, 4096, 1024)):
        for frozen in (False, True):
            batch = Batch(tokens, vocab, hidden, 4, frozen=frozen, on_gpu=False)
            for path in ("fastdpo exact", "fastdpo routed"):
                workspace = PATHS[path].growth(batch) - batch.dweight - batch.dhidden
                assert 0 < workspace <= 128 * MIB + 256 * tokens


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_longest_context_is_the_last_that_fits(path, on_gpu):
    batch = Batch(1000, 50000, 512, 2, 1500, 2, on_gpu=on_gpu)
    n = longest(path, batch, 3 * GIB)
    assert n > 0
    assert peak(path, resized(batch, n)) <= 3 * GIB < peak(path, resized(batch, n + 2))
    assert resized(batch, 2000).all_rows == 3000
    assert longest(path, batch, 1 * MIB) == 0


def test_more_takes_more():
    batch = Batch(4096, 32000, 1024)
    for path in PATHS:
        assert peak(path, resized(batch, 8192)) > peak(path, batch)
        assert peak(path, Batch(4096, 32000, 1024, reference=False)) < peak(path, batch)
        assert peak(path, Batch(4096, 32000, 1024, frozen=True)) <= peak(path, batch)


def test_the_search():
    for limit in (0, 1, 2, 1000, 2**31):
        assert most_tokens(lambda n, limit=limit: n <= limit) == limit


def test_the_docs_say_the_same_errors():
    page = " ".join((RESULTS.parents[1] / "docs" / "commands.md").read_text().split())
    eager, trl, liger, exact, routed = (f"{PATHS[path].error:.0%}" for path in PATHS)
    said = f"at most {eager} for eager logits, {trl} for TRL, {liger} for Liger, {exact} and {routed} for fastdpo"
    assert list(PATHS) == ["eager", "trl", "liger", "fastdpo exact", "fastdpo routed"] and said in page
