"""Lazy logits that become real: changed in place, hooked, copied, and given to what takes tensors only."""

import copy
import io
import operator
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lazy_models import B, Model, T, V, inputs, lazily, picked, same_as_torch
from torch import nn


def changed(change):
    """The logits, a view made before, one made after, and log-probs of each, after `change` of logits and labels."""

    def read(z, y):
        before = z[:, 1:]
        change(z, y)
        return z, before, z[1:, :-1], picked(before, y[:, 1:]), picked(z, y), picked(z[:2], y[:2])

    return read


def iadd(z, y):
    z += 1.0


def idiv(z, y):
    z /= 3


CHANGES = {
    "masked_fill_": lambda z, y: z.masked_fill_(z > 0.3, -5.0),
    "add_": lambda z, y: z.add_(torch.arange(V) / V),
    "sub_": lambda z, y: z.sub_(z.detach().amax(-1, keepdim=True)),
    "clamp_": lambda z, y: z.clamp_(-0.2, 0.3),
    "zero_": lambda z, y: z[:2].zero_(),
    "copy_": lambda z, y: z[1].copy_(torch.linspace(-1, 1, T * V).view(T, V)),
    "copy_ of another's": lambda z, y: z[:2].copy_(z[2:]),
    "index_fill_": lambda z, y: z.index_fill_(-1, torch.tensor([3, 7]), -2.0),
    "dropout in place": lambda z, y: F.dropout(z, 0.5, True, inplace=True),
    "module in place": lambda z, y: nn.Dropout(0.5, inplace=True)(z),
    "relu_": lambda z, y: F.relu_(z),
    "relu in place": lambda z, y: F.relu(z, inplace=True),
    "torch.neg_": lambda z, y: torch.neg_(z),
    "banned columns": lambda z, y: operator.setitem(z, (..., [1, 5, 9]), -4.0),
    "one row": lambda z, y: operator.setitem(z, 1, 0.5),
    "a mask": lambda z, y: operator.setitem(z, y > 100, 0.25),
    "rows of its own": lambda z, y: operator.setitem(z, slice(0, 2), z[2:] * 2),
    "+=": iadd,
    "/=": idiv,
    "div_ of a part": lambda z, y: z[:, :-1].div_(0.5),
    "div_ of the same view's rows": lambda z, y: z[:, 1:].div_(0.5),
    "mul_ of two halves": lambda z, y: (z[:2].mul_(2.0), z[2:].mul_(3)),
    "mul_ of a part, twice": lambda z, y: (z[:3].mul_(2.0), z[1:].div_(3)),
    "div_ of a flat view": lambda z, y: z.view(-1, V).div_(0.7),
    "div_ of a copy": lambda z, y: (
        z.clone().div_(2),
        z[:, :-1].contiguous().div_(2),
        z[:, :-1].reshape(-1, V).mul_(2),
    ),
    "div_ of selected rows": lambda z, y: (z[y > 100].div_(2), z.index_select(0, y[0, :2] % B).mul_(2)),
    "div_ of log-probs": lambda z, y: z.log_softmax(-1).div_(2),
    "div_ of a factor of it": lambda z, y: (z * 2).div_(0.3),
    "div_ with a mode": lambda z, y: z.div_(0.3, rounding_mode="floor"),
    "mul_ by a tensor": lambda z, y: z.mul_(torch.tensor(2.0)),
    "mul_ by zero": lambda z, y: z.mul_(0),
    "a part without gradients": lambda z, y: z.detach()[:, 2:].mul_(2.0),
    "data": lambda z, y: z.data.mul_(2.0),
    "out": lambda z, y: torch.add(torch.ones(B, T, V), 1.0, out=z.detach()),
    "in a view of a view": lambda z, y: z[:3][:, 1:].transpose(0, 1)[0].fill_(0.5),
    "nothing but unknown": lambda z, y: (z.softmax(-1), z[:, -1].topk(3), z + 1, abs(z), z // 1),
}


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("dtype", "grad"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_changed_in_place(change, dtype, grad):
    same_as_torch(changed(CHANGES[change]), dtype, grad)


def nograd(change):
    def run(z, y):
        with torch.no_grad():
            change(z, y)

    return run


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("change", ["masked_fill_", "/=", "div_ of a part", "banned columns", "data"])
def test_changed_without_gradients(change):
    same_as_torch(changed(nograd(CHANGES[change])))
    with torch.inference_mode():
        same_as_torch(changed(CHANGES[change]), grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        same_as_torch(changed(CHANGES[change]), torch.bfloat16)


def test_computed_once_and_said_once():
    model = Model()
    z = lazily(model, inputs()[0])
    views = z[:, :-1], z.view(-1, V), z[1]
    with pytest.warns(UserWarning, match="softmax needs the logits themselves") as said:
        z.softmax(-1), views[0].softmax(-1), z + 1, views[1].exp(), views[2].add_(1)
    assert len(said) == 1 and said[0].filename == __file__
    memory = {x.untyped_storage().data_ptr() for x in (z.data, *(view.data for view in views))}
    assert len(memory) == 1


def test_hooks_and_retained_gradients():
    model, (hidden, labels) = Model(), inputs()
    found = []
    for lazy in (True, False):
        z = lazily(model, hidden.clone()) if lazy else model(hidden.clone())
        part = z[:, :-1]
        seen = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            z.register_hook(lambda gradient, seen=seen: seen.append(gradient) or gradient * 2)
            z.retain_grad()
            part.retain_grad()
        model.zero_grad()
        (picked(z, labels).sum() + picked(z[:, :-1], labels[:, 1:]).square().sum() + part.sum()).backward()
        found.append((*seen, z.grad, part.grad, model.head.weight.grad.clone()))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    z = lazily(model, hidden)
    with pytest.warns(UserWarning, match="exp needs"):
        (gradient,) = torch.autograd.grad(z.exp().sum(), z)
    torch.testing.assert_close(gradient, model(hidden).exp())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, other):
        return logits[:, 0].exp() * 2 + other

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def test_a_function_that_would_drop_the_gradient_is_refused():
    model, (hidden, _) = Model(), inputs()
    with pytest.raises(TypeError, match="has no gradient"):
        Doubled.apply(lazily(model, hidden), torch.zeros(V, requires_grad=True))
    with torch.no_grad(), pytest.warns(UserWarning, match="exp needs"):
        found = Doubled.apply(lazily(model, hidden), torch.zeros(V))
    torch.testing.assert_close(found, model(hidden)[:, 0].detach().exp() * 2)


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
def test_to_other_forms():
    model, (hidden, _) = Model(), inputs()
    with torch.no_grad():
        expected = model(hidden)
        forms = {
            "pickle": lambda z: pickle.loads(pickle.dumps(z)),
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "save": lambda z: saved(z),
            "numpy": lambda z: torch.from_numpy(z.numpy()),
            "asarray": lambda z: torch.from_numpy(np.asarray(z)),
            "iteration": lambda z: torch.stack([row for part in z for row in part]).view(z.shape),
            "tolist": lambda z: torch.tensor(z.tolist()),
        }
        for name, form in forms.items():
            found = form(lazily(model, hidden))
            assert type(found) is torch.Tensor and found.dtype == torch.float32, name
            torch.testing.assert_close(found, expected)
        one = lambda: lazily(model, hidden)[0, 0, 0]  # noqa: E731
        z = lazily(model, hidden)
        assert float(one()) == one().item() == expected[0, 0, 0].item() and int(one()) == int(expected[0, 0, 0])
        assert bool(one()) and f"{one():.3f}" == f"{expected[0, 0, 0]:.3f}" and repr(z) == repr(expected)
        assert len(z) == B and len(z[0, 0]) == V and hash(z) == hash(z) and z in [z]
        assert lazily(model, hidden)[0, 0, 0] in lazily(model, hidden) and (z == expected).all()
        with pytest.raises(RuntimeError, match="ambiguous"):
            bool(lazily(model, hidden))
    with pytest.raises(RuntimeError, match="requires grad"):
        np.asarray(lazily(model, hidden))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(lazily(model, hidden))


def saved(z):
    file = io.BytesIO()
    torch.save(z, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
