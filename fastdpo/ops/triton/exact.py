"""The backward's exact kernel: dz of a slab of blocks by a chunk of tokens, then its products, in one launch that goes
from slab to slab on the device; and rows of dhidden from their fp32 sums.

Work is cut into items, which programs take in this order:

    per step (a slab and a chunk)   tiles of dz; then tiles of its products, which wait for all of that dz
    the next step's dz              waits for all of these, as it takes their place in memory
    at the end                      rows of dhidden, which wait for the last step

In a routed call whose pairs are few there are no steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import BLOCK, INTERPRET, VARYING, num_tokens
from .divergence.dz import pair_dz_tile, teacher_arguments
from .exact_tiles import (
    COLUMNS,
    ROWS,
    Outputs,
    Scales,
    Step,
    Work,
    bias_tile,
    by_token_tile,
    dz_tile,
    hidden_tile,
    of_head_tile,
)
from .items import finished, take, wait
from .launch import launch
from .sweep import Sweep


@triton.jit
def _fresh(x, multiple: tl.constexpr):
    """`x`, of which the compiler knows only what it is a multiple of: it then works out addresses where they are used,
    and not those of all items beforehand, for which there are no registers."""
    x //= multiple
    if not INTERPRET:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    return x * multiple


@triton.jit
def _tiles(rows, columns, form):
    return tl.cdiv(rows, form.BM) * tl.cdiv(columns, form.BN)


@triton.jit(do_not_specialize=VARYING)
def exact_kernel(
    hidden,
    weight,  # [V, H] in boxes [BN, BK] of dz_form: TMA descriptor or pointer
    operand,  # [V, H] in boxes [BK, BN] of hidden_form, likewise
    head,  # Columns
    low_rank,  # LowRank of the range's tokens
    transform,
    tokens,
    terms,  # RowTerms; with a teacher PairTerms
    ref_hidden,  # of a call of two heads the teacher's, or None; as the next four
    ref_weight,
    ref_head,
    ref_transform,
    ref_tokens,
    kind,
    scales,
    flag,  # [1] int32 or None: where it is not 0 there are no steps
    work,
    outputs,
    num_rows,
    first_token,  # the range
    capacity,
    first_block,
    last_block,
    chunk,  # tokens,
    slab,  # and blocks of a step
    dz_form,
    ref_form,  # of the teacher's products in a tile of dz
    hidden_form,
    weight_form,
    low_hidden_form,  # of products with the low-rank head's lora_b
    low_weight_form,  # and its product
):
    """A program takes one item after the other, each of which has its part of the results to itself."""
    n = num_tokens(tokens, first_token, capacity)
    chunk_tokens, columns = tl.minimum(chunk, n), slab * BLOCK
    slabs, chunks = tl.cdiv(last_block - first_block, slab), tl.maximum(tl.cdiv(n, chunk), 1)
    if flag is not None:
        slabs = tl.where(tl.load(flag) != 0, 0, slabs)
    # items of a full step, in their order; a smaller step does nothing in the last of each kind
    num_dz = _tiles(chunk_tokens, columns, dz_form)
    end_hidden = num_dz
    if outputs.hidden_sums is not None:
        end_hidden += _tiles(chunk_tokens, head.H, hidden_form)
    end_low_rank = end_hidden
    if outputs.low_rank_sums is not None:
        end_low_rank += _tiles(chunk_tokens, low_rank.lora_rank, low_hidden_form)
    end_weight = end_low_rank
    if outputs.weight is not None:
        end_weight += _tiles(columns, head.H, weight_form)
    end_bias = end_weight
    if outputs.bias is not None:
        end_bias += tl.cdiv(columns, COLUMNS)
    end = end_bias
    if outputs.lora_b is not None:
        end += _tiles(columns, low_rank.lora_rank, low_weight_form)
    end = tl.maximum(end, 1)
    steps = slabs * chunks
    total = steps * end
    if outputs.hidden is not None:
        total += tl.cdiv(num_rows, ROWS) * tl.cdiv(head.H, COLUMNS)
    item = take(work.done)
    while item < total:
        index, at = item // end, item % end
        dz_stride = _fresh(slab, 1) * BLOCK
        H = _fresh(head.H, work.multiple)
        if low_rank.product is not None:
            lora_rank = _fresh(low_rank.lora_rank, work.lora_multiple)
        done = work.done + 1 + 2 * index
        if item < steps * end:
            first_column = (first_block + index // chunks * slab) * BLOCK
            last_column = tl.minimum(tl.minimum(first_column + columns, last_block * BLOCK), head.V)
            at_token = index % chunks * chunk
            step = Step(
                at_token,
                tl.minimum(n - at_token, chunk_tokens),
                first_column,
                last_column,
                chunks - 1 - index % chunks,
            )
            if at < num_dz:
                if index > 0:
                    wait(done - 1, end - num_dz)
                if at < _tiles(step.num_tokens, last_column - first_column, dz_form):
                    if ref_hidden is None:
                        dz_tile(at, step, hidden, weight, head, H, low_rank, transform, tokens, terms, scales, work,
                                first_token, dz_stride, dz_form)  # fmt: skip
                    else:
                        pair_dz_tile(at, step, hidden, weight, head, H, low_rank, transform, ref_hidden, ref_weight,
                                     ref_head, ref_transform, kind, tokens, ref_tokens, terms, scales, work,
                                     first_token, dz_stride, dz_form, ref_form)  # fmt: skip
                finished(done)
            else:
                wait(done, num_dz)
                if outputs.hidden_sums is not None:
                    if at < end_hidden:
                        if at - num_dz < _tiles(step.num_tokens, H, hidden_form):
                            by_token_tile(at - num_dz, step, work, operand, outputs.hidden_sums, head.V, H,
                                           H, head.weight_stride, dz_stride, hidden_form)  # fmt: skip
                if outputs.low_rank_sums is not None:
                    if (at >= end_hidden) & (at < end_low_rank):
                        if at - end_hidden < _tiles(step.num_tokens, lora_rank, low_hidden_form):
                            by_token_tile(at - end_hidden, step, work, low_rank.lora_b, outputs.low_rank_sums, head.V,
                                           lora_rank, low_rank.pitch, lora_rank, dz_stride,
                                           low_hidden_form)  # fmt: skip
                if outputs.weight is not None:
                    if (at >= end_low_rank) & (at < end_weight):
                        if at - end_low_rank < _tiles(last_column - first_column, H, weight_form):
                            of_head_tile(at - end_low_rank, step, hidden, None, tokens, work, scales, work.weight,
                                          outputs.weight, outputs.adds, H, first_token, dz_stride,
                                          weight_form)  # fmt: skip
                if outputs.bias is not None:
                    if (at >= end_weight) & (at < end_bias):
                        bias_tile(at - end_weight, step, work, scales, outputs.bias, dz_stride, dz_form.BM)
                if outputs.lora_b is not None:
                    if at >= end_bias:
                        if at - end_bias < _tiles(last_column - first_column, lora_rank, low_weight_form):
                            of_head_tile(at - end_bias, step, low_rank.product, low_rank.pitch, tokens, work, scales,
                                          work.lora_b, outputs.lora_b, False, lora_rank, first_token, dz_stride,
                                          low_weight_form)  # fmt: skip
                finished(done + 1)
        else:
            if outputs.hidden is not None:
                if steps > 0:
                    wait(work.done + 2 * steps, end - num_dz)
                hidden_tile(item - steps * end, low_rank, tokens, scales, outputs, num_rows, first_token, capacity,
                             H)  # fmt: skip
        item = take(work.done)


def _kinds(sweep: Sweep) -> tuple[str | None, str | None, str | None]:
    """Of the tiles of dz, dhidden and dweight: others than the call's where what shares the kernel takes registers, as
    a low-rank head's three products do, a bias, a softcap, the entropy's terms, sums over several chunks, or a
    sum that is added to."""
    call = sweep.call
    more = call.lora_rank or call.bias is not None or call.transform.softcap is not None
    if (call.kind == "fp32" and more) or (call.kind == "narrow" and call.lora_rank):
        return "crowded", "crowded", "crowded"
    if call.kind != "half":
        return None, None, None
    several = sweep.tokens.capacity > sweep.part.slab[0]
    entropy = sweep.terms.coef_entropy is not None
    wanted = entropy, call.lora_rank, more or several or entropy or sweep.adds.value
    kinds = ["narrow" if x else None for x in wanted]
    if several and call.vocab_size % 16:  # whose last rows take registers, too
        kinds[2] = "crowded"
    return tuple(kinds)


def exact(sweep: Sweep, blocks: range, flag: Tensor | None, out_hidden: Tensor | None) -> None:
    """The exact gradients of these blocks, unless `flag` says that the routed kernels have made them; and with the last
    blocks of a sweep the rows of dhidden."""
    call, (chunk, slab) = sweep.call, sweep.part.slab
    slab = min(slab, len(blocks))
    dz_kind, hidden_kind, weight_kind = _kinds(sweep)
    columns, low_columns = call.hidden_size, call.low_rank_pitch or 16
    for_dz, for_hidden = call.tile("dz", kind=dz_kind), call.tile("dhidden", columns, hidden_kind)
    dz_form, weight = call.form(for_dz, (call.weight, for_dz.n, for_dz.k))
    hidden_form, operand = call.form(for_hidden, (call.weight, for_hidden.k, for_hidden.n))
    (weight_form,) = call.form(call.tile("dweight", columns, weight_kind))
    (low_hidden_form,) = call.form(call.tile("dhidden", low_columns, "low_rank"), compute=tl.float32)
    (low_weight_form,) = call.form(call.tile("dweight", low_columns, "low_rank"), compute=tl.float32)

    def make(wanted: bool, *shape: int, dtype=torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=call.device) if wanted else None

    width, several = slab * BLOCK.value, sweep.tokens.capacity > chunk
    work = Work(
        sweep.done,
        make(True, chunk, width, dtype=call.dtype),
        make(sweep.dbias is not None, triton.cdiv(chunk, for_dz.m), width),
        make(several and sweep.dweight is not None, width, call.hidden_size),
        make(several and sweep.dbias is not None, width),
        make(several and sweep.dlora_b is not None, width, call.lora_rank),
        *(tl.constexpr(16 if size % 16 == 0 else 1) for size in (call.hidden_size, call.lora_rank)),
    )
    outputs = Outputs(out_hidden, sweep.dweight, sweep.dbias, sweep.dlora_b, sweep.dhidden, sweep.dlow_rank, sweep.adds)
    launch(
        exact_kernel,
        call.grid(for_dz),
        for_dz,
        hidden=call.hidden,
        weight=weight,
        operand=operand,
        head=call.columns,
        low_rank=sweep.low_rank,
        transform=call.transform,
        terms=sweep.terms,
        **teacher_arguments(sweep, for_dz, for_dz.n),
        scales=Scales(sweep.dz_scale, sweep.unscale),
        flag=flag,
        work=work,
        outputs=outputs,
        num_rows=call.num_rows,
        first_block=blocks.start,
        last_block=blocks.stop,
        chunk=chunk,
        slab=slab,
        dz_form=dz_form,
        hidden_form=hidden_form,
        weight_form=weight_form,
        low_hidden_form=low_hidden_form,
        low_weight_form=low_weight_form,
        **sweep.tokens._asdict(),
    )
