"""patch_trl: TRL's own trainers, with and without it, step by step; and when it must refuse."""

import inspect
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")  # 1.15 has no log-prob function on the CPU to compare with
pytest.importorskip("peft")

import trl
from trl.trainer import utils as trl_utils
from trl_runs import preferences

from fastdpo.integrations import patch_trl, unpatch_trl
from fastdpo.integrations import trl as integration
from fastdpo.integrations.trl_release import SUPPORTED, UNSLOTH_MARKS, only_selects_rows

ORIGINALS = (trl_utils._ChunkedLogProbFunction, trl_utils._use_triton)


@pytest.fixture(autouse=True)
def unpatched():
    unpatch_trl()
    yield
    unpatch_trl()
    assert (trl_utils._ChunkedLogProbFunction, trl_utils._use_triton) == ORIGINALS


def test_patching_reaches_trainers_that_exist_already(train, tiny_llama):
    model = tiny_llama()
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.arange(40).view(2, 20) % 30
    labels = ids.masked_fill(torch.arange(20) < 7, -100)
    before = model(input_ids=ids, labels=labels, fused_lm_head=True)
    rows = []
    assert patch_trl() is True
    forward = integration._RegatheringLogps.forward

    def spy(ctx, hidden, *rest):
        rows.append(hidden.shape[0])
        return forward(ctx, hidden, *rest)

    integration._RegatheringLogps.forward = staticmethod(spy)
    try:
        after = model(input_ids=ids, labels=labels, fused_lm_head=True)
    finally:
        del integration._RegatheringLogps.forward
    assert rows == [26]  # completion rows only, on the CPU too: 2 * (20 - 7)
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(after.is_top1, before.is_top1)


def test_dpo_routed(train):
    theirs = train("DPO", preferences(), 10)
    patch_trl()
    ours = train("DPO", preferences(), 10)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert all(abs(value) < 1e6 for value in mine.values())
        assert abs(mine["loss"] - other["loss"]) < 0.05
    assert ours != theirs  # the routed backward is not the exact one: it has run
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5)


def direct_inputs(dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(9, 16, generator=generator).to(dtype).requires_grad_(requires_grad)
    weight = torch.randn(300, 16, generator=generator).to(dtype).requires_grad_(requires_grad)
    bias = torch.randn(300, generator=generator).to(dtype).requires_grad_(requires_grad)
    targets = torch.randint(300, (9,), generator=generator)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), tuple(integration.OUTPUTS)])
def test_values_and_gradients_are_trl_s(outputs):
    def results():
        hidden, weight, bias, targets = direct_inputs()
        values = trl_utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 128, 20.0, 1.5, outputs)
        loss = values[0].square().sum() + (values[1].sum() if values[1] is not None else 0.0)
        loss.backward()
        return values, (hidden.grad, weight.grad, bias.grad)

    theirs, their_grads = results()
    patch_trl(backward="exact")
    ours, our_grads = results()
    assert len(ours) == len(theirs) == 5
    for mine, other in zip(ours, theirs):
        assert (mine is None) == (other is None)
        if other is not None:
            assert mine.dtype == other.dtype and mine.requires_grad == other.requires_grad
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(our_grads, their_grads):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.arange(96)}, ValueError, r"labels must be shaped like hidden .*\(64,\).*got \(96,\)"),
        ({"weight": torch.ones(300, 16, dtype=torch.int8)}, TypeError, "weight must be fp32.*int8"),
        ({"weight": torch.ones(300, 12)}, ValueError, "hidden has H = 16 but weight has H = 12"),
        ({"bias": torch.ones(299)}, ValueError, r"bias must have shape \(300,\)"),
        ({"targets": torch.ones(64)}, TypeError, "labels must be int64 or int32"),
        ({"hidden": torch.ones(64, 16).to_sparse()}, TypeError, "hidden must be a plain strided tensor"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
)
def test_arguments_are_checked_as_everywhere(change, error, message):
    """Native code takes addresses and trusts sizes: 96 targets of 64 rows would be read out of bounds."""
    given = {"hidden": torch.ones(64, 16), "weight": torch.ones(300, 16), "bias": None, "targets": torch.arange(64)}
    given |= {"temperature": 1.0} | change
    patch_trl()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(error, match=message):
            trl_utils._ChunkedLogProbFunction.apply(*given.values(), 32768, None, 1.0, ("log_probs",))


def test_no_grad_and_no_rows():
    patch_trl()
    hidden, weight, bias, targets = direct_inputs()
    arguments = (1.0, 32768, None, 1.0, ("log_probs", "entropy"))
    with torch.no_grad():
        logps = trl_utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *arguments)[0]
    assert logps.shape == (9,) and not logps.requires_grad
    logps, entropy, *rest = trl_utils._ChunkedLogProbFunction.apply(hidden[:0], weight, bias, targets[:0], *arguments)
    assert logps.shape == entropy.shape == (0,) and rest == [None, None, None]
    logps.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_autocast_decides_the_type():
    hidden, weight, _, targets = direct_inputs()
    arguments = (targets, 1.0, 32768, None, 1.0, ("log_probs",))
    patch_trl()
    with torch.autocast("cpu", torch.bfloat16):
        ours = trl_utils._ChunkedLogProbFunction.apply(hidden, weight, None, *arguments)[0]
    rounded = trl_utils._ChunkedLogProbFunction.apply(hidden.bfloat16(), weight.bfloat16(), None, *arguments)[0]
    torch.testing.assert_close(ours, rounded, rtol=1e-6, atol=1e-6)


def test_zero3_gathers_again_for_the_backward(monkeypatch):
    """DeepSpeed empties a split parameter's data in place and fills it inside GatheredParameters."""

    class Gathered:
        entered = 0

        def __init__(self, *parameters):
            self.parameters = parameters

        def __enter__(self):
            Gathered.entered += 1
            for parameter in self.parameters:
                parameter.data = parameter.full

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.data = torch.empty(0)

    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", Gathered)
    patch_trl(backward="exact")

    def run(split: bool):
        hidden, weight, bias, targets = direct_inputs()
        parameters = [torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())]
        if split:
            for parameter in parameters:
                parameter.full, parameter.ds_status, parameter.ds_id = parameter.data, "NOT_AVAILABLE", 0
                parameter.data = torch.empty(0)
        grads = []
        apply = trl_utils._ChunkedLogProbFunction.apply
        arguments = (targets, 1.0, 32768, None, 1.0, ("log_probs",))
        if split:
            for parameter in parameters:  # DeepSpeed takes the gradient where it arrives; .grad has another shape
                parameter.data = parameter.full
                parameter.register_hook(lambda grad: grads.append(grad.clone()))
            with Gathered(*parameters):
                logps = apply(hidden, *parameters, *arguments)[0]
            assert parameters[0].numel() == 0
        else:
            logps = apply(hidden, *parameters, *arguments)[0]
        inputs = (hidden, *parameters)
        return torch.autograd.grad(logps.square().sum(), inputs)

    whole = run(split=False)
    assert Gathered.entered == 0
    gathered = run(split=True)
    assert Gathered.entered == 2
    for mine, other in zip(gathered, whole):
        assert torch.equal(mine, other)


def test_an_empty_head_is_refused():
    patch_trl()
    hidden, weight, _, targets = direct_inputs()
    with pytest.raises(RuntimeError, match="without rows"):
        trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight[:0], None, targets, 1.0, 32768, None, 1.0, ("log_probs",)
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backwards": "exact"}, TypeError, "backwards"),
        ({"temperature": 0.5}, TypeError, "temperature"),
        ({"backward": "fast"}, ValueError, "'fast'"),
        ({"tau": 2.0}, ValueError, "2.0"),
        ({"seed": -1}, ValueError, "-1"),
        ({"seed": 1.5}, TypeError, "1.5"),
        ({"backward": "exact", "tau": 0.1}, ValueError, "tau"),
    ],
)
def test_bad_options_patch_nothing(options, error, message):
    with pytest.raises(error, match=message):
        patch_trl(**options)
    assert (trl_utils._ChunkedLogProbFunction, trl_utils._use_triton) == ORIGINALS


def test_twice_updates_the_options_and_unpatching_restores():
    unpatch_trl()  # nothing to do
    assert patch_trl() is True
    first = trl_utils._ChunkedLogProbFunction
    assert patch_trl(backward="exact") is True
    assert trl_utils._ChunkedLogProbFunction is first and integration._placed.options == {"backward": "exact"}
    with pytest.raises(ValueError):
        patch_trl(tau=-1.0)
    assert integration._placed.options == {"backward": "exact"}
    unpatch_trl()
    assert (trl_utils._ChunkedLogProbFunction, trl_utils._use_triton) == ORIGINALS
    unpatch_trl()


def test_modules_that_imported_the_symbol_by_name(monkeypatch):
    """As TRL 1.14's trainers do; also when they are loaded after patching, or live outside of TRL."""
    early, late, elsewhere = (types.ModuleType(n) for n in ("trl.trainer.early", "trl.late", "trlx.mine"))
    early.Function = elsewhere.Function = ORIGINALS[0]
    monkeypatch.setitem(sys.modules, early.__name__, early)
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)
    patch_trl()
    monkeypatch.setitem(sys.modules, late.__name__, late)
    late.Function = trl_utils._ChunkedLogProbFunction
    assert early.Function is late.Function is trl_utils._ChunkedLogProbFunction
    assert elsewhere.Function is ORIGINALS[0]
    assert trl.kernels.ChunkedLogProbFunction is ORIGINALS[0]
    unpatch_trl()
    assert early.Function is late.Function is ORIGINALS[0]


def test_members_of_trl_s_modules_are_not_asked(monkeypatch):
    """As transformers' in the place of classes whose packages are missing, and objects that import when looked at."""

    class Placeholder(type):
        def __getattribute__(cls, name):
            raise ImportError(f"{name} needs Pillow")

    class Proxy:
        @property
        def __class__(self):
            raise RuntimeError("imported")

    module = types.ModuleType("trl.trainer.pictures")
    module.ImageProcessor, module.proxy = Placeholder("ImageProcessor", (), {}), Proxy()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, member in vars(module).copy().items():
        monkeypatch.setattr(trl_utils, name, member, raising=False)
    patch_trl()
    module.function = trl_utils._ChunkedLogProbFunction
    unpatch_trl()
    assert module.function is ORIGINALS[0]


def fake(monkeypatch, forward):
    """Installs a Function with another release's signature; its own apply must never be reached."""
    function = type("ChunkedLogProbFunction", (), {"forward": staticmethod(forward)})
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", function)
    return function


def forward_1_1(ctx, last_hidden, weight, targets, temperature, chunk_size, logit_scale=1.0): ...
def forward_1_4(
    ctx, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
): ...
def forward_1_14(
    ctx,
    last_hidden,
    weight,
    bias,
    targets,
    temperature,
    chunk_size,
    final_logit_softcapping=None,
    logit_scale=1.0,
): ...


@pytest.mark.parametrize("forward", [forward_1_1, forward_1_4, forward_1_14])
def test_older_signatures(forward, monkeypatch):
    hidden, weight, bias, targets = direct_inputs()
    has_bias, has_softcap = forward is forward_1_14, forward is not forward_1_1
    expected = ORIGINALS[0].apply(
        hidden, weight, bias if has_bias else None, targets, 0.7, 128, 20.0 if has_softcap else None, 1.5
    )
    function = fake(monkeypatch, forward)
    patch_trl()
    middle = (bias,) if has_bias else ()
    softcap = (20.0,) if has_softcap else ()
    values = trl_utils._ChunkedLogProbFunction.apply(hidden, weight, *middle, targets, 0.7, 128, *softcap, 1.5)
    assert len(values) == 2
    torch.testing.assert_close(values, expected[:2], rtol=1e-5, atol=1e-5)
    unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is function


def test_trl_1_15_without_triton_has_none(monkeypatch):
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", None)
    patch_trl()
    hidden, weight, bias, targets = direct_inputs()
    arguments = (hidden, weight, bias, targets, 1.0, 32768, None, 1.0, ("log_probs", "is_top1"))
    torch.testing.assert_close(
        trl_utils._ChunkedLogProbFunction.apply(*arguments)[0], ORIGINALS[0].apply(*arguments)[0]
    )
    unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is None


def needs_more(ctx, hidden, weight, bias, targets, temperature, sharpness, outputs=()): ...
def takes_anything(ctx, hidden, weight, bias, targets, temperature, **options): ...
def without_targets(ctx, hidden, weight, bias, tokens=None, temperature=1.0): ...


@pytest.mark.parametrize(
    ("forward", "message"),
    [(needs_more, "'sharpness'"), (takes_anything, "options"), (without_targets, "'labels'")],
)
def test_signatures_that_are_not_understood(forward, message, monkeypatch):
    function = fake(monkeypatch, forward)
    with pytest.raises(RuntimeError, match=message) as error:
        patch_trl()
    assert trl.__version__ in str(error.value) and SUPPORTED in str(error.value)
    assert trl_utils._ChunkedLogProbFunction is function and trl_utils._use_triton is ORIGINALS[1]


def test_new_arguments_are_refused_when_used(monkeypatch):
    def newer(ctx, hidden, weight, bias, targets, temperature, outputs=("log_probs",), label_smoothing=0.0): ...

    fake(monkeypatch, newer)
    patch_trl()
    hidden, weight, bias, targets = direct_inputs()
    apply = trl_utils._ChunkedLogProbFunction.apply
    assert apply(hidden, weight, bias, targets, 1.0, ("log_probs",), 0.0)[0].shape == targets.shape
    with pytest.raises(RuntimeError, match=r"label_smoothing=0\.1"):
        apply(hidden, weight, bias, targets, 1.0, ("log_probs",), 0.1)
    with pytest.raises(RuntimeError, match="'varentropy'"):
        apply(hidden, weight, bias, targets, 1.0, ("log_probs", "varentropy"))


def test_releases_without_the_symbol(monkeypatch):
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="supports TRL"):
        patch_trl()


def test_without_trl(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdpo\[trl\]'"):
        patch_trl()


@pytest.mark.parametrize("mark", UNSLOTH_MARKS)
def test_unsloth_was_first(mark, monkeypatch):
    theirs = type("_UnslothFusedLinearHead", (), {mark: True, "forward": ORIGINALS[0].forward})()
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", theirs)
    with pytest.warns(UserWarning, match="Unsloth"):
        assert patch_trl() is False
    assert trl_utils._ChunkedLogProbFunction is theirs and trl_utils._use_triton is ORIGINALS[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is theirs


def test_unsloth_comes_later(monkeypatch):
    """Its replacement inspects the forward of what it finds, and stays when ours is taken back."""
    patch_trl()
    ours = trl_utils._ChunkedLogProbFunction
    assert inspect.signature(ours.forward) == inspect.signature(ORIGINALS[0].forward)
    theirs = types.SimpleNamespace(_unsloth_fused_linear=True, function=ours)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", theirs)
    unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is theirs
    monkeypatch.undo()


def test_use_triton_is_replaced_only_where_it_selects_rows(monkeypatch):
    assert only_selects_rows(trl_utils, "add_fused_lm_head")
    patch_trl()
    assert trl_utils._use_triton(torch.device("cpu"))
    assert trl_utils._use_triton(torch.device("meta")) == ORIGINALS[1](torch.device("meta"))
    assert trl.kernels.chunked_logprob._use_triton is ORIGINALS[1]
    unpatch_trl()

    newer = inspect.getsource(trl_utils) + "def selective_log_softmax(x):\n    return (lambda: _use_triton(x.device))()"
    monkeypatch.setattr(inspect, "getsource", lambda module: newer)
    assert not only_selects_rows(trl_utils, "add_fused_lm_head")
    patch_trl()
    assert trl_utils._use_triton is ORIGINALS[1]
    unpatch_trl()


def test_importing_fastdpo_imports_no_trainer():
    import subprocess

    code = """
import sys, fastdpo, fastdpo.integrations
print([name for name in ("trl", "transformers", "peft") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
