"""The reference of linear_dpo_loss, in all its forms; and what is refused."""

import math

import pytest
import torch
from test_linear_dpo import B, Batch, H, V, assert_same, eager_logps, grads

from fastdpo.linear_dpo import LinearDPOLoss, linear_dpo_loss
from fastdpo.logps import linear_logps
from fastdpo.preference import preference_loss


def test_every_form_of_reference():
    batch = Batch(seed=4)
    arguments = (batch.hidden, batch.weight, batch.labels)
    head = {"bias": batch.bias, "ld_alpha": 0.5}
    reference = linear_dpo_loss(
        *arguments, **head, ref_hidden=batch.ref_hidden, ref_weight=batch.ref_weight, ref_bias=batch.ref_bias
    )
    token_logps = eager_logps(batch.labels, batch.ref_hidden, batch.ref_weight, batch.ref_bias)
    # a per-token reference is read at completion tokens only
    token_logps = token_logps.masked_fill(~batch.mask, math.nan)
    assert_same(reference, linear_dpo_loss(*arguments, **head, ref_logps=token_logps))
    sums = torch.cat([reference.chosen_logps, reference.rejected_logps]).detach()
    sums -= torch.cat([reference.chosen_rewards, reference.rejected_rewards]) / 0.1
    # one number per sequence is taken as it is, whatever ld_alpha says
    assert_same(reference, linear_dpo_loss(*arguments, **head, ref_logps=sums))
    own_head = linear_dpo_loss(*arguments, bias=batch.bias, ref_hidden=batch.ref_hidden)
    same = {"ref_weight": batch.weight.detach(), "ref_bias": batch.bias.detach()}
    assert_same(own_head, linear_dpo_loss(*arguments, bias=batch.bias, ref_hidden=batch.ref_hidden, **same))
    free = linear_dpo_loss(*arguments)
    assert_same(free, linear_dpo_loss(*arguments, ref_logps=torch.zeros(2 * B)))


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("module", [False, True])
def test_reference_head_without_a_bias(own_head, module):
    """Beside a policy's that has one; before, zeros had to be given."""
    batch = Batch(seed=5)
    reference = {"ref_hidden": batch.ref_hidden}
    if own_head:
        reference["ref_weight"] = batch.ref_weight
    score = LinearDPOLoss() if module else linear_dpo_loss

    def loss(ref_bias):
        return score(batch.hidden, batch.weight, batch.labels, bias=batch.bias, ref_bias=ref_bias, **reference)

    out = loss(False)
    assert_same(out, loss(torch.zeros(V, dtype=torch.float64)), rtol=0, atol=0)
    logps = eager_logps(batch.labels, *batch.leaves).sum(1)
    head = (batch.ref_weight if own_head else batch.weight, None)
    refs = eager_logps(batch.labels, batch.ref_hidden, *head).sum(1).detach()
    expected = preference_loss(logps[:B], logps[B:], refs[:B], refs[B:])
    assert_same([out.loss], [expected.loss])
    assert_same(grads(out.loss, [batch.bias]), grads(expected.loss, [batch.bias]))
    if own_head:
        with pytest.raises(ValueError, match="ref_bias=False where it has none"):
            loss(None)
    else:  # None is the policy's
        assert_same(loss(None), loss(batch.bias.detach()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="ref_bias=False was given without ref_hidden"):
        score(batch.hidden, batch.weight, batch.labels, ref_bias=False)


def test_as_many_packed_tokens_as_sequences(loss_engine):
    """`ref_logps` of [N] with N = 2B is per sequence, whatever the offsets."""
    hidden, weight = torch.randn(4, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    labels, ref_logps = torch.randint(0, V, (4,)), torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 2, 2, 3, 4])
    out = linear_dpo_loss(hidden, weight, labels, cu_seqlens=cu_seqlens, ref_logps=ref_logps)
    logps = eager_logps(labels, hidden, weight, None)
    sums = torch.stack([logps[:2].sum(), logps[2:2].sum(), logps[2], logps[3]])
    assert_same([out.losses], [preference_loss(sums[:2], sums[2:], ref_logps[:2], ref_logps[2:]).losses])


def test_reference_is_never_differentiated():
    batch = Batch(seed=5)
    batch.ref_hidden.requires_grad_()
    batch.ref_weight.requires_grad_()
    out = linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, ref_hidden=batch.ref_hidden, ref_weight=batch.ref_weight
    )
    assert grads(out.loss, [batch.ref_hidden, batch.ref_weight]) == (None, None)


def test_lora_reference_is_the_base_head():
    batch = Batch(seed=6)
    a = torch.randn(4, H, dtype=torch.float64).requires_grad_()
    b = torch.randn(V, 4, dtype=torch.float64).requires_grad_()
    out = linear_dpo_loss(
        batch.hidden,
        batch.weight,
        batch.labels,
        ref_hidden=batch.ref_hidden,
        lora=(a, b, 0.3),
        backward="exact",
    )
    merged = linear_dpo_loss(
        batch.hidden, batch.weight + 0.3 * b @ a, batch.labels, ref_hidden=batch.ref_hidden,
        ref_weight=batch.weight, backward="exact",
    )  # fmt: skip
    assert_same(out, merged)
    leaves = [batch.hidden, a, b]
    assert_same(grads(out.loss, leaves), grads(merged.loss, leaves))


def test_a_reference_of_as_many_tokens_as_sequences(engine):
    """N = 2B: what ref_hidden gives is per token, ref_logps are per sequence."""
    hidden, ref_hidden, weight = torch.randn(4, H), torch.randn(4, H), torch.randn(V, H)
    labels, cu_seqlens = torch.randint(0, V, (4,)), torch.tensor([0, 0, 1, 2, 4])
    ref = linear_logps(ref_hidden, weight, labels)
    per_sequence = torch.stack([ref[:0].sum(), ref[:1].sum(), ref[1:2].sum(), ref[2:].sum()])
    one = linear_dpo_loss(hidden, weight, labels, cu_seqlens=cu_seqlens, ref_hidden=ref_hidden)
    other = linear_dpo_loss(hidden, weight, labels, cu_seqlens=cu_seqlens, ref_logps=per_sequence)
    torch.testing.assert_close(tuple(one), tuple(other))
    torch.testing.assert_close(one.chosen_rewards, 0.1 * (one.chosen_logps - per_sequence[:2]))


REFUSED = {
    "two references": (
        lambda b: {"ref_hidden": b.ref_hidden, "ref_logps": torch.zeros(2 * B)},
        ValueError,
        "ref_hidden and ref_logps",
    ),
    "reference head alone": (
        lambda b: {"ref_weight": b.ref_weight},
        ValueError,
        "ref_weight.*without ref_hidden",
    ),
    "reference bias alone": (lambda b: {"ref_bias": b.ref_bias}, ValueError, "ref_bias.*without ref_hidden"),
    "reference bias forgotten": (
        lambda b: {"bias": b.bias, "ref_hidden": b.ref_hidden, "ref_weight": b.ref_weight},
        ValueError,
        "ref_bias",
    ),
    "reference layout": (
        lambda b: {"ref_hidden": b.ref_hidden[:, 1:]},
        ValueError,
        r"ref_hidden.*\(6, 7, 16\)",
    ),
    "reference width": (lambda b: {"ref_hidden": b.ref_hidden[..., 1:]}, ValueError, "ref_hidden has H = 15"),
    "reference head width": (
        lambda b: {"ref_hidden": b.ref_hidden, "ref_weight": b.ref_weight[:, 1:]},
        ValueError,
        r"ref_weight.*\(300, 15\)",
    ),
    "reference log-probs per row": (
        lambda b: {"ref_logps": torch.zeros(B)},
        ValueError,
        r"ref_logps.*\(3,\)",
    ),
    "integer reference": (lambda b: {"ref_logps": torch.zeros(2 * B).long()}, TypeError, "ref_logps.*int64"),
    "reference for simpo": (
        lambda b: {"ref_hidden": b.ref_hidden, "loss_type": "simpo"},
        ValueError,
        "ref_hidden.*simpo",
    ),
    "log-probs for tdpo": (
        lambda b: {"ref_logps": torch.zeros(2 * B), "loss_type": ["sigmoid", "tdpo2"]},
        ValueError,
        r"tdpo2.*whole distributions.*give ref_hidden.*got ref_logps of shape \(6,\)",
    ),
    "token log-probs for tdpo": (
        lambda b: {"ref_logps": torch.zeros(2 * B, 8), "loss_type": "tdpo1"},
        ValueError,
        r"tdpo1.*whole distributions.*got ref_logps of shape \(6, 8\)",
    ),
    "no reference for tdpo": (lambda b: {"loss_type": "tdpo1"}, ValueError, "tdpo1.*whole distributions.*no reference"),
    "another vocabulary for tdpo": (
        lambda b: {"ref_hidden": b.ref_hidden, "ref_weight": b.ref_weight[:-1], "loss_type": "tdpo1"},
        ValueError,
        "weight has V = 300 but ref_weight has V = 299",
    ),
}


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, module):
    change, error, message = REFUSED[name]
    batch = Batch()
    arguments = {"hidden": batch.hidden, "weight": batch.weight, "labels": batch.labels} | change(batch)
    if module:
        loss_type = arguments.pop("loss_type", "sigmoid")
        with pytest.raises(error, match=message):
            LinearDPOLoss(loss_type=loss_type)(**arguments)
        return
    with pytest.raises(error, match=message):
        linear_dpo_loss(**arguments)
