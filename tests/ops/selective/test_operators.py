"""The operators of selective_log_softmax are what torch.library asks for."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastdpo.ops.selective.operators import selective_backward_op, selective_op


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("columns", [(), (3,)], ids=["one column", "several"])
def test_opcheck_of_selective_log_softmax(engine, columns, with_entropy):
    logits, index = torch.randn(6, 40, requires_grad=True), torch.randint(0, 40, (6, *columns))
    index[1] = -100
    opcheck(selective_op, (logits, index, 0.7, with_entropy))
    *_, logps, lse, entropy = selective_op(logits.detach(), index, 0.7, with_entropy)
    dlogps, dentropy = torch.randn(2, *index.shape)
    of_entropy = (entropy, dlogps, dentropy) if with_entropy else (None, dlogps, None)
    opcheck(selective_backward_op, (logits.detach(), index, logps, lse, *of_entropy, 0.7))
