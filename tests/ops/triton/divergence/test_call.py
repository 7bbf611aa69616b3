"""Tiles of calls of two heads, and labels that are none."""

from __future__ import annotations

import torch
from triton_divergence_case import Case

from fastdpo.ops.triton.divergence.call import TwoHeads
from fastdpo.ops.triton.launch import Recorder, Target, tile


def test_tiles_follow_the_costlier_of_the_two_heads():
    with Recorder(Target(90, 132)):
        half = TwoHeads(Case(dtype=torch.float16, H=32, ref_H=32).heads, Case().rows)
        mixed = TwoHeads(Case(dtype=torch.float16, ref_dtype=torch.float32, H=32, ref_H=32).heads, Case().rows)
        odd = TwoHeads(Case(dtype=torch.float16, H=33, ref_H=32).heads, Case().rows)
        target = half.target
        for call, kind in ((half, "half"), (mixed, "fp32"), (odd, "unaligned")):
            assert call.tile("dz", kind="crowded") == tile("divergence_dz", target, kind)
            assert call.pair_tile == tile("divergence_routed_dz", target, kind).m
            assert call.tile("routed_dweight") == tile("routed_dweight", target, call.kind)
        assert half.fold_tile(jsd=True, routed=True) == tile("divergence_fold", target, "jsd")
        assert mixed.fold_tile(jsd=True, routed=True) == tile("divergence_fold", target, "fp32")


def test_a_mask_has_no_label_in_any_column():
    for value in (0, 1):  # 1 where 0 says that a row is ignored
        case = Case(labelled=False)
        rows = case.rows.replace(labels=torch.full_like(case.rows.labels, value))
        call = TwoHeads(case.heads, rows)
        assert value - call.rows.vocab_start < 0 and value < call.rows.vocab_size
        assert call.teacher.rows is call.rows
