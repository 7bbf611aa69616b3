"""Which fold serves: none but the plain one that was not measured where it runs, and none that differs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import fastdpo
from fastdpo.ops.problem import Head, Rows
from fastdpo.ops.triton import forward as triton_forward
from fastdpo.ops.triton import special
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.fold import plain_fold
from fastdpo.ops.triton.launch import Recorder, Target
from fastdpo.ops.triton.special import Measured

CPU = Target(0, 3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(special, "_compared", set())
    monkeypatch.setattr(special, "_dropped", {})


def measured(**changes) -> Measured:
    import triton

    values = {
        "kernel": "fake", "form": "only", "capability": 0, "hidden_size": 32, "dtype": "float32",
        "triton": triton.__version__, "special_ms": 1.0, "plain_ms": 1.25, "device": "a GPU", "date": "2026-11-26",
    }  # fmt: skip
    return Measured(**values | changes)


@pytest.fixture
def fake(monkeypatch):
    """A special kernel for the interpreter: the plain one, of which `folds` counts the calls."""

    def fold(*arguments, form):
        assert form == "only"
        module.folds += 1
        plain_fold(*arguments)

    module = SimpleNamespace(folds=0, serves=lambda *_: True, fold=fold)
    monkeypatch.setattr(special, "KERNELS", {0: "fake"})
    monkeypatch.setattr(special, "load", lambda kernel: module)
    monkeypatch.setattr(special, "table", lambda: (measured(),))
    monkeypatch.setattr("fastdpo.ops.triton.launch._target", lambda device: CPU)
    return module


def problem(H: int = 32) -> tuple[Head, Rows]:
    torch.manual_seed(0)
    return Head(torch.randn(16, H), torch.randn(200, H)), Rows(torch.randint(200, (16,)), -100, 0, 200)


def logps(H: int = 32) -> torch.Tensor:
    return triton_forward.forward(*problem(H)).logps


def test_the_table_is_one_of_measurements():
    for x in special.table():
        assert special.KERNELS[x.capability] == x.kernel and x.form in special.load(x.kernel).FORMS
        assert x.special_ms > 0 and x.plain_ms > 0


def test_nothing_serves_that_was_not_measured(monkeypatch):
    monkeypatch.setattr(special, "table", lambda: ())
    assert launched() == {"fold_kernel"}
    assert fastdpo.backends()["forward_kernel"] == {"all": "plain: no special kernel was measured to be faster"}


def test_what_counts_as_measured(monkeypatch):
    table = [
        measured(capability=90, hidden_size=h, special_ms=ms, form=f"for {h}")
        for h, ms in ((1024, 2.0), (2048, 1.0), (4096, 1.0))
    ]
    monkeypatch.setattr(special, "table", lambda: tuple(table))

    def on(hidden_size, kernel="fake", capability=90, dtype="float32", triton=table[0].triton):
        return special.fastest(kernel, capability, hidden_size, dtype, triton)

    assert on(2048) == "for 2048" and on(3072) == on(4096) == "for 4096"
    assert not on(1024) and not on(1536)  # slower there, or beside
    assert not on(896) and not on(8192)  # beyond what was measured
    assert not on(2048, capability=100) and not on(2048, dtype="bfloat16") and not on(2048, triton="3.99.0")
    assert not on(2048, kernel="another")
    assert on(2048, triton=f"{table[0].triton}+git")


def test_a_measured_kernel_that_agrees_serves(fake):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = logps()
        assert fake.folds == 2  # compared, then served
        torch.testing.assert_close(logps(), first)
        assert fake.folds == 3
    (state,) = [state for name, state in fastdpo.backends()["forward_kernel"].items() if name.startswith("sm_")]
    assert state.startswith("fake: 0.800 of the plain kernel's time in the form only on a GPU, 2026-11-26; compared")


def test_it_does_not_serve_what_it_cannot_or_was_not_measured_for(fake):
    logps(H=48)
    fake.serves = lambda *_: False
    logps()
    assert fake.folds == 0


@pytest.mark.parametrize("wrong", ["a block", "a label", "NaN"])
def test_a_kernel_that_differs_is_dropped(fake, wrong):
    right, expected = fake.fold, logps()

    def fold(call, tokens, hidden, low_rank, label_logit, sums, form):
        right(call, tokens, hidden, low_rank, label_logit, sums, form=form)
        if wrong == "a block":
            sums.lse[7, 2] += 0.004
        elif wrong == "a label":
            label_logit[290] -= 0.004
        else:
            sums.lse[3, 0] = torch.nan

    special._compared.clear()
    fake.fold = fold
    with pytest.warns(UserWarning, match=r"'fake' differs from the plain kernel by .*Please report"):
        ours = logps()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    folds = fake.folds
    torch.testing.assert_close(logps(), expected, rtol=0, atol=0)
    assert fake.folds == folds  # for good
    assert "plain: fake differs from" in fastdpo.backends()["forward_kernel"]["sm_0 float32 H 32"]


def test_a_kernel_that_fails_is_dropped(fake, monkeypatch):
    expected = logps()
    special._compared.clear()

    def fold(*_, form):
        raise RuntimeError("no such instruction")

    fake.fold = fold
    with pytest.warns(UserWarning, match="'fake' fails: RuntimeError: no such instruction"):
        torch.testing.assert_close(logps(), expected, rtol=0, atol=0)
    special._dropped.clear()
    monkeypatch.undo()
    monkeypatch.setattr(special, "KERNELS", {0: "no_such_module"})
    monkeypatch.setattr(special, "table", lambda: (measured(kernel="no_such_module"),))
    with pytest.warns(UserWarning, match="'no_such_module' fails: ModuleNotFoundError"):
        torch.testing.assert_close(logps(), expected, rtol=0, atol=0)


def test_what_the_report_says(monkeypatch):
    table = (measured(triton="3.6.0"), measured(hidden_size=64, special_ms=2.0), measured(kernel="x", hidden_size=128))
    monkeypatch.setattr(special, "table", lambda: table)
    monkeypatch.setattr(special, "_dropped", {"x": "fails: here"})
    report = special.report("3.99.0")
    assert report["sm_0 float32 H 32"] == "plain: fake was measured with Triton 3.6.0, this is 3.99.0"
    assert report["sm_0 float32 H 128"] == "plain: x fails: here"
    report = special.report(table[1].triton)
    assert (
        report["sm_0 float32 H 64"]
        == "plain: fake took 1.600 of the plain kernel's time in the form only on a GPU, 2026-11-26"
    )
    assert "was measured with" in special.report(None)["sm_0 float32 H 64"]


def launched(capability: int = 90, **changes) -> set[str]:
    bf16 = {"dtype": torch.bfloat16, "device": "meta"}
    head = Head(torch.empty(64, 4096, **bf16), torch.empty(1000, 4096, **bf16), compute_dtype=torch.bfloat16)
    rows = Rows(torch.empty(64, dtype=torch.int64, device="meta"), -100, 0, 1000)
    with Recorder(Target(capability, 132)) as launches:
        triton_forward.forward(head.replace(**changes), rows)
    return {kernel.__name__ for kernel, *_ in launches} & {"fold_kernel", "hopper_fold_kernel"}


def test_what_is_recorded_is_what_would_be_launched(monkeypatch):
    with special.forced("32x8"):
        assert launched() == {"hopper_fold_kernel"}
        assert launched(100) == launched(80) == {"fold_kernel"}
        assert launched(bias=torch.empty(1000, device="meta", dtype=torch.bfloat16)) == {"fold_kernel"}
    monkeypatch.setattr(
        special,
        "table",
        lambda: (measured(kernel="hopper", form="32x9", capability=90, hidden_size=4096, dtype="bfloat16"),),
    )
    assert launched() == {"hopper_fold_kernel"}
    with special.forced(None):
        assert launched() == {"fold_kernel"}


def test_the_small_problem_has_every_kind_of_tile():
    """Its blocks and labels reach the last column, and what it compares holds no NaN."""
    call = Call(*problem())
    seen = []

    def spy(small, tokens, hidden, low_rank, label_logit, sums):
        plain_fold(small, tokens, hidden, low_rank, label_logit, sums)
        labels, existing = tokens.tokens.labels, int(tokens.tokens.count)
        assert None not in tokens.tokens
        seen.append((small.vocab_size % 256, len(hidden) - existing, small.target.programs, labels.max() // 128))

    assert special.difference(call, spy, plain_fold) == 0
    ((edge, missing, programs, last),) = seen
    assert edge and missing and programs == 2 and last == 2000 // 128
