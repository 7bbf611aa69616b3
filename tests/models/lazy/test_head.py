"""The head that answers with lazy logits: whose it is, for how long, and which are refused."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from lazy_models import B, H, Model, T, V, inputs, picked
from torch import nn

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.logits import LazyLogits


def test_the_head_is_as_it_was():
    model = Model()
    with lazy_logits(model.head):
        with lazy_logits(model.head):  # a method of a trainer that calls another
            assert isinstance(model(torch.randn(1, 2, H)), LazyLogits)
        assert isinstance(model(torch.randn(1, 2, H)), LazyLogits)
    assert "forward" not in model.head.__dict__
    model.head.forward = hooked = model.head.forward
    with pytest.raises(RuntimeError, match="boom"), lazy_logits(model.head):
        raise RuntimeError("boom")
    assert model.head.forward is hooked
    del model.head.forward
    pickle.dumps(model.head), copy.deepcopy(model.head)


class Scaled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(H, V), {"backwards": "exact"}, TypeError, "backwards"),
        (nn.Linear(H, V), {"tau": 2.0}, ValueError, "2.0"),
        (nn.Embedding(V, H), {}, TypeError, "Embedding"),
        (Scaled(H, V), {}, NotImplementedError, "Scaled"),
        (nn.DataParallel(Model()), {}, NotImplementedError, "DataParallel"),
    ],
)
def test_refusals(model, options, error, message):
    with pytest.raises(error, match=message), lazy_logits(model, **options):
        pass


def test_zero3_and_fsdp_are_refused():
    split = nn.Linear(H, V)
    split.weight.ds_id = 0
    sharded = type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})(H, V)
    for head in (split, sharded):
        with pytest.raises(NotImplementedError, match=r"FSDP|splits"), lazy_logits(head):
            pass


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
