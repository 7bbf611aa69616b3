"""A call of two heads: the student's, with tiles that hold both heads' products, and beside it the teacher's."""

from __future__ import annotations

from ...divergence.problem import Heads
from ...problem import Rows
from ..call import Call
from ..launch import Tile, tile

_COSTLIER = ("short", "half", "narrow", "fp32", "unaligned")
_OF_BOTH = {"dz": "divergence_dz", "routed_dz": "divergence_routed_dz"}


class TwoHeads(Call):
    def __init__(self, heads: Heads, rows: Rows):
        if not heads.labelled:  # which only says what counts: a label of no column
            most = max(2, rows.vocab_size)  # a mask's are 0 and 1
            rows = rows.replace(vocab_start=most, vocab_size=most)
        super().__init__(heads.student, rows)
        self.heads, self.teacher = heads, Call(heads.teacher, rows)
        kinds = self.recomputing_kind, self.teacher.recomputing_kind
        self.kind_of_both = max(kinds, key=_COSTLIER.index)

    def fold_tile(self, jsd: bool, routed: bool) -> Tile:
        """`jsd`: of its second sweep."""
        kind = self.kind_of_both
        if kind not in ("fp32", "unaligned"):
            kind = "jsd" if jsd else "routed" if routed else "narrow" if kind == "narrow" else "half"
        return tile("divergence_fold", self.target, kind)

    def tile(self, kernel: str, out_columns: int | None = None, kind: str | None = None) -> Tile:
        if kernel in _OF_BOTH:
            return tile(_OF_BOTH[kernel], self.target, self.kind_of_both)
        return super().tile(kernel, out_columns, kind)
