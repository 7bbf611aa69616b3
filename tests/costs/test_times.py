"""Times of a step, by the count model: those of docs/costs.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastdpo.costs.gpus import GPUS
from fastdpo.costs.memory import PATHS, Batch
from fastdpo.costs.peers import ALGORITHMS
from fastdpo.costs.times import against_published, expected, two_products

DOCS = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()
BATCH = Batch(2048, 32000, 2048)


def documented(shape: str, gpu: str) -> dict[str, float]:
    """Of the table `same`, the first: times over two products by column."""
    table = DOCS.partition("<!-- table -->")[2].partition(f"**{shape}**")[2].partition("\n\n**")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    (row,) = [line for line in lines if line[0] == gpu]
    return {name: float(cell) for name, cell in zip(lines[0][1:], row[1:]) if cell}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("sizes", [(8192, 131072, 4096), (2048, 32000, 2048)])
def test_fastdpos_is_the_documented_one(gpu, sizes):
    pytest.importorskip("triton")
    known = documented(str(sizes), gpu)
    batch = Batch(*sizes)
    products = two_products(batch, GPUS[gpu])
    assert products * 1e3 == pytest.approx(known["two products, ms"], abs=0.006)
    assert expected("fastdpo routed", batch, GPUS[gpu]) / products == pytest.approx(known["step plain"], rel=0.02)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("path", ["eager", "trl", "liger"])
def test_a_peers_is_the_documented_one(gpu, path):
    known = documented("(2048, 32000, 2048)", gpu)
    products = two_products(BATCH, GPUS[gpu])
    assert expected(path, BATCH, GPUS[gpu]) / products == pytest.approx(known[path], abs=0.006)


def test_prompts_cost_those_who_compute_them():
    gpu, prompts = GPUS["H100"], Batch(2048, 32000, 2048, rows=4096)
    for path in ("eager", "liger"):
        assert expected(path, prompts, gpu) == pytest.approx(2 * expected(path, BATCH, gpu))
    assert expected("trl", prompts, gpu) == expected("trl", BATCH, gpu)


def test_a_frozen_head_and_no_reference_save_time():
    pytest.importorskip("triton")
    gpu = GPUS["H200"]
    for path in PATHS:
        whole = expected(path, BATCH, gpu)
        assert expected(path, Batch(2048, 32000, 2048, frozen=True), gpu) < whole
        assert expected(path, Batch(2048, 32000, 2048, reference=False), gpu) < whole
    assert expected("fastdpo routed", BATCH, gpu) < expected("fastdpo exact", BATCH, gpu)


def test_without_triton_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdpo.ops.triton.launch", None)
    with pytest.raises(ImportError, match="pip install triton"):
        expected("fastdpo exact", BATCH, GPUS["H100"])


def test_published_times_stand_beside_the_peers():
    (one,) = against_published("trl")
    assert re.fullmatch(r"0\.\d\d of the published 167 ms on an H100 \(huggingface/trl#7244\)", one)
    assert len(against_published("eager")) == 2 and against_published("liger") == []
    assert set(PATHS) - {"fastdpo exact", "fastdpo routed"} <= set(ALGORITHMS)
