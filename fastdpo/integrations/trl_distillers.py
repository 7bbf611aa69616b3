"""TRL's trainers that distill from logits, GKD, GOLD and MiniLLM: their losses of lazy logits are divergences of heads.

    generalized_jsd_loss(student_logits, teacher_logits, labels, beta, ...)          GKD, GOLD of one tokenizer
    _single_step_decomposition_loss(student_log_probs, teacher_log_probs, mask)      MiniLLM: KL(student || teacher)

What is summed and divided by what differs among releases: a loss is replaced only where it gives examples what it is
taken for.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.lazy.logits import IGNORED, LazyLogits
from ..models.lazy.tensor import Unserved
from .adapter import MODELS, lazily
from .trl_divergence import admitting_padding, common_vocabulary, kind_of
from .trl_methods import divided, methods_of
from .trl_release import unknown


class Terms(NamedTuple):
    """loss = sum of the rows that count / divisor, of logits or log-probs [..., V]."""

    student: Tensor
    teacher: Tensor
    counted: Tensor  # [...], bool
    beta: float
    divisor: Tensor | float
    mean: bool  # the divisor is the number of rows


def _generalized_jsd(given: dict) -> Terms | None:
    labels, items, reduction = given["labels"], given.get("num_items_in_batch"), given["reduction"]
    of_rows = labels is not None and (items is not None or reduction in ("batchmean", "sum"))
    if not of_rows or given.get("logits_are_probs"):
        return None
    student, teacher = (divided(given[f"{name}_logits"], given) for name in ("student", "teacher"))
    counted, mean = labels != IGNORED, items is None and reduction == "batchmean"
    items = items.to(student.device) if isinstance(items, Tensor) else items
    divisor = counted.sum() if mean else 1.0 if items is None else items
    return Terms(student, teacher, counted, given["beta"], divisor, mean)


def _single_step(given: dict) -> Terms | None:
    mask, reduction = given["mask"], given["reduction"]
    if mask is None or mask.dtype != torch.bool or reduction not in ("batchmean", "sum"):
        return None
    student, teacher = (given[f"{name}_log_probs"] for name in ("student", "teacher"))
    if isinstance(student, LazyLogits) and student.power is None:  # logits, of which it would be no divergence
        return None
    mean = reduction == "batchmean"
    return Terms(student, teacher, mask, 1.0, mask.sum() if mean else 1.0, mean)


_JSD = (
    "generalized_jsd_loss",
    _generalized_jsd,
    "student_logits teacher_logits labels beta temperature reduction logits_are_probs num_items_in_batch".split(),
)
# Trainer -> its loss, what that is, and the parameters that are known
LOSSES = {
    "GKDTrainer": _JSD,
    "GOLDTrainer": _JSD,
    "MiniLLMTrainer": (
        "_single_step_decomposition_loss",
        _single_step,
        "self student_log_probs teacher_log_probs mask reduction".split(),
    ),
}


def of_logits() -> list[tuple]:
    """What is to be replaced where, as `Replacements.replace` takes it. Warns of what is left alone."""
    return [place for trainer in LOSSES for place in _places(trainer)]


def _places(trainer: str) -> list[tuple]:
    name, terms, known = LOSSES[trainer]
    try:
        owners = [owner for owner, method in methods_of(trainer, (name,)) if "compute_loss" in vars(owner)]
        at_least = {owner: _divisor_at_least(_plain(vars(owner)[name]), terms, known) for owner in owners}
    except RuntimeError as error:  # an experimental trainer of a new release stops nobody from training another one
        warnings.warn(
            f"patch_trl leaves {trainer} alone: {error}. It computes as before, and others are patched; if you "
            "train with this one, please report it with what `python -m fastdpo doctor` prints",
            stacklevel=4,
        )
        return []
    places = []
    for owner, least in at_least.items():
        places += [(owner, name, _served(terms, least)), (owner, "compute_loss", _with_teacher)]
        if "__init__" in vars(owner):
            places.append((owner, "__init__", admitting_padding))
    return places


def _plain(method) -> Callable:
    return method.__func__ if isinstance(method, staticmethod) else method


def _divisor_at_least(loss: Callable, terms: Callable, known: list[str]) -> float:
    """The least that a mean is divided by: 1, or 0 in releases that return NaN where no row counts.

    Raises:
        RuntimeError: on an example, `loss` is not what its `terms` say.
    """
    parameters = inspect.signature(loss).parameters
    strange = [name for name in parameters if name not in known]
    if strange:
        raise unknown(f"has a {loss.__name__} that takes {', '.join(strange)}")
    z = torch.linspace(-7.0, 5.0, 60, dtype=torch.float64, device="cpu").view(2, 2, 3, 5).sin() * 3
    labels = torch.tensor([[IGNORED, 4, 0], [1, IGNORED, IGNORED]], device="cpu")
    example = dict(zip(("student_logits", "teacher_logits"), z)) | {"labels": labels, "temperature": 0.7}
    example |= dict(zip(("student_log_probs", "teacher_log_probs"), z.log_softmax(-1))) | {"mask": labels != IGNORED}
    examples = [{"beta": beta, "reduction": how} for beta in (0, 0.3, 1) for how in ("batchmean", "sum")]
    examples += [{"beta": 0.3, "reduction": "batchmean", "num_items_in_batch": 7}]
    nothing = {"labels": torch.full_like(labels, IGNORED), "mask": torch.zeros_like(labels, dtype=torch.bool)}

    def given(**more) -> dict:
        return {name: (example | more).get(name) for name in parameters}

    try:
        for more in examples:
            arguments = given(**more)
            found, expected = loss(**arguments), _of_terms(terms(arguments))
            if not torch.allclose(found, expected, rtol=1e-5):
                raise ValueError(f"{found.item()} for {more}, not {expected.item()}")
        of_nothing = loss(**given(beta=0, reduction="batchmean", **nothing)).item()
    except Exception as error:
        raise unknown(f"has a {loss.__name__} that gives {error!r}") from error
    return 0.0 if math.isnan(of_nothing) else 1.0


def _of_terms(terms: Terms) -> Tensor:
    """From the logits themselves: the definition."""
    p, r = terms.student.log_softmax(-1), terms.teacher.log_softmax(-1)
    kind, beta = kind_of(terms.beta), terms.beta
    m = {"forward_kl": p, "reverse_kl": r}.get(kind)
    m = ((1 - beta) * p.exp() + beta * r.exp()).log() if m is None else m
    of_teacher, of_student = (x.exp() * (x - m) for x in (r, p))
    each = {"forward_kl": of_teacher, "reverse_kl": of_student}.get(kind, beta * of_teacher + (1 - beta) * of_student)
    return each.sum(-1)[terms.counted].sum() / terms.divisor


def _served(terms: Callable, least: float) -> Callable:
    """Makes of a loss of logits one that takes lazy ones, where these are served."""

    def make(original, _):
        function = _plain(original)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def loss(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            logits = [x for x in given.arguments.values() if isinstance(x, LazyLogits) and x.lazy]
            found = terms(given.arguments) if len(logits) == 2 else None
            found = None if found is None else _lazily_of_terms(found, least)
            return function(*args, **kwargs) if found is None else found

        return staticmethod(loss) if isinstance(original, staticmethod) else loss

    return make


def _lazily_of_terms(terms: Terms, least: float) -> Tensor | None:
    """None where the logits themselves are needed."""
    student, teacher, counted, beta, divisor, mean = terms
    if not all(isinstance(x, LazyLogits) for x in (student, teacher)):
        return None
    try:
        vocab_size = common_vocabulary(student.shape[-1], teacher.shape[-1])
        each = student.divergence(teacher, counted, kind_of(beta), beta, vocab_size)
    except Unserved:
        return None
    return each.sum() / (divisor.clamp_min(least) if mean else divisor)


def _with_teacher(compute_loss, placed):
    """With lazy logits of student and teacher, where this is a loss of both."""
    lazy = lazily(compute_loss, placed, (*MODELS, "teacher_model"))

    @functools.wraps(compute_loss)
    def wrapper(self, *args, **kwargs):
        # GOLD between tokenizers compares sorted or matched probabilities; Liger's loss takes hidden states
        other = getattr(self, "use_uld_loss", False) and getattr(self, "teacher_tokenizer", None) is not None
        other = other or getattr(self, "use_liger_gkd_loss", False)
        return (compute_loss if other else lazy)(self, *args, **kwargs)

    return wrapper
