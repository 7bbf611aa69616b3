"""TRL's divergence Function and DistillationTrainer, with and without patch_trl; and when it must refuse."""

import inspect
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")  # 1.15 has nothing on the CPU to compare with
pytest.importorskip("peft")

import trl
from peft import LoraConfig
from trl.kernels import chunked_divergence
from trl.trainer import distillation_trainer
from trl.trainer import utils as trl_utils
from trl_runs import largest_difference, metrics, prompts, teacher

from fastdpo.integrations import patch_trl, trl_divergence, unpatch_trl
from fastdpo.integrations.trl_release import SUPPORTED, UNSLOTH_MARKS

PLACES = [(distillation_trainer, "ChunkedDivergenceFunction"), (distillation_trainer, "_use_triton")]
PLACES += [(chunked_divergence, "ChunkedDivergenceFunction"), (chunked_divergence, "_use_triton")]
PLACES += [(distillation_trainer.DistillationTrainer, name) for name in ("_compute_loss", "__init__")]
ORIGINALS = [vars(owner)[name] for owner, name in PLACES]
THEIRS = chunked_divergence.ChunkedDivergenceFunction


def now():
    return [vars(owner)[name] for owner, name in PLACES]


@pytest.fixture(autouse=True)
def unpatched():
    unpatch_trl()
    yield
    unpatch_trl()
    assert now() == ORIGINALS


def inputs(n=9, dtype=torch.float32, biases=True, rows=300, teacher_rows=None):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    teacher_rows = teacher_rows or rows
    student = randn(n, 16), randn(rows, 16), randn(rows) if biases else None
    of_teacher = randn(n, 24), randn(teacher_rows, 24, scale=0.5), randn(teacher_rows) if biases else None
    student = [None if x is None else x.requires_grad_() for x in student]
    return student, of_teacher


def results(student, of_teacher, *options):
    function = distillation_trainer.ChunkedDivergenceFunction
    divergence, entropy = function.apply(*student, *of_teacher, *options)
    assert divergence.requires_grad and not entropy.requires_grad
    upstream = torch.linspace(-1.0, 2.0, len(divergence)) if len(divergence) else torch.zeros(0)
    grads = torch.autograd.grad(divergence, [x for x in student if x is not None], upstream)
    return [divergence, entropy, *grads]


BETAS = (0.0, 0.25, 0.5, 0.9, 1.0)
OPTIONS = {
    "plain": (),
    "temperature": (0.7,),
    "softcap of the student": (1.0, 1.0, 6.0, 1.0, None),
    "softcap of the teacher": (1.3, 1.0, None, 1.0, 3.0),
    "scales": (1.0, 0.5, None, 1.5, None),
    "all": (0.7, 0.25, 12.0, 2.0, 5.0),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_trl_s(options, beta):
    for biases in (True, False):
        theirs = results(*inputs(biases=biases), beta, *OPTIONS[options])
        patch_trl(backward="exact")
        ours = results(*inputs(biases=biases), beta, *OPTIONS[options])
        unpatch_trl()
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_reduced_precision_is_nearer_to_fp64_than_trl_s(kind, beta):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return results(*inputs(dtype=dtype), beta)

    theirs = run()
    patch_trl(backward="exact")
    ours = run()
    rounded = inputs(dtype=torch.bfloat16)
    (student, of_teacher) = ([x.double() for x in half] for half in rounded)
    unpatch_trl()
    student = [x.detach().requires_grad_() for x in student]
    p, r = (torch.nn.functional.linear(*half).log_softmax(-1) for half in (student, of_teacher))
    if 0 < beta < 1:
        m = ((1 - beta) * p.exp() + beta * r.exp()).log()
        each = beta * r.exp() * (r - m) + (1 - beta) * p.exp() * (p - m)
    else:
        each = r.exp() * (r - p) if beta == 0 else p.exp() * (p - r)
    right = [each.sum(-1), -(p.exp() * p).sum(-1).detach()]
    right += torch.autograd.grad(right[0], student, torch.linspace(-1.0, 2.0, len(p)).double())
    for mine, other, exact in zip(ours, theirs, right, strict=True):
        assert mine.dtype == other.dtype
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (mine, other)]
        assert errors[0] <= 1.05 * errors[1] + 1e-6, errors
        assert errors[0] < 1e-2


def test_no_rows_no_grad_and_integers():
    patch_trl()
    for number in (0, 1):  # as a user's configuration may have them
        _, _, *grads = results(*inputs(n=0), number)
        assert not any(x.any() for x in grads)
    student, of_teacher = inputs()
    with torch.no_grad():
        divergence, _ = distillation_trainer.ChunkedDivergenceFunction.apply(*student, *of_teacher, 0.5)
    assert divergence.shape == (9,) and not divergence.requires_grad


def test_routed_repeats_with_its_seed():
    patch_trl(backward="exact")
    exact = results(*inputs(rows=4000), 0.0)
    patch_trl(seed=3, tau=0.5)
    routed = [results(*inputs(rows=4000), 0.0) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*routed))
    torch.testing.assert_close(routed[0][:2], exact[:2])
    assert not torch.equal(routed[0][3], exact[3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\]; got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"teacher_hidden": torch.ones(8, 24)}, ValueError, "ref_hidden|labels"),
        ({"teacher_weight": torch.ones(300, 20)}, ValueError, "H = 24"),
        ({"student_weight": torch.ones(300, 16, dtype=torch.int8)}, TypeError, "int8"),
        ({"teacher_bias": torch.ones(299)}, ValueError, "bias"),
    ],
)
def test_arguments_are_checked_as_everywhere(change, error, message):
    student, of_teacher = inputs()
    names = [f"{who}_{what}" for who in ("student", "teacher") for what in ("hidden", "weight", "bias")]
    given = dict(zip(names, [*student, *of_teacher])) | {"beta": 0.5} | change
    patch_trl()
    with pytest.raises(error, match=message):
        distillation_trainer.ChunkedDivergenceFunction.apply(**given)


# Heads of two sizes


@pytest.mark.parametrize(
    ("rows", "ref_rows", "padding"),
    [(151936, 152064, True), (152064, 151936, True), (50304, 50688, True), (32000, 32001, True), (300, 310, True)]
    + [(32000, 128256, False), (151936, 153000, False), (300, 400, False), (50257, 51300, False)],
)
def test_what_padding_is(rows, ref_rows, padding):
    trl_divergence._say.cache_clear()
    assert trl_divergence.is_padding(rows, ref_rows) is padding
    assert trl_divergence.common_vocabulary(rows, rows) is None
    if padding:
        with pytest.warns(UserWarning, match=f"{rows} rows and the teacher's {ref_rows}.*{min(rows, ref_rows)} ids"):
            assert trl_divergence.common_vocabulary(rows, ref_rows) == "common"
        with warnings.catch_warnings():  # once
            warnings.simplefilter("error")
            assert trl_divergence.common_vocabulary(rows, ref_rows) == "common"
    else:
        with pytest.raises(ValueError, match=f"{rows} rows and the teacher's {ref_rows}"):
            trl_divergence.common_vocabulary(rows, ref_rows)


@pytest.mark.filterwarnings("ignore:the student's head")
@pytest.mark.parametrize("teacher_rows", [310, 290])
def test_a_head_padded_otherwise(teacher_rows):
    student, of_teacher = inputs(teacher_rows=teacher_rows)
    common = min(300, teacher_rows)

    def cut(half):
        return half[0], half[1][:common], half[2][:common]

    expected, _ = THEIRS.apply(*cut(student), *cut(of_teacher), 0.5)
    grads = torch.autograd.grad(expected.sum(), student)
    patch_trl(backward="exact")
    divergence, _ = distillation_trainer.ChunkedDivergenceFunction.apply(*student, *of_teacher, 0.5)
    torch.testing.assert_close(divergence, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(torch.autograd.grad(divergence.sum(), student), grads):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# The trainer

ROLLOUT = {"max_completion_length": 6}
TEACHER = {"teacher_model": teacher}
CASES = {
    "default": {},
    "forward": {"beta": 0.0},
    "jsd, accumulated": {"beta": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "trainer_options": TEACHER | {"eval_dataset": prompts},
    },
    "lora": {
        "trainer_options": TEACHER | {"peft_config": lambda: LoraConfig(r=4, target_modules="all-linear")},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_parity(case, train):
    config = {"trainer_options": TEACHER} | ROLLOUT | CASES[case]
    theirs = train("Distillation", prompts(), 4, **config)
    patch_trl(backward="exact")
    ours = train("Distillation", prompts(), 4, **config)
    print(f"{case}: largest metric difference {largest_difference(ours, theirs):.2g}")
    assert ours != theirs
    assert any(entry.get("grad_norm", 0) > 0 for entry in ours)
    assert case != "evaluation" or any("eval_loss" in entry for entry in ours)


def test_after_construction_and_rows_that_count_only(make_trainer, train):
    theirs = train("Distillation", prompts(), 2, trainer_options=TEACHER, **ROLLOUT)
    trainer = make_trainer("Distillation", prompts(), 2, trainer_options=TEACHER, **ROLLOUT)
    patch_trl(backward="exact")
    rows, function = [], trl_divergence._RegatheringDivergence
    forward = function.forward

    def spy(ctx, hidden, *rest):
        rows.append(len(hidden))
        return forward(ctx, hidden, *rest)

    function.forward = staticmethod(spy)
    try:
        trainer.train()
    finally:
        del function.forward
    largest_difference(metrics(trainer), theirs)
    assert len(rows) == 2 and all(0 < count <= 4 * 6 for count in rows)


@pytest.mark.filterwarnings("ignore:the student's head")
def test_a_teacher_padded_otherwise(train):
    """TRL's constructor refuses it; patched it trains, as against the same teacher with fewer rows."""
    narrow = teacher(520)
    narrow.resize_token_embeddings(512, mean_resizing=False)
    padded = teacher(520)
    expected = train("Distillation", prompts(), 2, trainer_options={"teacher_model": lambda: narrow}, **ROLLOUT)
    with pytest.raises(ValueError, match="vocab_size"):
        train("Distillation", prompts(), 2, trainer_options={"teacher_model": lambda: padded}, **ROLLOUT)
    patch_trl(backward="exact")
    ours = train("Distillation", prompts(), 2, trainer_options={"teacher_model": lambda: padded}, **ROLLOUT)
    largest_difference(ours, expected)
    assert padded.config.vocab_size == 520
    with pytest.raises(ValueError, match="vocab_size"):  # no padding: TRL's own refusal
        train("Distillation", prompts(), 2, trainer_options={"teacher_model": lambda: teacher(600)}, **ROLLOUT)


def test_a_teacher_that_lacks_tokens_is_refused():
    class Model:
        def __init__(self, vocab_size):
            self.config = types.SimpleNamespace(vocab_size=vocab_size, get_text_config=lambda: self.config)

    class Trainer:
        def __init__(self, model=None, teacher_model=None, args=None):
            assert model.config.vocab_size == teacher_model.config.vocab_size
            self.processing_class = [None] * args

    Trainer.__init__ = trl_divergence.admitting_padding(Trainer.__init__, None)
    Trainer(Model(512), teacher_model=Model(520), args=512)
    for sizes in ((512, 520), (520, 512)):
        models = [Model(size) for size in sizes]
        with pytest.raises(ValueError, match=r"513 tokens"):
            Trainer(*models, 513)
        assert [model.config.vocab_size for model in models] == list(sizes)


# Heads that are split


def test_zero3_gathers_again_for_the_backward(monkeypatch):
    """DeepSpeed empties a split parameter's data in place and fills it inside GatheredParameters."""

    class Gathered:
        entered = 0

        def __init__(self, *parameters):
            self.parameters = [x for x in parameters if hasattr(x, "full")]

        def __enter__(self):
            Gathered.entered += bool(self.parameters)
            for parameter in self.parameters:
                parameter.data = parameter.full

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.data = torch.empty(0)

    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", Gathered)
    patch_trl(backward="exact")

    def run(split: bool):
        (hidden, *head), (ref_hidden, *ref_head) = inputs()
        head, ref_head = ([torch.nn.Parameter(x.detach()) for x in half] for half in (head, ref_head))
        for parameter in (*head, *ref_head) if split else ():
            parameter.full, parameter.ds_status, parameter.ds_id = parameter.data, "NOT_AVAILABLE", 0
            parameter.register_hook(lambda grad: None)  # where DeepSpeed takes it; .grad has another shape
            parameter.data = torch.empty(0)
        function = distillation_trainer.ChunkedDivergenceFunction
        divergence, _ = function.apply(hidden, *head, ref_hidden, *ref_head, 0.3)
        assert not split or head[0].numel() == ref_head[0].numel() == 0
        grads = []
        for parameter in head if split else ():  # autograd compares a gradient with its parameter's shape
            parameter.data = parameter.full
        grads = torch.autograd.grad(divergence.square().sum(), [hidden, *head])
        return [divergence, *grads]

    whole = run(split=False)
    assert Gathered.entered == 0
    gathered = run(split=True)
    assert Gathered.entered == 3  # both heads, and the student's again
    for mine, other in zip(gathered, whole):
        assert torch.equal(mine, other)


def test_zero3_with_heads_of_two_sizes_is_refused():
    patch_trl()
    student, of_teacher = inputs(teacher_rows=310)
    student[1].ds_id = 0
    with pytest.raises(NotImplementedError, match="two sizes under DeepSpeed"):
        distillation_trainer.ChunkedDivergenceFunction.apply(*student, *of_teacher, 0.5)


# What is there to be replaced


def test_twice_and_options():
    assert patch_trl() is True
    first = distillation_trainer.ChunkedDivergenceFunction
    assert patch_trl(backward="exact") is True
    assert distillation_trainer.ChunkedDivergenceFunction is first and first.placed.options == {"backward": "exact"}
    assert first.forward is THEIRS.forward
    assert chunked_divergence.ChunkedDivergenceFunction is THEIRS
    assert chunked_divergence._use_triton is ORIGINALS[3]
    assert distillation_trainer._use_triton(torch.device("cpu"))


def test_1_15_looks_it_up_where_it_is_defined(monkeypatch):
    monkeypatch.delattr(distillation_trainer, "ChunkedDivergenceFunction")
    patch_trl(backward="exact")
    ours = chunked_divergence.ChunkedDivergenceFunction
    assert ours is not THEIRS
    student, of_teacher = inputs()
    torch.testing.assert_close(
        ours.apply(*student, *of_teacher, 0.5)[0], THEIRS.apply(*student, *of_teacher, 0.5)[0], rtol=1e-5, atol=1e-5
    )
    unpatch_trl()
    assert chunked_divergence.ChunkedDivergenceFunction is THEIRS
    monkeypatch.undo()


@pytest.mark.parametrize("missing", ["trl.trainer.distillation_trainer", "trl.kernels.chunked_divergence"])
def test_releases_without_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert not [place for place in trl_divergence.of_hidden()]
    patch_trl()


def another(*added: inspect.Parameter, dropped: str = ""):
    """TRL's forward, of another release."""
    parameters = inspect.signature(THEIRS.forward).parameters
    kept = [parameter for name, parameter in parameters.items() if name != dropped]

    def forward(ctx, *args): ...

    forward.__signature__ = inspect.Signature([*kept, *added])
    return forward


def parameter(name: str, **default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **default)


def fake(monkeypatch, forward, **attributes):
    function = type("ChunkedDivergenceFunction", (), {"forward": staticmethod(forward)} | attributes)
    monkeypatch.setattr(distillation_trainer, "ChunkedDivergenceFunction", function)
    monkeypatch.setattr(chunked_divergence, "ChunkedDivergenceFunction", function)
    return function


@pytest.mark.parametrize(
    ("forward", "message"), [(another(parameter("clip")), "'clip'"), (another(dropped="beta"), "'beta'")]
)
def test_signatures_that_are_not_understood(forward, message, monkeypatch):
    theirs, logps = fake(monkeypatch, forward), trl_utils._ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match=message) as error:
        patch_trl()
    assert trl.__version__ in str(error.value) and SUPPORTED in str(error.value)
    assert distillation_trainer.ChunkedDivergenceFunction is theirs
    assert trl_utils._ChunkedLogProbFunction is logps
    monkeypatch.undo()


def test_new_arguments_are_refused_when_used(monkeypatch):
    fake(monkeypatch, another(parameter("top_k", default=None)))
    patch_trl()
    student, of_teacher = inputs()
    apply = distillation_trainer.ChunkedDivergenceFunction.apply
    assert apply(*student, *of_teacher, 0.5)[0].shape == (9,)
    with pytest.raises(RuntimeError, match="top_k=8"):
        apply(*student, *of_teacher, 0.5, top_k=8)
    unpatch_trl()
    monkeypatch.undo()


@pytest.mark.parametrize("mark", UNSLOTH_MARKS)
def test_unsloth_was_first(mark, monkeypatch):
    theirs = fake(monkeypatch, THEIRS.forward, **{mark: True})
    with pytest.warns(UserWarning, match="Unsloth has replaced TRL's divergence function"):
        assert patch_trl() is True  # the log-probs
    assert distillation_trainer.ChunkedDivergenceFunction is theirs
    unpatch_trl()
    assert distillation_trainer.ChunkedDivergenceFunction is theirs
    monkeypatch.undo()
