"""What changes after patching is followed or refused, and never computed as it was."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as every_module

pytest.importorskip("transformers")

import transformers
from causal_models import SHAPE, V, assert_same, batch, build, definition, gradients

from fastdpo.head import LogitTransform
from fastdpo.integrations import patch_model


@pytest.fixture(autouse=True)
def no_hooks_of_every_module():
    yield
    every_module._global_forward_hooks.clear()
    every_module._global_forward_pre_hooks.clear()


def set_config(**values):
    def change(model):
        for name, value in values.items():
            setattr(model.config, name, value)

    return change


def attribute_of_the_model(model):
    model.logit_scale = 1.0


def pre_hook(**options):
    def change(model):
        model.lm_head.register_forward_pre_hook(lambda _, args: (1.5 * args[0],), **options)

    return change


def pre_hook_of_every_module(model):
    def double(module, args):
        return (1.5 * args[0],) if module is model.lm_head else None

    every_module.register_module_forward_pre_hook(double)


def another_head(model):
    torch.manual_seed(9)
    model.lm_head = nn.Linear(32, V)


def old_weight_norm(model):
    nn.utils.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.weight_g.mul_(1.7)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(1.7)


def pruned(model):
    import torch.nn.utils.prune

    torch.nn.utils.prune.random_unstructured(model.lm_head, "weight", 0.5)
    with torch.no_grad():
        model.lm_head.weight_orig.mul_(1.3)


def tied(model):
    model.lm_head.weight = model.get_input_embeddings().weight


def untied(model):
    model.lm_head.weight = nn.Parameter(1.3 * model.lm_head.weight.detach())


def compiled_head(model):
    torch._dynamo.reset()
    model.lm_head = torch.compile(model.lm_head, backend="eager")


def observed(model):
    for prepend in (False, True):
        model.lm_head.register_forward_hook(lambda *_: None, prepend=prepend)


def more_tokens(model):
    model.resize_token_embeddings(V + 100, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[V:].normal_(std=0.5)


FOLLOWED = {
    "no softcap": ("gemma2 (softcap)", set_config(final_logit_softcapping=None)),
    "another softcap": ("gemma2 (softcap)", set_config(final_logit_softcapping=5.0)),
    "another divisor": ("granite (divides)", set_config(logits_scaling=2.0)),
    "a divisor of 1": ("granite (divides)", set_config(logits_scaling=1.0)),
    "a scale on the model": ("cohere (scale, tied)", attribute_of_the_model),
    "a pre-hook": ("llama", pre_hook()),
    "a pre-hook, first": ("llama", pre_hook(prepend=True)),
    "a pre-hook of every module": ("llama", pre_hook_of_every_module),
    "a hook that looks": ("llama", observed),
    "another head": ("llama", another_head),
    "weight_norm by hooks": ("llama", old_weight_norm),
    "weight_norm": ("llama", weight_norm),
    "pruned": ("llama", pruned),
    "tied": ("llama", tied),
    "untied": ("llama tied", untied),
    "more tokens": ("llama", more_tokens),
    "a compiled head": ("llama", compiled_head),
    "other weights": ("llama", lambda model: model.load_state_dict(build(seed=5).state_dict())),
    "a frozen head": ("llama", lambda model: model.lm_head.requires_grad_(False)),
    "checkpointing": ("llama", lambda model: model.train().gradient_checkpointing_enable()),
}


SAME = ("a hook that looks", "a compiled head", "a frozen head", "checkpointing")


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_changes_after_patching_is_followed(case):
    name, change = FOLLOWED[case]
    model = patch_model(build(name), backward="exact")
    with torch.no_grad():
        first = model(**batch(), fastdpo=True).logps
    change(model)
    assert_same(model)
    assert ((model(**batch(), fastdpo=True).logps - first).abs().max() > 0.01) == (case not in SAME)


class Doubling(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Called(nn.Linear):
    def __call__(self, hidden):
        return 2 * super().__call__(hidden)


class Scaled(transformers.LlamaForCausalLM):
    scale = 2.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.scale
        return output


def of_class(kind):
    def change(model):
        head = kind(32, V, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head

    return change


def replaced_forward(model):
    model.lm_head.forward = lambda hidden: nn.functional.linear(2 * hidden, model.lm_head.weight)


def post_hook(change, **options):
    return lambda model: model.lm_head.register_forward_hook(lambda module, _, out: change(module, out), **options)


def post_hook_of_every_module(model):
    def double(module, args, output):
        return 1.5 * output if module is model.lm_head else None

    every_module.register_module_forward_hook(double)


def another_forward(model):
    model.__class__ = Scaled


def forward_of_the_class(model):
    model.__class__ = type("Own", (type(model),), {"forward": Scaled.forward, "scale": 2.0})
    patch = super(Scaled, Scaled).forward
    type(model).forward = lambda self, *args, **kwargs: twice(patch(self, *args, **kwargs))


def twice(output):
    output.logits = 2 * output.logits
    return output


def dropout(model):
    post_hook(lambda module, out: nn.functional.dropout(out, 0.5, module.training))(model)
    model.train()


def by_id(_, out):
    return out + 1e-2 * torch.arange(V)


def no_image_tokens(_, out):
    return out.index_fill(-1, torch.tensor([7, 8]), torch.finfo(out.dtype).min)


REFUSED = {
    "a hook": (post_hook(lambda _, out: 1.5 * out), r"a hook of its lm_head.*post_hook"),
    "a hook, first": (post_hook(lambda _, out: 1.5 * out, prepend=True), r"a hook of its lm_head.*post_hook"),
    "a hook that adds": (post_hook(by_id), "a hook of its lm_head"),
    "a hook that masks": (post_hook(no_image_tokens), "a hook of its lm_head"),
    "a hook that permutes": (post_hook(lambda _, out: out.roll(1, -1)), "a hook of its lm_head"),
    "a hook that cuts": (post_hook(lambda _, out: out[..., :-1]), r"\(3, 1, 299\).*\(3, 1, 300\)"),
    "a hook of every module": (post_hook_of_every_module, "every module.*double"),
    "a backward hook": (
        lambda model: model.lm_head.register_full_backward_hook(lambda _, given, out: (0 * given[0],)),
        r"backward hook.*lambda",
    ),
    "the head's forward": (replaced_forward, r"Linear whose forward was replaced by replaced_forward"),
    "a subclass": (of_class(Doubling), "Doubling.*forward of its own"),
    "a subclass that is called otherwise": (of_class(Called), "Called.*forward of its own|makes something else"),
    "no head": (lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), "Sequential.*no weight"),
    "the model's forward": (another_forward, r"its forward, .*Scaled.forward instead of .*LlamaForCausalLM.forward"),
    "its class's forward": (forward_of_the_class, r"its forward, .*lambda.* instead of"),
    "dropout behind the head": (dropout, "its training mode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_function_is_refused(case):
    change, match = REFUSED[case]
    model = patch_model(build(), backward="exact")
    model(**batch(), fastdpo=True)
    change(model)
    with pytest.raises((NotImplementedError, ValueError), match=match):
        model(**batch(), fastdpo=True)
    assert model(batch()["input_ids"]).logits.shape[:2] == (3, 9)


def test_what_changes_back_is_followed_back():
    model = patch_model(build(), backward="exact")
    hook = model.lm_head.register_forward_hook(lambda _, args, out: 2 * out)
    with pytest.raises(ValueError, match="a hook"):
        model(**batch(), fastdpo=True)
    hook.remove()
    assert_same(model)


def test_another_scale_and_softcap_at_once():
    """A scale so small that the numbers that were looked at do not show the softcap."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM

    class Both(Gemma2ForCausalLM):
        factor = 1.0

        def forward(self, *args, **kwargs):
            cap, self.config.final_logit_softcapping = self.config.final_logit_softcapping, None
            try:
                output = super().forward(*args, **kwargs)
            finally:
                self.config.final_logit_softcapping = cap
            z = output.logits * self.factor
            output.logits = self.cap * torch.tanh(z / self.cap) if self.cap else z
            return output

    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SHAPE | {"final_logit_softcapping": 30.0})
    config.logit_scale = 0.01
    for cap, factor in ((None, 0.01), (30.0, 0.01), (30.0, 1.0)):
        model = Both(config).eval()
        model.cap = None
        patch_model(model, backward="exact")
        assert model.forward.transform == LogitTransform()
        model.cap, model.factor = cap, factor
        with torch.no_grad():
            model.lm_head.weight.normal_(std=40.0)
        assert_same(model)
        assert model.forward.transform == LogitTransform(factor, cap or 0.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_parameters_behind_the_head_are_refused(value):
    """A bias or a factor that is learnt and does nothing yet: the numbers are right and the gradients are not."""

    class Learnt(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.bias, self.factor = nn.Parameter(torch.zeros(V)), nn.Parameter(torch.ones(()))
            (self.factor if value == 0.0 else self.bias).requires_grad_(False)

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.factor + self.bias
            return output

    with pytest.raises(NotImplementedError, match="trainable parameters behind its lm_head"):
        patch_model(Learnt(transformers.LlamaConfig(**SHAPE)))
    model = Learnt(transformers.LlamaConfig(**SHAPE)).requires_grad_(False)
    patch_model(model)(**batch(), fastdpo=True)
    model.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="trainable parameters behind its lm_head"):
        model(**batch(), fastdpo=True)


def test_a_head_inside_of_a_reentrant_checkpoint_is_refused():
    """There it runs without grad: its hidden states are no part of the graph."""

    class Checkpointed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, use_reentrant=True, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            if not self.training:
                return (self.lm_head(hidden),)
            return (torch.utils.checkpoint.checkpoint(self.lm_head, hidden, use_reentrant=use_reentrant),)

    torch.manual_seed(0)
    model = patch_model(Checkpointed(transformers.LlamaConfig(**SHAPE)), backward="exact").train()
    given = {name: batch()[name] for name in ("input_ids", "labels")}
    with pytest.raises(NotImplementedError, match="grad mode"):
        model(**given, fastdpo=True)
    found = gradients(model, model(**given, use_reentrant=False, fastdpo=True).logps.sum())
    model.eval()
    expected = gradients(model, model(**given, fastdpo=True).logps.sum())
    assert found.keys() == expected.keys()


def test_where_nobody_may_look_a_changed_function_gives_nan():
    """In a graph, as on a GPU, the answer is not waited for."""
    torch._dynamo.reset()
    model = patch_model(build(), backward="exact")
    model.compile(backend="eager", fullgraph=True)
    assert model(**batch(), fastdpo=True).logps.isfinite().all()
    model.lm_head.register_forward_hook(lambda _, args, out: 2 * out)
    stats = model(**batch(), fastdpo=True)
    assert stats.logps.isnan().all()
    assert all(grad.isnan().any() for grad in gradients(model, stats.logps.sum()).values())


def test_a_configuration_that_changes_under_torch_compile():
    torch._dynamo.reset()
    model = patch_model(build("gemma2 (softcap)"), backward="exact")
    model.compile(backend="eager")
    model(**batch(), fastdpo=True)
    model.config.final_logit_softcapping = None
    for _ in range(2):
        torch.testing.assert_close(
            model(**batch(), fastdpo=True).logps, definition(model, batch())[0], rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("how", ["bfloat16", "float16", "float64", "autocast", "autocast, then not"])
@pytest.mark.parametrize("name", ["gemma2 (softcap)", "granite (divides)", "hyperclovax (multiplies)", "phi (bias)"])
def test_other_types_after_patching(name, how):
    """Rounding is no other function."""
    model = patch_model(build(name), backward="exact")
    if "autocast" not in how:
        model.to(getattr(torch, how))
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
        found = model(**batch(), fastdpo=True).logps
    if how == "autocast, then not":
        assert_same(model)
    expected, _ = definition(model, batch())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5 if how == "float64" else 0.4, check_dtype=False)
