"""What tools/ makes of the cost model: what-ifs of the backward, live pairs of a head, the tables of docs/costs.md."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from fastdpo.costs.gpus import GPUS, Gpu
from fastdpo.costs.steps import Shape, step_cost
from tools import dense

H100 = GPUS["H100"]


@cache
def target(gpu: Gpu):
    from fastdpo.ops.triton.launch import Target

    return Target(gpu.capability, gpu.multiprocessors)


def routed(shape: Shape, live, gpu: Gpu = H100, **options):
    options = {"frozen": False, "backward": "routed", "tau": None, "target": target(gpu), "cache": gpu.cache} | options
    return step_cost(shape, live, live, **options)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sizes", [(2048, 32000, 2048), (8192, 32000, 4096)])
def test_the_what_if_starts_from_what_is_launched(sizes, frozen):
    """Without dense blocks its products are those of the recorded launches."""
    shape = Shape(*sizes)
    live = torch.linspace(1, 0.9 * shape.num_tokens, 250).floor()
    launched = routed(shape, live, frozen=frozen, parts=("backward",)).kernels
    modelled = dense.backward(shape, live, H100, frozen=frozen).kernels
    assert set(modelled) == {name for name in launched if name.startswith("routed") and launched[name].flops}
    for name, cost in modelled.items():
        assert cost.flops == pytest.approx(launched[name].flops, rel=0.02)
        assert cost.l2 == pytest.approx(launched[name].l2, rel=0.02)
        assert cost.bytes == pytest.approx(launched[name].bytes, rel=0.1)


def test_dense_blocks_take_their_pairs_out_of_the_lists():
    shape = Shape(4096, 32000, 2048)
    live = torch.full((250,), 16.0)
    live[:40] = 0.95 * shape.num_tokens
    before, after = (dense.backward(shape, live, H100, dense.Plan(f)) for f in (1.0, 0.5))
    assert after.blocks == 40 and after.share == pytest.approx(live[:40].sum() / live.sum())
    assert before.blocks == 0 and "dz" not in before.kernels
    assert after.kernels["dz"].flops >= 2 * 4096 * 40 * 128 * 2048
    assert after.kernels["routed_dz"].flops < before.kernels["routed_dz"].flops / 5
    assert after.expected(H100) < before.expected(H100)


def test_slabs_cover_the_columns():
    for columns in (128, 40 * 128, 1000 * 128):
        widths = dense.slabs_of(columns, 8192, 2, 0)
        assert sum(widths) == columns and all(width > 0 and width % 128 == 0 for width in widths)


def test_live_pairs_of_other_vocabularies(tmp_path):
    from benchmarks.inputs import synthetic_head
    from tools.live import SCALINGS, live_pairs

    head = synthetic_head(256, 4096, 256)
    counts = {scaling: live_pairs(head, Shape(512, 16384, 256), 1e-2, scaling) for scaling in SCALINGS}
    assert all(len(found) == 128 for found in counts.values())
    assert counts["first"].sum() == pytest.approx(counts["same"].sum().item())
    assert counts["first"][32:].sum() == 0 and counts["first"].max() > 3 * counts["same"].max()
    assert counts["split"].sum() > counts["same"].sum()


def test_the_tables_are_printed(capsys, monkeypatch):
    from benchmarks.inputs import synthetic_head
    from tools import cost_tables, count_step

    head = synthetic_head(128, 2048, 256)
    monkeypatch.setattr(count_step.inputs, "load", lambda path: head)
    for arguments, columns in ((["--table", "first"], 13), (["--dense"], 9), (["--rates"], 11)):
        monkeypatch.setattr("sys.argv", ["count_step", *arguments, "--shape", "512", "4096", "512"])
        count_step.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert lines[0].count("|") >= columns
        assert all(any(name in line for line in lines) for name in GPUS)
    assert cost_tables.folds_of(GPUS["A100"]) != cost_tables.folds_of(H100)
    assert math.isfinite(H100.clock)


def test_tables_replace_those_in_the_docs(tmp_path):
    from tools.count_step import write_docs

    page = tmp_path / "costs.md"
    page.write_text("a\n<!-- table -->\nold\n<!-- end -->\nb\n<!-- rates -->\n<!-- end -->\nc\n")
    for lines in (["new", "er"], ["newer"]):
        write_docs(page, {"table": lines, "rates": ["x"]})
        expected = ["a", "<!-- table -->", *lines, "<!-- end -->", "b", "<!-- rates -->", "x", "<!-- end -->", "c"]
        assert page.read_text().splitlines() == expected


def test_the_page_has_a_place_for_every_table():
    page = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()
    for name in ("table", "dense", "rates"):
        inside = page.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]
        assert all(gpu in inside for gpu in GPUS)
