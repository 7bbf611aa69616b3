"""One call of a patched model is nobody else's: threads, calls inside of calls, exceptions, broken graphs, copies."""

import pickle
import sys
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from causal_models import V, assert_same, batch, build, definition

from fastdpo.head import LogitTransform
from fastdpo.integrations import patch_model, unpatch_model
from fastdpo.models.head_call import PLAIN, HeadCall


@pytest.fixture
def often():
    """Threads take turns every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(*functions):
    failures = []

    def run(function):
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_threads(compiled, request):
    """Plain calls and generation beside ``fastdpo=True`` calls on different batches: each gets its own."""
    if not compiled:
        request.getfixturevalue("often")  # dynamo would take minutes
    model = patch_model(build("gemma2 (softcap)"))
    batches = [batch(seed) for seed in range(1, 5)]
    with torch.no_grad():
        expected = [model(**inputs, fastdpo=True).logps for inputs in batches]
        logits = model(**batches[0]).logits
    prompt = batches[0]["input_ids"][:1, :4]
    arguments = {"max_new_tokens": 3, "do_sample": False}
    tokens = model.generate(prompt, **arguments)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="eager", fullgraph=True)
        with torch.no_grad():
            model(**batches[0], fastdpo=True)
            model(**batches[0])

    @torch.no_grad()
    def score(i):
        for _ in range(15):
            assert torch.equal(model(**batches[i], fastdpo=True).logps, expected[i])

    @torch.no_grad()
    def plain():
        for _ in range(15):
            assert torch.equal(model(**batches[0]).logits, logits)

    def generate():
        for _ in range(3):
            assert torch.equal(model.generate(prompt, **arguments), tokens)

    @torch.no_grad()
    def head():
        hidden = torch.randn(2, 5, model.lm_head.in_features)
        for _ in range(30):
            assert model.lm_head(hidden).shape == (2, 5, V)

    # A generation server's compiled graphs are recompiled for every length; that is not what is looked at here
    in_threads(*(lambda i=i: score(i) for i in range(4)), plain, head, *([] if compiled else [generate]))


def test_calls_inside_of_calls():
    """A plain call, a call with other labels and one of another model from a hook inside of the model's forward."""
    model, other = patch_model(build()), patch_model(build(seed=3))
    inner = batch(7)
    expected = [model(**batch(), fastdpo=True), model(**inner, fastdpo=True), other(**inner, fastdpo=True)]
    logits, seen = model(**inner).logits, []

    def hook(*_):
        if not seen:
            seen.append(None)
            seen.extend([model(**inner), model(**inner, fastdpo=True), other(**inner, fastdpo=True)])

    model.model.layers[0].register_forward_hook(hook)
    found = model(**batch(), fastdpo=True)
    assert torch.equal(found.logps, expected[0].logps)
    assert torch.equal(seen[1].logits, logits)
    assert torch.equal(seen[2].logps, expected[1].logps) and torch.equal(seen[3].logps, expected[2].logps)


def test_the_head_called_twice_is_refused():
    """Which of the two the logits come from cannot be told: a lens on an inner layer, say."""
    model, looked = patch_model(build()), []
    layer = model.model.layers[0].register_forward_hook(lambda _, args, out: looked.append(model.lm_head(args[0])))
    with pytest.raises(NotImplementedError, match="twice"):
        model(**batch(), fastdpo=True)
    layer.remove()
    assert_same(patch_model(model, backward="exact"))


def test_hidden_states_that_change_behind_the_head():
    """The log-probs are those of what the head was given; their gradient is refused, as that of logits would be."""

    class Reusing(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **_):
            hidden = self.model(input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            hidden.detach().zero_() if self.training else hidden.detach()
            return (logits,)

    model = patch_model(Reusing(build().config).eval())
    given = {name: batch()[name] for name in ("input_ids", "labels")}
    expected = model(**given, fastdpo=True).logps
    changed = model.train()(**given, fastdpo=True).logps
    assert torch.equal(changed, expected)
    with pytest.raises(RuntimeError, match="inplace operation"):
        changed.sum().backward()
    with torch.inference_mode():
        assert torch.equal(model(**given, fastdpo=True).logps, expected)


def test_an_exception_leaves_nothing_behind():
    model = patch_model(build(), backward="exact")

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**batch(), fastdpo=True)
    hook.remove()
    assert model.lm_head(torch.randn(2, 5, 32)).shape == (2, 5, V)
    assert model(**batch()).logits.shape == (3, 9, V)
    assert_same(model)


def test_a_graph_that_breaks():
    """Frames that dynamo leaves to the interpreter, and those that it compiles one by one, see the same call."""
    torch._dynamo.reset()
    model = patch_model(build(), backward="exact")
    layer = model.model.layers[0]
    forward = layer.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = broken
    model.compile(backend="eager")
    batches = [batch(seed) for seed in range(1, 4)]
    with torch.no_grad():
        expected = [definition(model, inputs)[0] for inputs in batches]

    @torch.no_grad()
    def score(i):
        for _ in range(3):
            found = model(**batches[i], fastdpo=True).logps
            torch.testing.assert_close(found, expected[i], rtol=1e-5, atol=2e-5)
            assert model(**batches[i]).logits.shape == (3, 9, V)

    score(0)
    in_threads(*(lambda i=i: score(i) for i in range(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.0625), LogitTransform(1.0, 30.0)])
def test_the_known_numbers_tell_functions_apart(dtype, transform):
    """From two percent in bf16, whose numbers have 8 bits, and half a percent otherwise; rounding is no difference."""
    call = HeadCall(nn.Linear(4, 1000), transform)
    call.take(torch.zeros(2, 5, 4, dtype=dtype))
    z = call.give(torch.zeros(2, 1, 1000, dtype=dtype))
    assert z.is_contiguous() and z.unique(dim=0).shape[0] == 1 and len(z.unique()) > 200
    rounded = z * transform.scale
    if transform.softcap:
        rounded = torch.tanh(rounded / transform.softcap) * transform.softcap
    least = 2e-2 if dtype == torch.bfloat16 else 5e-3
    assert call.shows(rounded, transform)
    for other in (
        rounded * (1 + least),
        rounded.roll(1, -1),
        rounded + 1.0,
        -rounded,
        rounded.index_fill(-1, torch.tensor([500]), -1e4),
        torch.full_like(rounded, float("nan")),
        rounded * torch.tensor([1.0, 1 + least], dtype=dtype)[:, None, None],
    ):
        assert not call.shows(other, transform)
    for other in (LogitTransform(), LogitTransform(0.0625), LogitTransform(1.0, 30.0), LogitTransform(1.0, 20.0)):
        assert call.shows(rounded, other) == (other == transform)


def test_calls_through_functional_call():
    model = patch_model(build(), backward="exact")
    other = {name: 1.1 * parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.functional_call(model, other, (), batch() | {"fastdpo": True}).logps
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(other[name])
    assert torch.equal(found, model(**batch(), fastdpo=True).logps)


def test_data_parallel_is_refused():
    """Its replicas would share the one forward, of the original."""
    model = patch_model(build())
    with pytest.raises(NotImplementedError, match="DataParallel"):
        model._replicate_for_data_parallel()
    with pytest.raises(TypeError, match="DataParallel"):
        patch_model(nn.DataParallel(build()))
    copy_of_it = pickle.loads(pickle.dumps(model))
    for twin in (model, copy_of_it):
        unpatch_model(twin)
        assert type(twin._replicate_for_data_parallel()) is type(model)


def test_hooks_stay_where_they_belong():
    """What a trainer adds to the head later does not get between."""
    model = patch_model(build(), backward="exact")
    seen = []
    for _ in range(2):
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape), prepend=True)
        assert_same(model)
    assert {(3, 9, 32), (3, 1, V)} <= set(map(tuple, seen))
    unpatch_model(model)
    assert len(model.lm_head._forward_pre_hooks) == len(model.lm_head._forward_hooks) == 2
    assert not model.lm_head._forward_pre_hooks_with_kwargs
    assert PLAIN.hidden is None
