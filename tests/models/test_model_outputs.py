"""``model(..., fastdpo=True)``: no argument is ignored, and what the model returns besides logits is returned."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from causal_models import SHAPE, batch, build, gradients

from fastdpo.integrations import patch_model


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("logits_to_keep", 2),
        ("logits_to_keep", torch.tensor([1, 2])),
        ("num_items_in_batch", 2),
        ("use_cache", True),
        ("return_dict", False),
        ("output_mtp_logits", True),
        ("temperature", 0.7),
        ("stats", ("entropy",)),
        ("ignore_index", 5),
        ("backward", "exact"),
        ("input_ids", "twice"),
        ("attention_mask", "as a sixteenth"),
    ],
)
def test_no_argument_is_ignored(argument, value):
    """transformers' forwards swallow what they do not know."""
    model = patch_model(build())
    given = {"args": (), "kwargs": batch() | {argument: value}}
    if value == "twice":
        given = {"args": (batch()["input_ids"],), "kwargs": batch()}
    elif value == "as a sixteenth":
        given = {"args": (batch()["input_ids"], *[None] * 15), "kwargs": {"labels": batch()["labels"]}}
    with pytest.raises(TypeError, match=argument):
        model(*given["args"], **given["kwargs"], fastdpo=True)


def test_arguments_that_say_what_happens_anyway():
    model = patch_model(build())
    expected = model(**batch(), fastdpo=True).logps
    said = {"logits_to_keep": 0, "use_cache": False, "return_dict": True, "num_items_in_batch": None}
    assert torch.equal(model(**batch(), **said, fastdpo=True).logps, expected)


def test_one_position_has_no_label():
    model = patch_model(build(), backward="exact")
    stats = model(**{name: x[:, :1] for name, x in batch().items()}, fastdpo=True)
    assert stats.logps.shape == (3, 0)
    assert not any(grad.any() for grad in gradients(model, stats.logps.sum()).values())


def test_a_prefix_in_a_cache():
    model = patch_model(build())
    inputs = {name: x[:, :6] for name, x in batch().items()}
    whole = model(**inputs, fastdpo=True).logps
    cache = model(inputs["input_ids"][:, :4], use_cache=True).past_key_values
    rest = model(inputs["input_ids"][:, 4:], past_key_values=cache, labels=inputs["labels"][:, 4:], fastdpo=True)
    torch.testing.assert_close(rest.logps, whole[:, 4:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("by_configuration", [False, True])
def test_hidden_states_and_attentions(by_configuration):
    model = patch_model(build(), backward="exact")
    model.set_attn_implementation("eager")
    names = ("output_hidden_states", "output_attentions")
    asked = dict.fromkeys(names, True)
    if by_configuration:
        for name in names:
            setattr(model.config, name, True)
        asked = {}
    stats, theirs = model(**batch(), **asked, fastdpo=True), model(**batch(), **asked)
    assert len(stats.hidden_states) == 3 and len(stats.attentions) == 2
    for field in ("hidden_states", "attentions"):
        assert all(torch.equal(x, y) for x, y in zip(getattr(stats, field), getattr(theirs, field), strict=True))
    assert stats.aux_loss is None and stats.router_logits is None
    assert gradients(model, stats.hidden_states[1].sum() + stats.logps.sum())


def mixture():
    torch.manual_seed(0)
    shape = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 1, "router_jitter_noise": 0.0}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    return patch_model(model, backward="exact")


@pytest.mark.parametrize("by_configuration", [False, True])
def test_the_load_balancing_loss_of_experts(by_configuration):
    """Its value and, through the routers, its gradient; one expert per token gets a weight of 1, whatever the router
    says, so that all of the routers' gradient is this loss's."""
    model, inputs = mixture(), batch()
    if by_configuration:
        model.config.output_router_logits = True
    asked = {} if by_configuration else {"output_router_logits": True}
    coefficient = model.config.router_aux_loss_coef
    theirs = model(**inputs, **asked)
    logps = theirs.logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, inputs["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    picked = picked.masked_fill(inputs["labels"][:, 1:] == -100, 0.0)
    expected = gradients(model, coefficient * theirs.aux_loss - picked.sum())
    stats = model(**inputs, **asked, fastdpo=True)
    assert torch.equal(stats.aux_loss, theirs.aux_loss)
    assert len(stats.router_logits) == len(theirs.router_logits) == 2
    grads = gradients(model, coefficient * stats.aux_loss - stats.logps.sum())
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert any("gate" in name and grad.abs().max() > 0 for name, grad in grads.items())
    assert type(build_and_call()) is type(stats)  # one type, whatever was asked for


def build_and_call():
    return patch_model(build())(**batch(), fastdpo=True)


def test_outputs_without_a_known_name(monkeypatch):
    class Other(transformers.LlamaForCausalLM):
        returns = staticmethod(lambda logits: (logits,))

        def forward(self, *args, **kwargs):
            return self.returns(super().forward(*args, **kwargs).logits)

    model = patch_model(Other(transformers.LlamaConfig(**SHAPE)))
    assert model(**batch(), fastdpo=True).logps.shape == (3, 8)
    returns = {
        "z_loss": lambda z: transformers.utils.ModelOutput(logits=z, z_loss=z.square().mean()),
        "tuple of 2": lambda z: (z, z.square().mean()),
    }
    for match, function in returns.items():
        monkeypatch.setattr(Other, "returns", staticmethod(function))
        with pytest.raises(NotImplementedError, match=match):
            model(**batch(), fastdpo=True)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_the_load_balancing_loss_in_distributed_data_parallel(find_unused_parameters, tmp_path):
    """DDP looks through what is returned for parameters that take part: routers do by this loss alone."""

    def loss(module):
        stats = module(**batch(), output_router_logits=True, fastdpo=True)
        return stats.aux_loss - stats.logps.sum()

    def steps():  # DDP is gone when the group goes: as its last owner it could wait for threads that wait for the GIL
        model = mixture()
        expected = gradients(model, loss(model))
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
        for _ in range(2):
            grads = gradients(model, loss(parallel))
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected[name], msg=name)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        steps()
    finally:
        torch.distributed.destroy_process_group()


def test_the_load_balancing_loss_is_compiled_whole():
    torch._dynamo.reset()
    model = mixture()
    expected = model(**batch(), output_router_logits=True, fastdpo=True)
    model.set_experts_implementation("batched_mm")  # the default's loop over experts breaks the graph
    model.compile(backend="eager", fullgraph=True)
    found = model(**batch(), output_router_logits=True, fastdpo=True)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.logps, expected.logps, rtol=1e-5, atol=2e-5)
    assert type(found) is type(expected)
