"""What enters: plain strided tensors; the rest is refused by name. And scratch, whatever torch's defaults."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from heads import small_head
from layouts import quick_interpreter
from torch import Tensor

import fastdpo
from fastdpo.head import HeadOptions
from fastdpo.losses import PreferenceOptions
from fastdpo.ops import engines as ops

B, T, V, H = 2, 3, 40, 8


def inputs() -> dict[str, dict[str, Tensor]]:
    """Every tensor argument of every public function, by function."""
    tokens = torch.randint(V, (2 * B, T))
    head = {"hidden": torch.randn(2 * B, T, H), "weight": torch.randn(V, H), "labels": tokens, "bias": torch.randn(V)}
    low_rank = {"lora A": torch.randn(2, H), "lora B": torch.randn(V, 2)}
    logps = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    lengths = {name: torch.randint(1, 5, (B,)) for name in ("chosen_lengths", "rejected_lengths")}
    packed = {"hidden": torch.randn(6, H), "labels": tokens.view(-1)[:6], "cu_seqlens": torch.tensor([0, 1, 6])}
    of_reference = {"ref_hidden": torch.randn(6, H), "ref_weight": torch.randn(V, H), "ref_bias": torch.randn(V)}
    return {
        "linear_logps": head | low_rank,
        "linear_token_stats": head | low_rank,
        "selective_log_softmax": {"logits": torch.randn(6, V), "index": torch.randint(V, (6,))},
        "preference_loss": {name: -torch.rand(B) for name in logps} | lengths | {"kto_kl": torch.tensor(0.1)},
        "linear_dpo_loss": head | low_rank | packed | of_reference,
        "linear_dpo_loss, ref_logps": head | {"ref_logps": -torch.rand(2 * B, T)},
    }


def call(function: str, x: dict[str, Tensor]):
    x, options = dict(x), {"loss_type": "kto"} if function == "preference_loss" else {}
    if "lora A" in x:
        options["lora"] = (x.pop("lora A"), x.pop("lora B"), 0.7)
    if function.startswith("linear"):
        options["seed"] = 3
    return getattr(fastdpo, function.split(",")[0])(**x, **options)


ARGUMENTS = [(function, name) for function, given in inputs().items() for name in given]


class Wrapper(Tensor):
    """Its values are elsewhere: no storage, address 0."""

    @staticmethod
    def __new__(cls, x):
        self = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        self.x = x
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        result = func(*(a.x if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))
        return Wrapper(result) if isinstance(result, Tensor) else result


class Scaled(Tensor):
    """With storage, but operations of its own: what is stored is not what is meant."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


class Tagged(Tensor):
    """Only a name."""


def released(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


STRANGE = {
    "wrapper": (Wrapper, r"Wrapper, whose operations or storage are its own: pass .*dequantize\(\)"),
    "operations of its own": (
        lambda x: x.as_subclass(Scaled),
        r"Scaled, whose operations.*as_subclass\(torch.Tensor\)",
    ),
    "released": (released, r"shape \(.*\) whose storage was released"),
    "nested": (lambda x: torch.nested.nested_tensor([x.reshape(-1)]), r"a nested tensor: pass its to_padded_tensor"),
    "sparse": (lambda x: x.to_sparse(), r"layout torch.sparse_coo: pass its to_dense\(\)"),
    "list": (lambda x: [1.0], r"must be a (torch.Tensor|number)|must be a tensor of integers; got list"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("function,name", ARGUMENTS)
def test_strange_tensors_are_refused_by_name(function, name, kind):
    x, (make, message) = inputs()[function], STRANGE[kind]
    named = name.replace("lora ", "lora('s)? ")
    with pytest.raises((TypeError, ValueError), match=rf"(?s){named}.*({message})"):
        call(function, x | {name: make(x[name])})


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_quantized_tensors_are_refused(name):
    x = inputs()["linear_logps"]
    quantized = torch.quantize_per_tensor(x[name], 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=rf"{name} must be .*a quantized tensor, torch.qint8: pass its dequantize"):
        call("linear_logps", x | {name: quantized})


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch without distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('rank')}/x", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CITIZENS = ("hidden", "weight", "labels", "bias", "lora A", "lora B", "ref_hidden", "ref_weight", "ref_bias")


@pytest.mark.parametrize("placement", ["Replicate", "Shard"])
@pytest.mark.parametrize("function,name", ARGUMENTS)
def test_dtensors_are_served_in_a_head_and_refused_by_name_elsewhere(one_rank, function, name, placement):
    from torch.distributed import tensor as dtensor

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    x = inputs()[function]
    placements = [dtensor.Replicate() if placement == "Replicate" or x[name].ndim == 0 else dtensor.Shard(0)]
    dressed = dtensor.DTensor.from_local(x[name], mesh, placements)
    if function.startswith("linear") and name in CITIZENS:
        ours = call(function, x | {name: dressed})
        assert all(type(value) is Tensor for value in (ours if isinstance(ours, tuple) else [ours]))
        torch.testing.assert_close(ours, call(function, x), rtol=0, atol=0)
        return
    with pytest.raises(
        TypeError, match=rf"{name} must be a plain strided tensor.*DTensor.*full_tensor\(\).*as DTensors"
    ):
        call(function, x | {name: dressed})
    torch.testing.assert_close(call(function, x | {name: dressed.full_tensor()}), call(function, x))


@pytest.mark.parametrize("function,name", [pair for pair in ARGUMENTS if pair[0] != "linear_token_stats"])
def test_subclasses_that_add_nothing_are_served(function, name):
    x = inputs()[function]
    for kind in (Tagged, torch.nn.Parameter):
        if kind is torch.nn.Parameter and not x[name].is_floating_point():
            continue
        dressed = torch.nn.Parameter(x[name]) if kind is torch.nn.Parameter else x[name].as_subclass(Tagged)
        ours, expected = call(function, x | {name: dressed}), call(function, x)
        torch.testing.assert_close(ours, expected)
        assert all(
            type(value) is Tensor for value in (ours if isinstance(ours, tuple) else [ours]) if value is not None
        )


def test_gradients_return_to_a_subclass(engine):
    head = small_head(N=6, V=V, H=H).leaves(torch.float32)
    dressed = head.weight.detach().as_subclass(Tagged).requires_grad_()
    fastdpo.linear_logps(head.hidden, head.weight, head.labels, seed=1).sum().backward()
    fastdpo.linear_logps(head.hidden.detach(), dressed, head.labels, seed=1).sum().backward()
    torch.testing.assert_close(dressed.grad.as_subclass(Tensor), head.weight.grad)


def test_upstream_gradients_are_checked_too():
    class Strange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, _):
            return Wrapper(torch.ones(6))

    head = small_head(N=6, V=V, H=H).leaves(torch.float32)
    with pytest.raises(TypeError, match=r"an upstream gradient must be a plain strided tensor; got a .*Wrapper"):
        Strange.apply(fastdpo.linear_logps(head.hidden, head.weight, head.labels)).backward()


def test_functions_are_checked_where_they_reach_engines():
    """The exported Functions, called without the public function before them."""
    head = small_head(N=6, V=V, H=H).leaves(torch.float32, False)
    options = HeadOptions()
    for name in ("hidden", "weight", "labels"):
        given = {"hidden": head.hidden, "weight": head.weight, "labels": head.labels}
        given[name] = Wrapper(given[name])
        inputs = (given["hidden"], given["weight"], None, None, None, given["labels"])
        with pytest.raises(TypeError, match=f"{name} must be a plain strided tensor"):
            fastdpo.LinearLogpsFunction.apply(*inputs, options, (), False)
    with pytest.raises(TypeError, match="chosen_logps must be a plain strided tensor; got a tensor of shape"):
        fastdpo.PreferenceLossFunction.apply(
            released(torch.zeros(2)), torch.zeros(2), None, None, None, None, PreferenceOptions()
        )


# Defaults of torch that are another's business


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "meta device": lambda: torch.device("meta"),
    "fp64": lambda: default_dtype(torch.float64),
}


def everything(function: str, x: dict[str, Tensor], options: dict) -> list[Tensor]:
    """Results and gradients, through public functions only."""
    given = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in x.items()}
    given.pop("kto_kl", None)
    leaves = [value for value in given.values() if value.requires_grad]
    lora = {"lora": (given.pop("lora A"), given.pop("lora B"), 0.7)} if "lora A" in given else {}
    results = getattr(fastdpo, function.split(",")[0])(**given, **lora, **options)
    results = [value for value in (results if isinstance(results, tuple) else [results]) if value is not None]
    total = sum(value.square().sum() for value in results if value.requires_grad)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [x for x in (*results, *gradients) if x is not None]


OPTIONS = {
    "linear_logps": [{"seed": 1, "tau": (0.3, 0.02)}, {"backward": "exact", "softcap": 5.0}],
    "linear_token_stats": [{"backward": "exact"}],
    "selective_log_softmax": [{"return_entropy": True}, {"temperature": 0.7}],
    "preference_loss": [{"loss_type": name} for name in ("sigmoid", "ipo", "aot", "sigmoid_norm")],
    "linear_dpo_loss": [
        {"seed": 1},
        {"seed": 1, "loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4, "use_weighting": True},
        {"seed": 1, "loss_type": "aot", "average_log_prob": True},
    ],
    "linear_dpo_loss, ref_logps": [{"seed": 1, "loss_type": "ipo"}],
}
CALLS = [(function, options) for function, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize("function,options", CALLS, ids=str)
def test_defaults_change_no_bit(engine, function, options):
    x = inputs()[function]
    with quick_interpreter(engine):
        expected = everything(function, x, options)
        for default in DEFAULTS.values():
            with default():
                ours = everything(function, x, options)
            for value, wanted in zip(ours, expected, strict=True):
                assert value.dtype == wanted.dtype and value.device == wanted.device and torch.equal(value, wanted)


def test_a_large_routed_call_under_other_defaults(engine):
    """Enough tokens and blocks for several pieces of the routed backward, and rows left out."""
    head = small_head(N=70, V=700, H=32, bias=True, masked=True, sharpness=2.0).leaves(torch.float32)
    head.labels[3] = 700

    def run():
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, head.bias, seed=3, tau=(0.1, 0.01))
        return logps, *torch.autograd.grad(logps.sum(), list(head.tensors().values()))

    expected = run()
    for default in DEFAULTS.values():
        with default():
            ours = run()
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function,options", CALLS, ids=str)
def test_meta_tensors_give_meta_results(function, options):
    x = inputs()[function]
    expected = everything(function, x, options)
    ours = everything(function, {name: value.to("meta") for name, value in x.items()}, options)
    for value, wanted in zip(ours, expected, strict=True):
        assert value.device.type == "meta" and value.dtype == wanted.dtype and value.shape == wanted.shape


def test_meta_labels_cannot_be_checked():
    x = {name: value.to("meta") for name, value in inputs()["linear_logps"].items()}
    with pytest.raises(ValueError, match="check_labels=True reads the values of labels, which are on the meta device"):
        fastdpo.linear_logps(x["hidden"], x["weight"], x["labels"], check_labels=True)


OF_INTEGERS = {f"torch.{name}" for name in ("arange", "tensor", "randint")}
FACTORIES = OF_INTEGERS | {f"torch.{name}" for name in ("empty", "zeros", "ones", "full", "rand", "randn", "eye")}


def test_every_tensor_is_made_on_a_named_device():
    """torch's defaults are the caller's: a factory names its device, and its type unless that follows from ints."""
    nameless = []
    package = Path(fastdpo.__file__).parent
    for path in sorted(package.rglob("*.py")):
        # a command's process is its own, and nobody's default device is set there
        if path.relative_to(package).parts[0] in ("demo", "models", "integrations", "commands", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in FACTORIES:
                continue
            keywords = {keyword.arg for keyword in node.keywords}
            needed = {"device"} if ast.unparse(node.func) in OF_INTEGERS else {"device", "dtype"}
            if None not in keywords and not needed <= keywords:  # None: a ** of both
                nameless.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not nameless, nameless


def test_only_one_way_to_an_address():
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(Path(ops.__file__).parent.rglob("*.py"))
        for line in path.read_text().splitlines()
        if "data_ptr()" in line
    ]
    assert len(found) == 2, found  # alignment and identity, which read no memory; addresses are csrc/arguments.h's
