"""Lazy logits: what a trainer reads of them is what it would have read of the logits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lazy_models import B, H, Model, T, V, inputs, lazily, picked
from torch import nn

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.logits import LazyArgmax, LazyLogits
from fastdpo.models.lazy.tensor import Unserved

transformers = pytest.importorskip("transformers")


class Reader(nn.Module):
    """A model's last layer and what models do to its logits."""

    def __init__(self, change=lambda z: z, bias=True):
        super().__init__()
        self.head = nn.Linear(H, V, bias=bias)
        self.change = change

    def forward(self, hidden):
        return self.change(self.head(hidden))


def both(read, change=lambda z: z):
    """`read` of lazy logits and of logits: (values, gradients of hidden, weight and bias) each."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, H, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    model = Reader(change)
    results = []
    for lazy in (True, False):
        model.zero_grad()
        x = hidden.clone().requires_grad_()
        if lazy:
            with lazy_logits(model.head, backward="exact"):
                logits = model(x)
            assert isinstance(logits, LazyLogits)
        else:
            logits = model(x)
        values = read(logits, labels.clone())
        values = values if isinstance(values, tuple) else (values,)
        grads = [None]
        if any(value.requires_grad for value in values):
            sum(value.square().sum() for value in values if value.requires_grad).backward()
            grads = [x.grad, model.head.weight.grad.clone(), model.head.bias.grad.clone()]
        results.append((values, grads))
    (ours, our_grads), (theirs, their_grads) = results
    assert len(ours) == len(theirs)
    for mine, other in zip((*ours, *our_grads), (*theirs, *their_grads)):
        if other is not None:
            assert (
                type(mine) is torch.Tensor and mine.shape == other.shape and mine.requires_grad == other.requires_grad
            )
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * max(1.0, other.abs().max().item()))


def gathered(logits, labels):
    return torch.gather(logits.log_softmax(-1), dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)


def causal_loss(logits, labels):
    """transformers' own."""
    labels = F.pad(labels.masked_fill(labels % 3 == 0, -100), (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1), ignore_index=-100)


READS = {
    "log_softmax, gather": gathered,
    "method of F": lambda z, y: F.log_softmax(z, dim=-1).gather(2, y[..., None]).squeeze(2),
    "shifted": lambda z, y: gathered(z[:, :-1, :], y[:, 1:]),
    "ellipsis": lambda z, y: gathered(z[..., 1:-1, :].contiguous(), y[..., 1:-1]),
    "the chosen half": lambda z, y: gathered(z[: B // 2], y[: B // 2]),
    "chunks": lambda z, y: tuple(gathered(part, y[:2]) for part in z.chunk(2, dim=0)),
    "split": lambda z, y: tuple(gathered(part, y[:3, :]) for part in z[:3].split(3)),
    "a mask": lambda z, y: gathered(z[y % 2 == 0], y[y % 2 == 0]),
    "one sequence": lambda z, y: gathered(z[1], y[1]),
    "negative steps of one": lambda z, y: gathered(z[:, -3:], y[:, -3:]),
    "rows twice": lambda z, y: gathered(z.index_select(0, torch.tensor([1, 1, 3])), y[[0, 2, 3]]),
    "a list of rows": lambda z, y: gathered(z[[0, 0]], y[:2]),
    "iteration": lambda z, y: torch.stack([gathered(a, b) for a, b in zip(z, y)]),
    "transformers' loss": causal_loss,
    "flattened loss": lambda z, y: nn.CrossEntropyLoss()(torch.flatten(z[:2, :-1], end_dim=1), y[:2, 1:].flatten()),
    "loss per token": lambda z, y: F.cross_entropy(z.reshape(-1, V), y.view(-1), reduction="none"),
    "summed loss": lambda z, y: F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1), ignore_index=5, reduction="sum"),
    "temperature": lambda z, y: gathered(z / 0.7, y),
    "temperature in place": lambda z, y: gathered(z[:, :-1].div_(0.7), y[:, 1:]),
    "means": lambda z, y: (z.mean(-1), z[y > 9].mean(), z.detach().mean(), z.sum(), z.nansum()),
    "accuracy": lambda z, y: (z.argmax(dim=-1) == y).float(),
    "logsumexp": lambda z, y: (torch.logsumexp(z, dim=-1), torch.logsumexp(2.0 * z.detach(), dim=-1)),
    "log of summed squares": lambda z, y: torch.logsumexp(2 * F.log_softmax(z.detach(), dim=-1), dim=-1),
}


@pytest.mark.parametrize("read", READS)
def test_reads_without_logits(read):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(READS[read])


@pytest.mark.parametrize("change", [
    lambda z: z * 1.7,
    lambda z: z / 3,
    lambda z: torch.tanh(z / 0.8) * 0.8,
    lambda z: 2.0 * torch.tanh(z * 1.5 / 2.0) / 0.6,
], ids=["factor", "divisor", "softcap", "all"])  # fmt: skip
def test_scale_and_softcap_of_the_model(change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(gathered, change)
        both(lambda z, y: z.detach().mean(-1), change)
        both(lambda z, y: torch.logsumexp(z, -1), change)


UNKNOWN = {
    "addition": lambda z, y: z + 1.0,
    "to the right": lambda z, y: torch.ones(V) * z,
    "indexing the vocabulary": lambda z, y: z[..., 3:5],
    "softmax": lambda z, y: z.softmax(-1),
    "maximum": lambda z, y: torch.max(z, dim=-1).values,
    "another mean": lambda z, y: z.mean(0),
    "smoothed": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), label_smoothing=0.1),
    "top k": lambda z, y: z.log_softmax(-1).gather(-1, y[..., None].repeat(1, 1, 3)),
    "concatenation": lambda z, y: torch.cat([z[:2], z[2:]]),
    "transposed": lambda z, y: z.transpose(1, 2),
    "comparison": lambda z, y: (z > 0).float(),
    "negative factor of a softcap": lambda z, y: -2.0 * (torch.tanh(z) * 3.0),
    "argmax": lambda z, y: z.argmax(-1).float(),
    "scaled by a tensor": lambda z, y: z * torch.tensor(2.0),
}


@pytest.mark.parametrize("read", UNKNOWN)
def test_what_is_not_known_is_computed_and_said(read):
    with pytest.warns(UserWarning, match="needs the logits themselves"):
        both(lambda z, y: UNKNOWN[read](z, y) + 0)


def test_statistics_come_from_the_pass_of_the_log_probs(monkeypatch):
    from fastdpo.models import lm_head

    calls = []
    original = lm_head.token_stats

    def spy(*args, **options):
        calls.append(options["stats"])
        return original(*args, **options)

    monkeypatch.setattr(lm_head, "token_stats", spy)
    model = Reader()
    labels = torch.randint(V, (B, T))
    with lazy_logits(model.head):
        logits = model(torch.randn(B, T, H))
    assert logits[:, :-1].logps(labels[:, 1:]).requires_grad
    assert not logits[:, :-1].detach().entropy().requires_grad
    assert len(calls) == 2  # nobody had wanted an entropy yet
    calls.clear()
    with lazy_logits(model.head):
        shifted = model(torch.randn(B, T, H))[:, :-1]
    shifted.logps(labels[:, 1:])
    entropy = shifted.detach().entropy()
    hits = shifted[:2].argmax(-1) == labels[:2, 1:]
    assert len(calls) == 2 and "entropy" in calls[0]  # is_top1 was not known to be wanted
    real = shifted.source.values(shifted.rows)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=real.detach()).entropy())
    assert torch.equal(hits, real[:2].argmax(-1) == labels[:2, 1:])
    assert isinstance(shifted.argmax(-1), LazyArgmax)


def test_grad_mode_autocast_and_adapter_of_the_call_count():
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    ids = torch.randint(V, (2, T))
    with torch.no_grad(), model.disable_adapter():
        expected = gathered(model(ids).logits, ids)
        with lazy_logits(model):
            logits = model(ids).logits
    logps = gathered(logits, ids)  # outside of both contexts
    assert not logps.requires_grad
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)
    with lazy_logits(model):
        adapted = gathered(model(ids).logits, ids)
    assert (adapted - expected).abs().max() > 1e-3 and adapted.requires_grad
    torch.testing.assert_close(adapted, gathered(model(ids).logits, ids), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16), lazy_logits(model):
        logits = model(ids).logits
    rounded = gathered(logits, ids)
    assert rounded.dtype == torch.float32 and 0 < (rounded - adapted).abs().max() < 0.1


def test_labels_that_torch_refuses_are_refused():
    model, (hidden, labels) = Model(), inputs()
    for label in (-1, -100, V):
        wrong = labels.clone()
        wrong[1, 2] = label
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                picked(lazily(model, hidden), wrong)
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                F.cross_entropy(lazily(model, hidden).view(-1, V), wrong.view(-1), ignore_index=5)
            with pytest.raises(ValueError, match="sometimes"):
                F.cross_entropy(lazily(model, hidden).view(-1, V), labels.view(-1), reduction="sometimes")


COUNTED = torch.arange(B * T).view(B, T) % 3 != 1
DIVERGENCE_READS = {
    "all rows": lambda z, w: (z, w, COUNTED),
    "other rows of the teacher": lambda z, w: (z[:, 1:], w[:, :-1], COUNTED[:, 1:]),
    "one row of the teacher for many": lambda z, w: (z, w[0, [1] * T].unsqueeze(0)[[0] * B], COUNTED),
    "transforms": lambda z, w: (5 * torch.tanh(z * 0.7 / 5) / 0.6, w / 3, COUNTED),
    "log-probs": lambda z, w: (z.log_softmax(-1), (w * 2).log_softmax(-1), COUNTED),
}


def teacher_and_student():
    torch.manual_seed(4)
    model, of_teacher = Model(), nn.Linear(H + 4, V)
    return model, of_teacher, inputs()[0].requires_grad_(), torch.randn(B, T, H + 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("read", DIVERGENCE_READS)
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_divergence(read, kind, beta):
    found = []
    for lazy in (True, False):
        model, of_teacher, hidden, ref_hidden = teacher_and_student()
        if lazy:
            z = lazily(model, hidden)
            with torch.no_grad(), lazy_logits(of_teacher):
                w = of_teacher(ref_hidden)
        else:
            z, w = model(hidden), of_teacher(ref_hidden).detach()
        z, w, counted = DIVERGENCE_READS[read](z, w)
        if lazy:
            values = z.divergence(w, counted, kind, beta, None)
        else:
            p, r = z.log_softmax(-1), w.log_softmax(-1)
            m = torch.logaddexp(p + torch.tensor(1 - beta).log(), r + torch.tensor(beta).log())
            values = (beta * r.exp() * (r - m) if beta else 0) + ((1 - beta) * p.exp() * (p - m) if beta < 1 else 0)
            values = {0.0: r.exp() * (r - p), 1.0: p.exp() * (p - r)}.get(beta, values).sum(-1) * counted
        grads = torch.autograd.grad(values.square().sum(), [hidden, *model.parameters()])
        found.append([values, *grads])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def bent(z, w):
    return z.tanh(), w


def of_two_powers(z, w):
    return z.log_softmax(-1), w


def twice_a_row(z, w):
    return z[[0, 0]], w[[0, 1]]


def changed(z, w):
    z[:, :2].mul_(2)
    return z, w


def of_other_shapes(z, w):
    return z, w[:, :-1]


@pytest.mark.parametrize("read", [bent, of_two_powers, twice_a_row, changed, of_other_shapes])
def test_a_divergence_that_needs_the_logits(read):
    model, of_teacher, hidden, ref_hidden = teacher_and_student()
    z = lazily(model, hidden)
    with torch.no_grad(), lazy_logits(of_teacher):
        w = of_teacher(ref_hidden)
    z, w = read(z, w)
    with pytest.raises(Unserved):
        z.divergence(w, torch.ones(z.shape[:-1], dtype=torch.bool), "forward_kl", 0.0, None)


def test_a_teacher_that_would_get_a_gradient():
    model, of_teacher, hidden, ref_hidden = teacher_and_student()
    with lazy_logits(model, of_teacher, backward="exact"):
        z, w = model(hidden), of_teacher(ref_hidden)
    with pytest.raises(Unserved):
        z.divergence(w, COUNTED, "forward_kl", 0.0, None)
    with torch.no_grad():  # nobody gets one
        assert z.divergence(w, COUNTED, "forward_kl", 0.0, None).shape == (B, T)


def test_a_divergence_after_a_change_is_refused():
    for change in ("student", "teacher"):
        model, of_teacher, hidden, ref_hidden = teacher_and_student()
        z = lazily(model, hidden)
        with torch.no_grad(), lazy_logits(of_teacher):
            w = of_teacher(ref_hidden)
            (model.head if change == "student" else of_teacher).weight.mul_(2)
        with pytest.raises(RuntimeError, match="weight of the lm_head has been changed"):
            z.divergence(w, COUNTED, "forward_kl", 0.0, None)
