"""Lazy logits, and what they are made of, that are changed between the forward, the read and the backward."""

import copy
import io
import operator
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.logits import LazyArgmax, LazyLogits
from fastdpo.models.lazy.source import Held

V, H, B, T = 300, 16, 4, 6


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.head = nn.Linear(H, V, bias=bias)

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden):
        return self.head(hidden)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, H, generator=generator), torch.randint(V, (B, T), generator=generator)


def picked(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def lazily(model, hidden, **options):
    with lazy_logits(model, backward="exact", **options):
        logits = model(hidden)
    assert isinstance(logits, LazyLogits)
    return logits


def same_as_torch(read, dtype=torch.float32, grad=True):
    """`read` of logits and labels gives the same values and gradients of lazy logits."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    results = []
    for lazy in (True, False):
        hidden, labels = inputs()
        hidden = hidden.to(dtype).requires_grad_(grad)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            logits = lazily(model, hidden) if lazy else model(hidden).float()
        values = read(logits, labels)
        values = [x.tensor("test") if isinstance(x, (LazyLogits, LazyArgmax)) else x for x in values]
        wanted = [x.square().sum() for x in values if x.requires_grad]
        if wanted:
            sum(wanted).backward()
        results.append([*values, hidden.grad, *(x.grad for x in model.parameters())])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert type(mine) is type(other) and mine.requires_grad == other.requires_grad
            bound = tolerance * max(1.0, other.double().abs().max().item())
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=bound)


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


OTHERS = {
    "floor": lambda z, y: (torch.div(z, 2, rounding_mode="floor"), (z // 1).detach(), z.div(3, rounding_mode="trunc")),
    "abs": lambda z, y: (abs(z), -z, +z, z % 1, z**2, 1 / (z + 10), 2 - z),
    "the argmax of then": lambda z, y: ((z.argmax(-1), z.mul_(-1))[0].float(), z.argmax(-1).float()),
    "hits of then": lambda z, y: ((z.argmax(-1), z.neg_())[0] == y,),
    "argmax changed": lambda z, y: changed_argmax(z),
    "the factor of then": lambda z, y: ((z * 2, z.zero_())[0], (z + 1, z.zero_())[0]),
    "log-probs of then": lambda z, y: (lambda logp: (z.zero_(), logp.gather(-1, y[..., None]))[1:])(z.log_softmax(-1)),
    "detached": lambda z, y: (z.detach().mul_(1.0) * 2, picked(z.detach(), y)),
    "requires_grad_": lambda z, y: (z.detach().requires_grad_() * 2,),
    "a view without gradients": lambda z, y: without_gradients(z, y),
    "casts": lambda z, y: (z.double(), z.to(torch.float64), z.half(), z.long(), z.to(torch.zeros(1).double())),
    "copy asked for": lambda z, y: (z.to(torch.float32, copy=True).zero_(), z.to("cpu").mul_(2), z),
    "a dtype asked for": lambda z, y: (F.log_softmax(z, -1, dtype=torch.float64), z.sum(-1, dtype=torch.float64)),
    "reshaped otherwise": lambda z, y: (z.reshape(2, -1), z.view(B, -1), z.reshape(-1), z.flatten(-3, -2), z.flatten()),
    "one row's": lambda z, y: (torch.stack(list(z[0, 0])), z[1, 2][3], z[-1, -1].log_softmax(-1)),
    "out of its memory": lambda z, y: (torch.tanh(z, out=torch.empty(0)) if not z.requires_grad else torch.tanh(z),),
}  # fmt: skip


def changed_argmax(z):
    top = z.argmax(-1)
    part = top[:, 1:]
    top[:, :3] = 7
    return top, part, top == torch.full((B, T), 7), part != torch.full((B, T - 1), 7)


def without_gradients(z, y):
    with torch.no_grad():
        part = z[:, 1:]
        scaled = z * 2
    return picked(part, y[:, 1:]), part.mean(-1), scaled.mean(-1), picked(scaled, y), part.softmax(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("read", OTHERS)
def test_read_otherwise(read, grad):
    same_as_torch(OTHERS[read], grad=grad)


@pytest.mark.parametrize("change", [
    lambda z: z.div_(0.7), lambda z: z[:, :-1].div_(0.7), lambda z: z.view(-1, V).mul_(2),
], ids=["all", "a part", "flat"])  # fmt: skip
def test_a_temperature_in_place_needs_no_logits(change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_as_torch(
            lambda z, y: (change(z), picked(z[:, 1:-1], y[:, 1:-1]), z[:, :-1].mean(-1), z[:, -1:].mean(-1))[1:]
        )


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


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("watch", [
    lambda z: z.retain_grad(), lambda z: z.register_hook(print), lambda z: z.grad_fn,
    lambda z: torch.autograd.grad(z.sum(), z, allow_unused=True),
])  # fmt: skip
def test_gradients_that_would_pass_a_hook_are_refused(watch):
    model, (hidden, labels) = Model(), inputs()
    z = lazily(model, hidden)
    logps = picked(z, labels)
    with pytest.raises(RuntimeError, match="computed without them"):
        watch(z)
    z = lazily(model, hidden)
    scaled = z * 2
    z.retain_grad()
    with pytest.raises(RuntimeError, match="computed without them"):
        picked(scaled, labels)
    assert picked(z, labels).requires_grad and logps.requires_grad


def step(model, hidden):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(hidden).square().sum().backward()
    optimizer.step()


def swap_data(model, hidden):
    model.head.weight.data = torch.randn(V, H)


def replace_parameter(model, hidden):
    model.head.weight = nn.Parameter(torch.randn(V, H))


def shrink(model, hidden):
    model.head.weight.untyped_storage().resize_(0)


def other_state(assign):
    return lambda model, hidden: model.load_state_dict(Model().state_dict(), assign=assign)


WEIGHTS = {
    "in place": lambda model, hidden: model.head.weight.detach().mul_(1.1),
    "a row": lambda model, hidden: model.head.weight.detach()[3].zero_(),
    "bias": lambda model, hidden: model.head.bias.detach().add_(0.1),
    "hidden": lambda model, hidden: hidden.detach().mul_(2),
    "hidden's data": lambda model, hidden: hidden.data.mul_(2),
    "data in place": lambda model, hidden: model.head.weight.data.mul_(1.1),
    "bias's data": lambda model, hidden: model.head.bias.data[V // 2].add_(0.1),
    "a row's data": lambda model, hidden: model.head.weight.data[7].mul_(1.01),
    "step": step,
    "load_state_dict": other_state(False),
    "load_state_dict, assign": other_state(True),
    "data swapped": swap_data,
    "parameter replaced": replace_parameter,
    "storage released": shrink,
}
AS_IT_WAS = ("load_state_dict, assign", "data swapped", "parameter replaced")  # the old tensors are still there
READS = {
    "log-probs": picked,
    "loss": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "mean": lambda z, y: z.mean(-1),
    "entropy": lambda z, y: z.entropy(),
    "accuracy": lambda z, y: z.argmax(-1) == y,
    "logits": lambda z, y: z + 0,
    "part": lambda z, y: picked(z[:, :-1] * 2, y[:, 1:]),
}


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_weights_changed_before_the_read(change, read, mode):
    torch.manual_seed(0)
    model, (hidden, labels) = Model(), inputs()
    with mode():
        hidden = hidden.clone()
        z = lazily(model, hidden)
        expected = READS[read](lazily(model, hidden), labels)
    with torch.inference_mode() if "hidden" in change and mode is torch.inference_mode else torch.no_grad():
        with torch.enable_grad() if change == "step" else torch.no_grad():
            WEIGHTS[change](model, hidden.clone() if change == "step" else hidden)
    if change in AS_IT_WAS or (mode is torch.inference_mode and "hidden" in change):
        torch.testing.assert_close(READS[read](z, labels), expected)
    else:
        with pytest.raises(RuntimeError, match="has been changed since the forward"):
            READS[read](z, labels)


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("read", ["log-probs", "loss", "logits"])
@pytest.mark.parametrize("change", ["in place", "hidden", "step", "load_state_dict"])
def test_weights_changed_before_the_backward(change, read):
    model, (hidden, labels) = Model(), inputs()
    leaf = hidden.clone().requires_grad_()
    hidden = leaf * 1
    expected = READS[read](model(hidden), labels)
    value = READS[read](lazily(model, hidden), labels)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    with torch.enable_grad() if change == "step" else torch.no_grad():
        WEIGHTS[change](model, leaf.detach().clone() if change == "step" else hidden)
    if read == "logits" and change == "hidden":
        return  # they were made of a copy of it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_merged_adapter():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    ids = torch.randint(V, (2, T))
    for change in (model.merge_adapter, model.unmerge_adapter):
        with lazy_logits(model):
            z, later = (model(ids).logits for _ in range(2))
        picked(z, ids)
        change()
        with pytest.raises(RuntimeError, match="weight of the lm_head has been changed"):
            picked(later, ids)


def test_a_copy_of_the_model_has_its_own_head():
    model, (hidden, _) = Model(), inputs()
    with lazy_logits(model):
        other, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in (other, unpickled):
            with torch.no_grad():
                twin.head.weight.zero_()
            assert torch.equal(twin(hidden), model.head.bias.expand(B, T, V))
        with lazy_logits(other):
            lazy = other(hidden)
        shallow = copy.copy(model.head)
        assert isinstance(model(hidden), LazyLogits)
    for twin in (other, unpickled):
        assert torch.equal(twin(hidden), model.head.bias.expand(B, T, V))
    torch.testing.assert_close(lazy.mean(-1), model.head.bias.mean().expand(B, T))
    torch.testing.assert_close(shallow(hidden), model(hidden))
    copy.deepcopy(other), pickle.dumps(other)


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


def test_where_finding_out_would_wait_a_change_gives_nan(monkeypatch):
    model, (hidden, labels) = Model(), inputs()
    monkeypatch.setattr(Held, "valid", lambda self: torch.tensor(torch.nan))
    for read in READS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = read(lazily(model, hidden), labels)
        assert value.dtype == torch.bool or value.isnan().all()


@pytest.mark.parametrize("backend", ["eager"])
def test_compiled(backend):
    model, (hidden, labels) = Model(), inputs()
    expected = picked(torch.tanh(model(hidden) / 2)[:, 1:] * 2 / 0.7, labels[:, 1:])

    def forward(hidden):
        logits = torch.tanh(model(hidden) / 2) * 2
        part = logits[:, 1:]
        part /= 0.7
        return part, logits[0]

    with lazy_logits(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            logits, first = torch.compile(forward, backend=backend)(hidden)
    assert isinstance(logits, LazyLogits) and isinstance(first, LazyLogits)
    torch.testing.assert_close(picked(logits, labels[:, 1:]), expected, rtol=1e-4, atol=1e-5)


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


def test_threads_do_not_see_each_other():
    model, (hidden, labels) = Model(), inputs()
    expected = model(hidden)
    inside, done, found = threading.Barrier(3, timeout=60), threading.Barrier(3, timeout=60), {}

    def lazy(tau):
        with lazy_logits(model, tau=tau, seed=1):
            inside.wait()
            for _ in range(50):
                logits = model(hidden)
                assert isinstance(logits, LazyLogits) and logits.source.options.tau == tau
            found[tau] = picked(logits, labels)
            done.wait()

    threads = [threading.Thread(target=lazy, args=(tau,)) for tau in (0.5, 0.01)]
    for thread in threads:
        thread.start()
    inside.wait()
    for _ in range(50):
        assert torch.equal(model(hidden), expected)
    done.wait()
    for thread in threads:
        thread.join()
    assert "forward" not in model.head.__dict__
    for logps in (found[0.5], found[0.01]):
        torch.testing.assert_close(logps, picked(expected, labels), rtol=1e-4, atol=1e-5)


def test_the_inner_options_hold_inside():
    model, (hidden, _) = Model(), inputs()
    with lazy_logits(model, backward="exact"):
        with lazy_logits(model, tau=0.25):
            inner = model(hidden)
        outer = model(hidden)
    assert inner.source.options.tau == 0.25 and outer.source.options.backward == "exact"


def test_a_replaced_forward_is_refused():
    model = Model()
    model.head.forward = lambda hidden: F.linear(hidden, model.head.weight) * 2
    with pytest.raises(NotImplementedError, match="replaced"), lazy_logits(model):
        pass
