"""What is launched: nothing in it waits for the device; kernels say what they do, and take what they need by name."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re

import pytest
import torch
import triton

from fastdpo.head import LoRA, Routing
from fastdpo.ops import triton as wing
from fastdpo.ops.problem import FOLDED, Forward, Head, Needs, Rows, Upstream
from fastdpo.ops.triton import backward
from fastdpo.ops.triton import launch as launching
from fastdpo.ops.triton.forward import forward
from fastdpo.ops.triton.launch import Recorder, Target, Tile, launch
from fastdpo.routing import BLOCK

OPTIONS = {
    "exact": {},
    "routed": {"routed": True},
    "everything": {"routed": True, "extras": True, "stats": frozenset(FOLDED)},
    "entropy": {"extras": True, "entropy": True, "stats": frozenset(("entropy",))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_waits_for_the_device(options):
    """On tensors without values every read of one raises: sizes and branches come from shapes alone."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    extras = options.get("extras", False)
    N, V, H = 5000, 50000, 256
    head = Head(
        meta(N, H),
        meta(V, H),
        meta(V) if extras else None,
        LoRA(meta(8, H), meta(V, 8), 2.0) if extras else None,
        compute_dtype=torch.bfloat16,
    )
    rows = Rows(meta(N, dtype=torch.int64), -100, 0, V)
    key = Routing.of(2.0**-10, 2.0**-12, meta(dtype=torch.int64)) if options.get("routed") else None
    needs = Needs(True, True, extras, extras, extras)
    with Recorder(Target(90, 132)) as launches:
        saved = forward(head, rows, stats=options.get("stats", frozenset()), routing=key, shards=None)
        coef = meta(N, dtype=torch.float32)
        upstream = Upstream(coef, coef if options.get("entropy") else None)
        grads = backward.backward(head, rows, saved, upstream, key, needs)
    assert isinstance(saved, Forward) and grads.weight.shape == (V, H)
    names = {kernel.__name__ for kernel, *_ in launches}
    assert {"compact_kernel", "fold_kernel", "finish_kernel", "exact_kernel"} <= names
    assert ("routed_dz_kernel" in names) == (key is not None)


KIB = 1024
CARDS = [  # capability, shared memory of a program, whose tiles
    (80, 163, 80), (86, 99, 120), (87, 163, 80), (89, 99, 120), (90, 227, 90), (100, 227, 100), (103, 227, 100),
    (110, 227, 80), (120, 99, 120), (121, 99, 120), (130, 227, 120), (90, 99, 120), (100, None, 100), (86, None, 120),
    (0, None, 0),
]  # fmt: skip


@pytest.mark.parametrize("capability, memory, tiles", CARDS)
def test_a_card_gets_tiles_that_fit(capability, memory, tiles):
    """Also one that nobody has seen, and one whose driver leaves less than its family has."""
    assert Target(capability, 1, memory and memory * KIB).tiles == tiles


def test_tiles_of_logits_are_of_whole_blocks():
    """What is stored by block is not stored at all where a tile holds less than one."""
    for kernel, kinds in launching._TILES.items():
        for tiles in kinds.values():
            for tile in (*tiles.values(), launching._INTERPRETED[kernel]):
                assert kernel not in launching.OF_LOGITS or tile.n % BLOCK == 0, (kernel, tile)
    for (kernel, *_), tile in launching._SINCE[3, 9].items():
        assert kernel not in launching.OF_LOGITS or tile.n % BLOCK == 0, (kernel, tile)


@pytest.mark.parametrize("release, newer", [((3, 6), False), ((3, 8), False), ((3, 9), True), ((3, 12), True)])
def test_a_tile_that_newer_releases_spill_is_replaced_from_then_on(monkeypatch, release, newer):
    monkeypatch.setattr(launching, "_RELEASE", release)
    for (kernel, kind, architecture), tile in launching._SINCE[3, 9].items():
        chosen = launching.tile(kernel, Target(architecture, 1), kind)
        assert chosen == (tile if newer else launching._TILES[kernel][kind][architecture])


def kernels() -> dict:
    found = {}
    for module in pkgutil.iter_modules(wing.__path__):
        members = vars(importlib.import_module(f"{wing.__name__}.{module.name}"))
        found |= {name: x for name, x in members.items() if name.endswith("_kernel")}
    return found


@pytest.mark.parametrize("name", kernels())
def test_a_kernel_stands_beside_its_launcher_and_says_what_a_program_does(name):
    function = kernels()[name].fn
    assert re.search(rf"launch(_dz)?\(\s*{name},", inspect.getsource(inspect.getmodule(function)))
    doc = inspect.getdoc(function).lower()
    assert "program" in doc or doc.startswith("routed_dz_kernel of")
    # the exact kernel takes a second head's operands beside the first's
    assert len(inspect.signature(function).parameters) <= (31 if name == "exact_kernel" else 25)


def test_fusion_of_floating_point_operations_is_asked_for():
    """Triton 3.10 will not fuse by default: other code than the one that is checked, and other bits."""
    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda **options: given.update(options)

    launch(Kernel(), (1,), warps=2)
    assert given == {"num_warps": 2, "num_stages": 2, "enable_fp_fusion": True}


def test_launches_are_by_keyword():
    """A kernel's arguments by position would be taken for its tile."""
    taken = inspect.signature(launch).parameters
    assert [x.kind.name for x in taken.values()] == [*["POSITIONAL_OR_KEYWORD"] * 3, "KEYWORD_ONLY", "VAR_KEYWORD"]
    assert list(taken)[:3] == ["kernel", "grid", "tile"]


def entry(**changed) -> dict:
    tile = {"m": 64, "n": 128, "k": 32, "warps": 4, "stages": 2, "group": 8, "per_sm": 1, **changed.pop("tile", {})}
    return {"kernel": "fold", "kind": "half", "capability": 90, "triton": triton.__version__, "tile": tile, **changed}


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "TUNED", tmp_path / "tuned.json")

    def write(*entries):
        launching.TUNED.write_text(json.dumps(entries))
        launching.tuned.cache_clear()

    yield write
    launching.tuned.cache_clear()


def test_a_measured_tile_serves_what_it_was_measured_for(table):
    def tile_of(kernel="fold", capability=90, kind="half", columns=None):
        return launching.tile(kernel, Target(capability, 132), kind, columns)

    def every() -> dict:
        kinds = {(kernel, c, kind) for kernel in ("fold", "dz") for c in (80, 90, 100) for kind in ("half", "short")}
        return {key: tile_of(*key) for key in kinds}

    table()
    before = every()
    table(entry())
    assert {key for key, tile in every().items() if tile != before[key]} == {("fold", 90, "half")}
    assert tile_of() == Tile(64, 128, 32, 4, 2) and tile_of(columns=32).n == 32
    table(entry(triton="1.0.0"))  # another release makes other code
    assert every() == before


@pytest.mark.parametrize(
    "wrong",
    [{"kernel": "flod"}, {"tile": {"m": 65}}, {"tile": {"n": 64}}, {"tile": {"stages": 0}}, {"tile": {"x": 1}},
     {"triton": None}],
)  # fmt: skip
def test_a_wrong_entry_is_named(table, wrong):
    good, bad = entry(), entry(**wrong)
    table(good, {key: value for key, value in bad.items() if value is not None})
    with pytest.raises(ValueError, match=r"tuned\.json, entry 1"):
        launching.tile("fold", Target(90, 132), "half")
