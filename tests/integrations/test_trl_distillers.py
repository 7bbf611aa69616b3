"""GKD, GOLD and MiniLLM with patch_trl: step by step what they are without it; losses that are not what is known."""

import types
import warnings

import pytest
import torch

pytest.importorskip("trl", minversion="0.24")
pytest.importorskip("peft")

from peft import LoraConfig
from trl_runs import CHAT_TEMPLATE, classes, conversations, largest_difference, prompts, teacher

from fastdpo.demo.setup import build_tokenizer
from fastdpo.integrations import lazy_logits, patch_trl, trl_distillers, unpatch_trl
from fastdpo.integrations.trl_methods import methods_of
from fastdpo.models.lazy.logits import LazyLogits

OWNERS = [owner for name, known in trl_distillers.LOSSES.items() for owner, _ in methods_of(name, known[:1])]


@pytest.fixture(autouse=True)
def unpatched():
    unpatch_trl()
    originals = {owner: dict(vars(owner)) for owner in OWNERS}
    yield
    unpatch_trl()
    for owner, names in originals.items():
        assert [name for name, value in vars(owner).items() if value is not names.get(name)] == []


def bytes_tokenizer():
    """GOLD takes no other."""
    rows = conversations()["messages"]
    tokenizer = build_tokenizer([message["content"] for row in rows for message in row], 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


TEACHER = {"teacher_model": teacher}
LORA = {"peft_config": lambda: LoraConfig(r=4, target_modules="all-linear")}
KD = {"max_new_tokens": 5, "trainer_options": TEACHER}
GOLD = {"max_completion_length": 5, "trainer_options": TEACHER | {"processing_class": bytes_tokenizer}}
CASES = {
    "gkd": ("GKD", {"lmbda": 0.0}),
    "gkd forward": ("GKD", {"lmbda": 0.0, "beta": 0.0}),
    "gkd reverse, accumulated": (
        "GKD",
        {"lmbda": 0.0, "beta": 1.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ),
    "gkd on policy": ("GKD", {"lmbda": 1.0, "temperature": 0.7}),
    "gkd evaluation": (
        "GKD",
        {
            "lmbda": 0.0,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "trainer_options": TEACHER | {"eval_dataset": conversations},
        },
    ),
    "gkd lora": ("GKD", {"lmbda": 0.0, "trainer_options": TEACHER | LORA}),
    "gold": ("GOLD", {"lmbda": 0.0, "beta": 0.3, "temperature": 0.7}),
    "minillm": ("MiniLLM", {"num_generations": 2, "max_completion_length": 6, "kd_temperature": 0.8}),
}


def cases():
    for name, (kind, _) in CASES.items():
        try:
            classes(kind)
        except ImportError:
            continue
        yield name


@pytest.fixture
def distil(train, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)

    def run(case: str, steps: int, **more):
        kind, config = CASES[case]
        common = {"GKD": KD, "GOLD": GOLD}.get(kind, {"trainer_options": TEACHER})
        data = prompts if kind == "MiniLLM" else conversations
        return train(kind, data(), steps, **(common | config | more))

    return run


@pytest.mark.parametrize("case", cases())
def test_parity(case, distil):
    theirs = distil(case, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch_trl(backward="exact")
        ours = distil(case, 4)
    print(f"{case}: largest metric difference {largest_difference(ours, theirs):.2g}")
    assert ours != theirs  # its sums are in another order: it took part
    assert not [w for w in caught if "needs the logits" in str(w.message)]
    assert any(entry.get("grad_norm", 0) > 0 for entry in ours)


@pytest.mark.skipif("gold" not in cases(), reason="no GOLD in this release")
def test_gold_between_tokenizers_stays_trl_s(distil, tmp_path):
    """Its loss reads sorted or matched probabilities."""
    bytes_tokenizer().save_pretrained(tmp_path / "of_teacher")
    config = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": str(tmp_path / "of_teacher")}
    theirs = distil("gold", 2, **config)
    patch_trl(backward="exact")
    assert distil("gold", 2, **config) == theirs


def test_routed_and_without_logits(distil, monkeypatch):
    theirs = distil("gkd", 3)
    linear, rows = torch.nn.functional.linear, []

    def spy(hidden, weight, bias=None):
        if weight.shape[0] == 512:
            rows.append(hidden.shape)
        return linear(hidden, weight, bias)

    patch_trl(seed=1)
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    ours = distil("gkd", 3)
    assert not rows and ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5)


def test_a_teacher_padded_otherwise(distil):
    """520 rows against 512: TRL compares 512 logits with 520, or refuses to; 28 tokens are in use."""
    padded = {"teacher_model": lambda: teacher(520)}
    narrow = teacher(520)
    narrow.resize_token_embeddings(512, mean_resizing=False)
    expected = distil("gkd", 2, trainer_options={"teacher_model": lambda: narrow})
    with pytest.raises((ValueError, RuntimeError)):
        distil("gkd", 2, trainer_options=padded)
    patch_trl(backward="exact")
    trl_distillers.common_vocabulary.__globals__["_say"].cache_clear()
    with pytest.warns(UserWarning, match=r"512 rows and the teacher's 520.*first 512 ids"):
        ours = distil("gkd", 2, trainer_options=padded)
    largest_difference(ours, expected)


# The losses themselves


def lazily(student, teacher, hidden, ref_hidden):
    with lazy_logits(student, backward="exact"):
        z = student(hidden)
    with torch.no_grad(), lazy_logits(teacher):
        w = teacher(ref_hidden)
    assert isinstance(z, LazyLogits) and isinstance(w, LazyLogits)
    return z, w


def heads(teacher_rows: int = 300):
    torch.manual_seed(3)
    student, of_teacher = torch.nn.Linear(16, 300), torch.nn.Linear(24, teacher_rows, bias=False)
    of_teacher.weight.data *= 3
    return student, of_teacher, torch.randn(2, 6, 16), torch.randn(2, 6, 24)


def both(loss, read, **arguments):
    """[(loss, gradients)] of lazy logits and of logits."""
    found = []
    for lazy in (True, False):
        student, of_teacher, hidden, ref_hidden = heads()
        hidden.requires_grad_()
        if lazy:
            z, w = lazily(student, of_teacher, hidden, ref_hidden)
        else:
            z, w = student(hidden), of_teacher(ref_hidden).detach()
        value = loss(*read(z, w), **arguments)
        grads = torch.autograd.grad(value, [hidden, *student.parameters()])
        found.append([value, *grads])
    return found


LABELS = torch.tensor([[-100, 3, 5, -100, 0], [1, 1, -100, -100, -100]])
READS = {
    "shifted": lambda z, w: (z[:, :-1, :], w[:, :-1, :]),
    "scale and softcap": lambda z, w: (30 * torch.tanh(z[:, 1:] * 0.5 / 30), 5 * torch.tanh(w[:, 1:] / 5)),
    "softcap, then temperature": lambda z, w: (4 * torch.tanh(z[:, 1:] / 4) / 0.6, w[:, :-1] * 2),
    "other rows of the teacher": lambda z, w: (z[:, :-1], w.flatten(0, 1)[1:11].reshape(2, 5, 300)),
}


def jsd():
    patch_trl()
    owners = [owner for owner in OWNERS if "generalized_jsd_loss" in vars(owner)]
    assert owners
    return [owner.generalized_jsd_loss for owner in owners]


@pytest.mark.filterwarnings("error:.*needs the logits")
@pytest.mark.parametrize("beta", [0, 0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("read", READS)
def test_losses_of_lazy_logits(read, beta):
    for loss in jsd():
        mine, other = both(loss, READS[read], labels=LABELS, beta=beta, temperature=0.7)
        for x, y in zip(mine, other):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error:.*needs the logits")
@pytest.mark.parametrize(
    "arguments", [{"reduction": "sum"}, {"num_items_in_batch": 9}, {"num_items_in_batch": torch.tensor(9)}], ids=str
)
def test_what_is_divided_by(arguments):
    for loss in jsd():
        if "num_items_in_batch" in arguments and "num_items_in_batch" not in loss.__wrapped__.__code__.co_varnames:
            continue
        mine, other = both(loss, READS["shifted"], labels=LABELS, **arguments)
        for x, y in zip(mine, other):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_no_row_counts():
    for loss in jsd():
        mine, other = both(loss, READS["shifted"], labels=torch.full_like(LABELS, -100))
        for x, y in zip(mine, other):
            torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize(
    "arguments",
    [{"reduction": "mean", "labels": LABELS}, {"labels": None}, {"reduction": "none", "labels": LABELS}],
    ids=str,
)
def test_other_reductions_take_the_logits(arguments):
    for loss in jsd():
        with pytest.warns(UserWarning, match="needs the logits"):
            mine, other = both(
                lambda *z, loss=loss, **options: loss(*z, **options).mean(), READS["shifted"], **arguments
            )
        for x, y in zip(mine, other):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_teacher_with_a_gradient_keeps_it():
    """TRL's loss is differentiable for both; linear_divergence is for one."""
    loss, grads = jsd()[0], []
    for lazy in (True, False):
        student, of_teacher, hidden, ref_hidden = heads()
        if lazy:
            with lazy_logits(student, of_teacher, backward="exact"):
                z, w = student(hidden), of_teacher(ref_hidden)
        else:
            z, w = student(hidden), of_teacher(ref_hidden)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(z[:, :-1], w[:, :-1], labels=LABELS).backward()
        grads.append([student.weight.grad, of_teacher.weight.grad])
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_heads_of_two_vocabularies():
    student, of_teacher, hidden, ref_hidden = heads(310)
    z, w = lazily(student, of_teacher, hidden, ref_hidden)
    expected = vars(OWNERS[0])["generalized_jsd_loss"](
        student(hidden)[:, :-1], of_teacher(ref_hidden)[:, :-1, :300], LABELS
    )
    loss = jsd()[0]
    trl_distillers.common_vocabulary.__globals__["_say"].cache_clear()
    with pytest.warns(UserWarning, match="300 rows and the teacher's 310"):
        torch.testing.assert_close(loss(z[:, :-1], w[:, :-1], LABELS), expected, rtol=1e-5, atol=1e-6)
    student, of_teacher, hidden, ref_hidden = heads(400)
    z, w = lazily(student, of_teacher, hidden, ref_hidden)
    with pytest.raises(ValueError, match="300 rows and the teacher's 400"):
        loss(z[:, :-1], w[:, :-1], LABELS)


# Losses that are not what is known


class MiniLLMTrainer:
    """With the loss of TRL 0.28 to 1.14, whose trainer needs no more of them here."""

    def __init__(self, model, teacher_model):
        self.model, self.teacher_model = model, teacher_model

    def _single_step_decomposition_loss(self, student_log_probs, teacher_log_probs, mask=None, reduction="batchmean"):
        each = torch.nn.functional.kl_div(teacher_log_probs, student_log_probs, reduction="none", log_target=True)
        each = each if mask is None else each[mask]
        if reduction == "batchmean":
            return each.sum() / mask.sum() if mask is not None else each.sum() / each.size(0)
        return each.sum() if reduction == "sum" else each

    def compute_loss(self, model, inputs):
        with torch.no_grad():
            w = self.teacher_model(inputs["ref_hidden"])
        p, r = (x[:, :-1].div(0.8).log_softmax(-1) for x in (model(inputs["hidden"]), w))
        on_labels = p.gather(-1, inputs["labels"][..., None])[..., 0]
        return self._single_step_decomposition_loss(p, r, inputs["labels"] != 1) - on_labels.mean()


def placed(trainer: type, monkeypatch):
    monkeypatch.setattr(trl_distillers, "methods_of", lambda *_: [(trainer, "_single_step_decomposition_loss")])
    return trl_distillers._places("MiniLLMTrainer")


@pytest.mark.filterwarnings("error:.*needs the logits")
def test_minillm(monkeypatch):
    values = []
    for patched in (False, True):
        trainer = type("MiniLLMTrainer", (), dict(vars(MiniLLMTrainer)))
        if patched:
            replacements = types.SimpleNamespace(options={"backward": "exact"})
            for owner, name, make in placed(trainer, monkeypatch):
                setattr(owner, name, make(vars(owner)[name], replacements))
        student, of_teacher, hidden, ref_hidden = heads()
        inputs = {"hidden": hidden.requires_grad_(), "ref_hidden": ref_hidden, "labels": LABELS.clamp_min(0)}
        value = trainer(student, of_teacher).compute_loss(student, inputs)
        values.append([value, *torch.autograd.grad(value, [hidden, *student.parameters()])])
    assert not torch.equal(values[0][1], values[1][1])
    for x, y in zip(*values):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def doubled(self, student_log_probs, teacher_log_probs, mask=None, reduction="batchmean"):
    return 2 * MiniLLMTrainer._single_step_decomposition_loss(
        self, student_log_probs, teacher_log_probs, mask, reduction
    )


def forward_kl(self, student_log_probs, teacher_log_probs, mask=None, reduction="batchmean"):
    return MiniLLMTrainer._single_step_decomposition_loss(self, teacher_log_probs, student_log_probs, mask, reduction)


def with_more(self, student_log_probs, teacher_log_probs, mask=None, reduction="batchmean", clip=0.2): ...
def failing(self, student_log_probs, teacher_log_probs, mask=None, reduction="batchmean"):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("loss", "message"),
    [(doubled, "not"), (forward_kl, "not"), (with_more, "takes clip"), (failing, "ZeroDivisionError")],
)
def test_other_losses_are_left_alone(loss, message, monkeypatch):
    trainer = type(
        "MiniLLMTrainer", (MiniLLMTrainer,), dict(vars(MiniLLMTrainer)) | {"_single_step_decomposition_loss": loss}
    )
    with pytest.warns(UserWarning, match=f"leaves MiniLLMTrainer alone: .*{message}"):
        assert placed(trainer, monkeypatch) == []
