"""The fold for Hopper: its own source, executed by the stand-in, against fp64; and that wrong sources are found."""

from __future__ import annotations

import pytest
import torch
from gluon_stand_in import Fault, run

from fastdpo.head import LogitTransform, LoRA
from fastdpo.ops.problem import Head, Rows
from fastdpo.ops.triton import hopper
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import LowRank, TokenList, TokenRange
from fastdpo.ops.triton.launch import Recorder, Target
from fastdpo.ops.triton.stats import BlockSums

SHAPES = {  # (N, V, H): tiles of 128 x 256, steps of 64, 4 stages
    "one step": (150, 300, 40),
    "fewer steps than stages": (256, 512, 128),
    "as many": (130, 700, 256),
    "more": (300, 1000, 320),
    "twice and one more": (70, 257, 576),
    "two groups of tiles": (1100, 300, 64),
    "a column": (1, 1, 8),
}


class Problem:
    """Tokens [first, first + capacity) of `tokens` in all; NaN where nothing was written."""

    def __init__(self, N, V, H, dtype=torch.bfloat16, seed=0, first=0, capacity=None, programs=2, **transform):
        torch.manual_seed(seed)
        capacity = capacity or N
        self.hidden, self.weight = torch.randn(capacity, H).to(dtype), torch.randn(V, H).mul(2 / H**0.5).to(dtype)
        self.labels = torch.randint(0, V, (first + capacity,), dtype=torch.int32)
        self.labels[first :: max(1, N // 5)] = -1  # on another shard
        self.labels[first + 1 :: max(1, N // 3)] = V + 2
        self.first, self.existing, self.programs = first, N, programs
        self.transform = LogitTransform(**transform)

    def call(self) -> Call:
        head = Head(self.hidden, self.weight, None, None, self.transform, self.hidden.dtype)
        return Call(head, Rows(self.labels, -100, 0, len(self.weight)))

    def outputs(
        self, seed: int = 0, changes: dict | None = None, form: str = "64x4"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-sum-exp of every block, label's logit)."""
        capacity = len(self.hidden)
        with Recorder(Target(90, self.programs)) as launches:
            call = self.call()
            lse = torch.full((capacity, call.num_blocks), torch.nan)
            label_logit = torch.full((capacity,), -torch.inf)
            count = torch.tensor([self.first + self.existing], dtype=torch.int32)
            tokens = TokenRange(TokenList(labels=self.labels, count=count), self.first, capacity)
            hopper.fold(call, tokens, self.hidden, LowRank(), label_logit, BlockSums(lse, *[None] * 5), form)
        ((kernel, grid, arguments, *_),) = launches
        run(kernel, grid, arguments, seed=seed, changes=changes)
        return lse, label_logit

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        V, transform = len(self.weight), self.transform
        z = self.hidden.double() @ self.weight.double().T * transform.scale / transform.temperature
        own = torch.arange(V) == self.labels[self.first :, None]
        label_logit = torch.where(own, z, 0.0).sum(1)
        label_logit[~own.any(1)] = -torch.inf
        rest = torch.nn.functional.pad(z.masked_fill(own, -torch.inf), (0, -V % 128), value=-torch.inf)
        lse = rest.view(len(z), -1, 128).logsumexp(2)
        lse[self.existing :], label_logit[self.existing :] = torch.nan, -torch.inf
        return lse, label_logit

    def check(self, **options) -> None:
        for ours, expected in zip(self.outputs(**options), self.expected()):
            torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("form", hopper.FORMS)
@pytest.mark.parametrize("programs", [1, 2, 7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_and_label_logits(shape, programs, form):
    Problem(*shape, programs=programs).check(form=form)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fp16(shape):
    Problem(*shape, dtype=torch.float16).check()


def test_a_block_with_the_edge_and_no_label():
    problem = Problem(200, 700, 320)
    problem.labels.clamp_(max=500)
    problem.check()


@pytest.mark.parametrize("seed", range(1, 13))
def test_whatever_partition_is_faster(seed):
    form = list(hopper.FORMS)[seed % len(hopper.FORMS)]
    Problem(300, 1000, 320, seed=seed).check(seed=100 * seed, form=form)


def test_a_range_of_tokens_some_of_which_do_not_exist():
    Problem(133, 300, 128, first=77, capacity=272).check()
    Problem(0, 300, 128, first=16, capacity=144).check()


def test_scale_and_temperature():
    Problem(140, 300, 64, scale=0.37, temperature=1.7).check()


@pytest.mark.parametrize("size", [1e4, 1e9, 1e20, 1e34])
def test_logits_of_any_size(size):
    problem = Problem(140, 300, 64, scale=0.7)
    problem.hidden[::2] *= size
    lse, label_logit = problem.outputs()
    expected, expected_label = problem.expected()
    assert lse.isfinite().all()
    torch.testing.assert_close(lse.double(), expected, rtol=3e-6, atol=3e-5)
    torch.testing.assert_close(label_logit.double(), expected_label, rtol=3e-6, atol=3e-5)


def test_rows_without_a_finite_logit_stay_alone():
    problem = Problem(140, 300, 64)
    problem.weight[:, 0] = -1
    problem.hidden[3], problem.hidden[70] = torch.nan, 0
    problem.hidden[70, 0] = torch.inf  # times -1, in every column
    problem.hidden[71] = 0
    problem.hidden[71, 0] = -torch.inf
    lse, label_logit = problem.outputs()
    expected, expected_label = problem.expected()
    assert lse[3].isnan().all() and (lse[70] == -torch.inf).all() and not lse[71].isfinite().any()
    for one in (3, 71):
        lse[one] = expected[one] = 0
    torch.testing.assert_close(lse.double(), expected, rtol=2e-6, atol=3e-5)
    torch.testing.assert_close(label_logit.double(), expected_label, rtol=2e-6, atol=3e-5, equal_nan=True)


FULL, EMPTY = (
    "mbarrier.wait(ring.full.index(stage), turn & 1)",
    "mbarrier.wait(ring.empty.index(stage), (turn & 1) ^ 1)",
)
GIVE_BACK = "mbarrier.arrive(ring.empty.index((step + STAGES - 1) % STAGES), count=1"
LAST = f"{GIVE_BACK})"
WRONG = {
    "reads before a stage is full": {FULL: FULL.replace("turn & 1", "(turn & 1) ^ 1")},
    "does not wait for a full stage": {FULL: "pass"},
    "fills in the wrong phase": {EMPTY: EMPTY.replace("(turn & 1) ^ 1", "turn & 1")},
    "fills what is read": {EMPTY: "pass"},
    "phases that do not turn": {"step // STAGES": "0"},
    "phases that turn too often": {"step // STAGES": "step"},
    "forgets the last stage": {LAST: "pass"},
    "gives nothing back": {f"{GIVE_BACK}, pred=k > 0)": "pass"},
    "gives back twice": {LAST: f"{LAST}; {LAST}"},
    "gives back a stage in use": {
        "(step + STAGES - 1) % STAGES), count=1, pred=k > 0": "stage), count=1",
        LAST: "pass",
    },
    "does not wait for a product": {"num_outstanding=1": "num_outstanding=2"},
    "takes an accumulator in use": {"num_outstanding=0": "num_outstanding=1"},
    "one reader is enough": {
        "mbarrier.init(ring.empty.index(stage), count=2)": "mbarrier.init(ring.empty.index(stage), 1)"
    },
    "expects too few bytes": {"2 * hidden.block_type.nbytes": "hidden.block_type.nbytes"},
    "expects too many bytes": {"2 * hidden.block_type.nbytes": "3 * hidden.block_type.nbytes"},
    "both warpgroups on one half": {"index(2 * stage + half)": "index(2 * stage)"},
    "a step too few": {"range(0, tiles.H, BK)": "range(0, tiles.H - BK, BK)"},
    "a ring that begins anew": {"        acc = gl.zeros": "        step = 0\n        acc = gl.zeros"},
    "the label's column": {"is_label = column[None, :] ==": "is_label = column[None, :] + 1 =="},
    "the vocabulary's edge": {"| ((block + 1) * BLOCK > vocab_size)": ""},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_the_stand_in_finds_what_is_wrong(changes, seed):
    problem = Problem(200, 700, 320, seed=seed)
    problem.labels.clamp_(max=500)  # a block with the edge and no label
    with pytest.raises((Fault, AssertionError, AttributeError)):
        problem.check(seed=seed, changes=changes)


def serves(problem: Problem, capability: int = 90, low_rank: LowRank | None = None, stats=(), **changed) -> bool:
    with Recorder(Target(capability, 2)):
        call = problem.call()
        for name, value in changed.items():
            setattr(call, name, value)
        sums = BlockSums.empty(stats, 1, call.num_blocks, torch.device("cpu"))
        return hopper.serves(call, low_rank or LowRank(), sums)


def test_what_it_serves():
    plain = Problem(16, 300, 64)
    assert serves(plain)
    assert not any(serves(plain, capability) for capability in (0, 80, 89, 100, 120))
    assert not serves(plain, bias=torch.zeros(300))
    assert not serves(plain, stats=("entropy",))
    assert not serves(plain, low_rank=LowRank(torch.zeros(16, 16)))
    assert not serves(Problem(16, 300, 64, dtype=torch.float32))
    assert not serves(Problem(16, 300, 61))  # rows that TMA cannot address
    assert not serves(Problem(16, 300, 64, softcap=30.0))
    assert not any(serves(Problem(16, 300, 64, scale=scale)) for scale in (-1.0, 0.0, 1e-12, 1e12))


def test_a_low_rank_head_is_not_served():
    problem = Problem(16, 300, 64)
    with Recorder(Target(90, 2)):
        lora = LoRA(torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(300, 4, dtype=torch.bfloat16), 1.0)
        call = Call(
            Head(problem.hidden, problem.weight, None, lora, problem.transform, torch.bfloat16), problem.call().rows
        )
        sums = BlockSums.empty((), 1, 3, torch.device("cpu"))
        assert not hopper.serves(call, LowRank(), sums)
