"""csrc/cuda/logits.cu and the row walk in it (csrc/shared/logits_row.h), executed on the CPU, against fp64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import test_selective
import torch
from heads import relative_error

from fastdpo.ops import native
from fastdpo.ops.selective import cuda as cuda_logits
from fastdpo.ops.selective.operators import LEFT_OUT, NO_LABEL

pytestmark = pytest.mark.usefixtures("cuda_on_the_cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
CANARY = 7.0


def canvas(N: int, V: int, stride: int, offset: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, its view [N, V]): rows `stride` apart that begin `offset` elements into the buffer."""
    buffer = torch.full((offset + N * stride + 16,), CANARY, dtype=dtype)
    return buffer, buffer.as_strided((N, V), (stride, 1), offset)


@contextmanager
def in_parts(splits: int | None):
    """Each row walked by so many blocks; by as many as on a GPU where None."""
    with pytest.MonkeyPatch.context() as patched:
        if splits is not None:
            patched.setattr(cuda_logits, "_splits", lambda logits: splits)
        yield


def forward(logits, labels, temperature=1.0, with_entropy=False, splits=None):
    """(logps, lse), and the entropy where it is asked for."""
    with in_parts(splits):
        results = cuda_logits.forward(logits, labels, temperature, with_entropy)
    return results[: 2 + with_entropy]


def backward(logits, labels, logps, lse, coef, out, temperature=1.0, splits=None, of_entropy=(None, None)):
    """`of_entropy`: (entropy, coef_entropy)."""
    with in_parts(splits):
        cuda_logits.backward(logits, labels, logps, lse, coef, temperature, out, *of_entropy)


def expected(logits, labels, coef, temperature):
    """(logps, lse, dlogits) in fp64."""
    z = logits.double() / temperature
    logp = z.log_softmax(1)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
    dlogits = coef.double()[:, None] * (one_hot - logp.exp()) / temperature
    return logp.gather(1, labels[:, None])[:, 0], z.logsumexp(1), dlogits


@pytest.mark.parametrize("V", [1, 2, 7, 8, 31, 515, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_of_a_row(dtype, V):
    """Heads, vectors, tails and the label in each; nothing outside of the rows is written."""
    N, temperature = 9, 0.7
    for offset in range(16 // dtype.itemsize):
        stride = V + offset  # rows of one matrix differ in alignment where this is odd
        buffer, logits = canvas(N, V, stride, offset, dtype)
        logits.copy_(torch.randn(N, V) * 4)
        labels = torch.randint(V, (N,))
        labels[:3] = torch.tensor([0, V // 2, V - 1])
        coef = torch.randn(N)
        logps, lse, dlogits = expected(logits, labels, coef, temperature)
        our_logps, our_lse = forward(logits, labels, temperature)
        torch.testing.assert_close(our_logps.double(), logps, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(our_lse.double(), lse, rtol=2e-6, atol=2e-6)
        for out_offset in {offset, 0, 1}:  # the second and third: other alignments than the logits have
            out_buffer, out = canvas(N, V, stride, out_offset, dtype)
            backward(logits, labels, our_logps, our_lse, coef, out, temperature)
            if V > 1:
                assert relative_error(out, dlogits) < TOLERANCE[dtype], (offset, out_offset)
            written = torch.zeros(out_buffer.shape, dtype=torch.bool)
            written.as_strided((N, V), (stride, 1), out_offset).fill_(True)
            assert (out_buffer[~written] == CANARY).all(), (offset, out_offset)
        in_place = logits.clone().as_strided((N, V), (V, 1))
        backward(in_place, labels, our_logps, our_lse, coef, in_place, temperature)
        assert torch.equal(in_place, out)
        assert (buffer[:offset] == CANARY).all()


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("V", [4095, 4096, 20011])
def test_blocks_of_either_size(V, splits):
    logits, labels, coef = torch.randn(3, V) * 5, torch.tensor([0, V - 1, 77]), torch.randn(3)
    logps, lse, dlogits = expected(logits, labels, coef, 1.0)
    ours = forward(logits, labels, splits=splits)
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack((logps, lse)), rtol=2e-6, atol=4e-6)
    out = torch.full_like(logits, CANARY)
    backward(logits, labels, *ours, coef, out, splits=splits)
    assert relative_error(out, dlogits) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 7, 33])
def test_entropy_and_splits(dtype, splits):
    """However many blocks share a row, with parts that have no elements too."""
    N, V, temperature = 5, 3001, 0.7
    logits, labels = (torch.randn(N, V) * 4).to(dtype), torch.tensor([0, 3000, 77, LEFT_OUT, NO_LABEL])
    logits[0, 5] = 20.0  # nearly all of the mass
    logits[2, 100:2000] = -INF
    coef, coef_entropy = torch.randn(2, N)
    coef[3] = coef_entropy[3] = 0.0
    logps, lse, entropy = forward(logits, labels, temperature, with_entropy=True, splits=splits)
    plain = forward(logits, labels, temperature, splits=splits)
    assert torch.equal(logps, plain[0]) and torch.equal(lse, plain[1])
    z = (logits.double() / temperature).requires_grad_()
    logp = z.log_softmax(1)
    wanted = -(logp.exp() * logp.masked_fill(logp == -INF, 0)).sum(1) * (labels != LEFT_OUT)
    torch.testing.assert_close(entropy.double(), wanted.detach(), rtol=2e-6, atol=1e-6)
    picked = logp.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0)
    rows = [0, 1, 2, 4]
    torch.testing.assert_close(logps.double()[:3], picked.detach()[:3], rtol=2e-6, atol=2e-6)
    out = torch.full_like(logits, CANARY)
    saved = (labels, logps, lse, coef * (labels >= 0))
    backward(logits, *saved, out, temperature, splits=splits, of_entropy=(entropy, coef_entropy))
    p = logp.detach().exp()
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), V) * (labels >= 0)[:, None]
    of_entropy = torch.where(p > 0, p * (logp.detach() + wanted.detach()[:, None]), 0.0)
    dlogits = (saved[3].double()[:, None] * (one_hot - p) - coef_entropy.double()[:, None] * of_entropy) / temperature
    for row in rows:
        # what an lse of 30 in fp32 cannot tell apart is absolute
        size = dlogits[row].norm() + coef[row].abs() + coef_entropy[row].abs()
        assert (out[row].double() - dlogits[row]).norm() < 2 * TOLERANCE[dtype] * size, row
    assert (out[3] == 0).all()


def test_when_a_row_is_split():
    splits = native.EXTENSION.logits_splits
    assert splits(660, 128256, 132) == 1 and splits(331, 128256, 132) == 1
    assert splits(330, 128256, 132) == 2 and splits(8, 128256, 132) == 31  # one batch for each thread
    assert splits(100, 128256, 132) == 6 and splits(1, 8191, 132) == 1 and splits(0, 8192, 132) == 2


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("largest", [3.3e38, 1e30, 1e9])
def test_logits_of_any_magnitude(temperature, largest):
    """Also where z * log2(e) overflows fp32, and z does not."""
    largest *= min(temperature, 1.0)
    logits = torch.full((3, 700), -0.9 * largest)
    logits[0, [3, 600]] = largest  # two that are equal
    logits[1, [3, 600]] = torch.tensor([2 / 3, 1.0]) * largest
    labels, one = torch.tensor([3, 600, 5]), torch.ones(3)
    for splits in (1, 3):
        logps, lse, entropy = forward(logits, labels, temperature, with_entropy=True, splits=splits)
        log2, log700 = (torch.tensor(float(n)).log().item() for n in (2, 700))
        torch.testing.assert_close(logps, torch.tensor([-log2, 0.0, -log700]))
        torch.testing.assert_close(entropy, torch.tensor([log2, 0.0, log700]))
        torch.testing.assert_close(lse.double(), (logits.double() / temperature).logsumexp(1), rtol=1e-7, atol=0)
    out = torch.empty_like(logits)
    backward(logits[1:2], labels[1:2], logps[1:], lse[1:], one, out[1:2], temperature)
    assert (out[1] == 0).all()


def test_a_confident_label_keeps_its_gradient():
    """p = 1 - 2e-9 rounds to 1 in fp32, the gradient must not round to 0."""
    logits, labels = torch.zeros(1, 64), torch.tensor([5])
    logits[0, 5] = 24.0
    logps, _, dlogits = expected(logits, labels, torch.ones(1), 1.0)
    ours = forward(logits, labels)
    torch.testing.assert_close(ours[0].double(), logps, rtol=1e-6, atol=0)
    out = torch.empty_like(logits)
    backward(logits, labels, *ours, torch.ones(1), out)
    torch.testing.assert_close(out[0, 5].double(), dlogits[0, 5], rtol=1e-6, atol=0)


def test_logits_far_from_zero():
    """Neighbours at 1e4 differ by a few units: errors follow the difference, not the magnitude."""
    logits = 1e4 + torch.arange(0.0, 4.0, 1 / 64)[None]
    logps, _ = forward(logits, torch.tensor([255]))
    wanted, _, _ = expected(logits, torch.tensor([255]), torch.ones(1), 1.0)
    torch.testing.assert_close(logps.double(), wanted, rtol=2e-6, atol=0)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "others,label_logit,logp,lse",
    [
        (-INF, 0.5, 0.0, 0.5),
        (0.0, -INF, -INF, 4.8520303),  # log 128
        (-3.4e38, 1.0, 0.0, 1.0),
        (NAN, 1.0, NAN, NAN),
        (INF, 1.0, NAN, NAN),
        (0.0, NAN, NAN, NAN),
    ],
)
def test_infinities_and_nan(others, label_logit, logp, lse):
    logits = torch.full((1, 129), others)
    logits[0, 60] = label_logit
    ours = torch.cat(forward(logits, torch.tensor([60])))
    torch.testing.assert_close(ours, torch.tensor([logp, lse]), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_row_without_a_label_has_its_lse():
    logits = torch.randn(1, 300)
    _, lse = forward(logits, torch.tensor([NO_LABEL]))
    torch.testing.assert_close(lse, logits.logsumexp(1), rtol=1e-6, atol=1e-6)


def test_a_row_that_is_left_out_is_not_read():
    logits = torch.full((1, 300), NAN)
    logps, lse = forward(logits, torch.tensor([LEFT_OUT]))
    assert logps == 0 and lse == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_coef_zero_gives_zeros_and_nan_gives_nan(dtype):
    logits = torch.full((2, 131), NAN, dtype=dtype)
    logits[1] = 0.5
    out = torch.full((2, 131), CANARY, dtype=dtype)
    labels, lse = torch.tensor([NO_LABEL, LEFT_OUT]), torch.tensor([NAN, 5.0])
    backward(logits, labels, torch.zeros(2), lse, torch.tensor([0.0, NAN]), out)
    assert (out[0] == 0).all() and out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_rounded_to_nearest(dtype):
    """p = 1 makes the gradient of an unlabelled logit -coef: any float, against torch's own rounding, bit for bit."""
    coef = torch.randint(-(2**31), 2**31, (20_000,)).int().view(torch.float32)
    half = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every value, and every midpoint of neighbours
    for kind in (torch.float16, torch.bfloat16):
        bits = half.view(kind).float().view(torch.int32)
        coef = torch.cat((coef, *((bits + step).view(torch.float32) for step in (0, 1 << 12, 1 << 15, (1 << 12) + 1))))
    coef = torch.cat((coef, torch.rand(20_000) * 2**-14, torch.tensor([65519.0, 65520.0, INF, 2**-25, 2**-26])))
    N = len(coef)
    logits, out = torch.zeros(N, 1, dtype=dtype), torch.empty(N, 1, dtype=dtype)
    backward(logits, torch.full((N,), NO_LABEL), torch.zeros(N), torch.zeros(N), coef, out)
    torch.testing.assert_close(out[:, 0], (-coef).to(dtype), rtol=0, atol=0, equal_nan=True)


# The engine in front of them


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_matches_definition(dtype, columns):
    test_selective.test_matches_definition(None, dtype, (3, 5, 1000), columns)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_matches_definition_of_entropy(dtype, columns, inplace):
    test_selective.test_entropy_matches_definition(None, dtype, (3, 5, 1000), columns, inplace)


@pytest.mark.parametrize(
    "test",
    [
        test_selective.test_index_named_twice_in_a_row,
        test_selective.test_strided_logits,
        test_selective.test_masked_and_invalid_rows,
        test_selective.test_empty,
        test_selective.test_entropy_of_rows_with_nan_infinity_or_no_label,
        test_selective.test_entropy_of_strided_and_empty_logits,
        test_selective.test_large_fp32_logits,
        lambda engine: test_selective.test_inplace_backward_is_equal_and_guarded(engine, torch.bfloat16),
        lambda engine: test_selective.test_entropy_from_flat_to_certain(engine, 1_000_000),  # rows in 110 parts
    ],
    ids=[
        "twice",
        "strided",
        "masked",
        "empty",
        "NaN",
        "entropy strided",
        "large",
        "in place",
        "entropy of a split row",
    ],
)
def test_engine_keeps_the_contract(test):
    test(None)
