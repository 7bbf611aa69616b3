"""The cost model: every rate has a source, counts by hand, and expected times that are never below the floor."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tools import dense, kernel_costs
from tools.cost_model import Shape, step_cost
from tools.gpus import GPUS, KINDS, SOURCES, Gpu
from tools.kernel_costs import OVERLAPPED, Cost, Epilogue, Tile

NONE = Epilogue(0)
TILE = Tile(128, 256, 64)
H100 = GPUS["H100"]


@cache
def target(gpu: Gpu):
    from fastdpo.ops.triton.launch import Target

    return Target(gpu.capability, gpu.multiprocessors)


def routed(shape: Shape, live, gpu: Gpu = H100, **options):
    options = {"frozen": False, "backward": "routed", "tau": None, "target": target(gpu), "cache": gpu.cache} | options
    return step_cost(shape, live, live, **options)


@pytest.mark.parametrize("name", GPUS)
def test_every_rate_names_its_source(name):
    assert set(SOURCES[name]) == {field.name for field in fields(Gpu)}
    for text in SOURCES[name].values():
        assert text.startswith(KINDS)
        assert text.split(":")[0] == "data sheet" or len(text) > 30, "what was published, by whom; what was estimated"
    gpu = GPUS[name]
    assert gpu.clock <= gpu.boost
    assert gpu.flops < gpu.per_clock * gpu.multiprocessors * gpu.boost * 1.1
    assert gpu.bandwidth < gpu.l2


def test_a_product_by_hand():
    """256 x 512 by 64: 4 tiles on 3 multiprocessors, two rounds, each reads 128 + 256 rows of 64 numbers of 2 bytes."""
    cost = kernel_costs.product(256, 512, 64, TILE, 3, 2, Epilogue(32, 0))
    assert cost.flops == 2 * 256 * 512 * 64
    assert cost.l2 == 4 * (128 + 256) * 64 * 2
    assert cost.idle == 2 * cost.flops / 4
    assert cost.after == 6 * 128 * 256 * 32 / (32 * kernel_costs.ISSUE) and cost.beside == 0
    assert cost.fills == 2
    ragged = kernel_costs.product(257, 513, 64, TILE, 3, 2, NONE)
    assert ragged.flops == 2 * 384 * 768 * 64  # padding is paid for


def test_multicast_and_overlap():
    shared = kernel_costs.product(256, 512, 64, TILE._replace(multicast=2), 3, 2, OVERLAPPED)
    assert shared.l2 == 4 * (128 + 128) * 64 * 2
    assert shared.after == 0 and shared.fills == 0 and shared.beside > 0
    two = kernel_costs.product(256, 512, 64, TILE._replace(per_sm=2), 3, 2, Epilogue(6, 1))
    assert two.after == 0 and two.beside == shared.beside


def test_exponentials_bound_a_short_epilogue():
    assert Epilogue(1, 1).clocks == 1 / kernel_costs.EXPS
    assert Epilogue(18, 1).clocks == 18 / (32 * kernel_costs.ISSUE)


def test_the_time_of_a_kernel():
    gpu = Gpu(100.0, 10.0, 1.0, l2=50.0, cache=0, multiprocessors=1, boost=1e9, per_clock=1)
    assert gpu.clock == pytest.approx(100 / 0.92)
    cost = Cost(flops=300.0, bytes=20.0, launches=2, l2=100.0, idle=100.0, after=gpu.clock)
    assert cost.floor(gpu) == 3 + 2
    assert cost.expected(gpu) == pytest.approx(4 + 1 + 2)
    assert replace(cost, l2=500.0).expected(gpu) == pytest.approx(10 + 1 + 2)
    assert replace(cost, bytes=500.0).expected(gpu) == pytest.approx(50 + 1 + 2)
    assert replace(cost, after=0.0, beside=9 * gpu.clock).expected(gpu) == pytest.approx(9 + 2)
    assert [replace(cost, **{name: 1e9}).bound(gpu) for name in ("l2", "bytes", "idle")] == ["L2", "memory", "tensor"]


def test_atomics_count_both_ways_and_in_memory_where_the_cache_is_small():
    lengths, tile = torch.tensor([64.0, 32.0, 0.0]), Tile(64, 128, 128)
    sizes = (lengths, 1024, 256, tile, 8, 2, NONE)
    kept, lost = (kernel_costs.routed_dhidden(*sizes, size) for size in (1e9, 0))
    assert kept.l2 == lost.l2 == 2 * 2 * (64 + 128) * 128 * 2 + 8 * 96 * 256
    assert kept.flops == 2 * 128 * 128 * 256
    assert kept.bytes <= lost.bytes
    again = kernel_costs.routed_dhidden(lengths * 100, *sizes[1:], 0)
    assert again.bytes > 8 * 9600 * 256  # more pairs than tokens: rows come and go once per pair


@pytest.mark.parametrize("name", GPUS)
def test_expected_times_are_not_below_the_floor(name):
    gpu, shape = GPUS[name], Shape(2048, 32000, 2048)
    live = torch.full((250,), 200.0)
    step = routed(shape, live, gpu)
    assert step.floor(gpu) < step.expected(gpu) < 3 * step.floor(gpu)
    for kernel in step.kernels.values():
        assert kernel.floor(gpu) <= kernel.expected(gpu)


def test_a_better_fold_is_an_earlier_end():
    shape, live = Shape(4096, 32000, 1024), torch.full((250,), 300.0)
    times = [
        routed(shape, live, fold=fold, multicast=multicast).expected(H100)
        for fold, multicast in ((Epilogue(18, 1), 1), (None, 1), (OVERLAPPED, 1), (OVERLAPPED, 2))
    ]
    assert times == sorted(times, reverse=True) and times[0] > times[2]


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
