"""TRL's DistillationTrainer: its autograd Function is replaced where the trainer looks it up.

    ChunkedDivergenceFunction.apply(student_hidden [N, H], student_weight [V, H], student_bias, teacher_hidden, ...,
        beta, temperature, ...) -> (divergence, entropy of the student without gradient), each [N]
    beta 0: KL(teacher || student), 1: KL(student || teacher), between: the generalised Jensen-Shannon divergence

And heads of two sizes, of all trainers that distill.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..divergence import token_divergence
from ..head import HeadOptions
from ..ops.divergence.operators import LinearDivergenceFunction
from ..ops.divergence.problem import KINDS, DivergenceOutput
from .trl_head import in_forward_of, is_of_fsdp, refuse_unreduced, regathering, split_head, telling_its_student
from .trl_methods import methods_of, module_of, trl_modules
from .trl_release import Signature, of_unsloth, only_selects_rows, select_rows

# TRL's parameter -> its name here
PARAMETERS = {
    "student_hidden": "hidden",
    "student_weight": "weight",
    "student_bias": "bias",
    "teacher_hidden": "ref_hidden",
    "teacher_weight": "ref_weight",
    "teacher_bias": "ref_bias",
    "beta": "beta",
    "temperature": "temperature",
    "student_logit_scale": "logit_scale",
    "student_final_logit_softcapping": "softcap",
    "teacher_logit_scale": "ref_logit_scale",
    "teacher_final_logit_softcapping": "ref_softcap",
}
REQUIRED = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "beta", "temperature")
FUNCTION = "ChunkedDivergenceFunction"
TRAINER = "trl.trainer.distillation_trainer"

# A head's rows are rounded up to a multiple of at most this, and its vocabulary is many times as large
MOST_PADDING = 1024


def of_hidden() -> list[tuple]:
    """What is to be replaced where, as `Replacements.replace` takes it.

    Raises:
        RuntimeError: TRL's function has a signature that is not understood.
    """
    trainer, kernels = module_of(TRAINER), module_of("trl.kernels.chunked_divergence")
    theirs = None if trainer is None or kernels is None else vars(kernels).get(FUNCTION)
    if theirs is None:
        return []  # 1.14 and older, which make logits chunk by chunk; 1.15 without Triton
    if of_unsloth(theirs):
        warnings.warn(
            "Unsloth has replaced TRL's divergence function; patch_trl leaves it alone. Train without unsloth "
            "to have fastdpo's",
            stacklevel=3,
        )
        return []
    signature = Signature("divergence", getattr(theirs, "forward", None), PARAMETERS, REQUIRED)
    holders = [(module, name) for module in trl_modules() for name, value in vars(module).items() if value is theirs]
    # 1.15 imports it in every call, from where it is defined
    places = [(*place, _replacing(signature)) for place in holders or [(kernels, FUNCTION)]]
    if "_use_triton" in vars(trainer) and only_selects_rows(trainer, "_chunked_divergence_loss"):
        places.append((trainer, "_use_triton", select_rows))
    for owner, name in methods_of("DistillationTrainer", ("_compute_loss", "__init__")):
        places.append((owner, name, telling_its_student if name == "_compute_loss" else admitting_padding))
    return places


def _replacing(signature: Signature) -> Callable:
    return lambda theirs, placed: _Replacement(theirs, signature, placed)


class _Replacement:
    """Stands in TRL's place for its autograd Function: `apply` takes and returns what that one did."""

    def __init__(self, original, signature: Signature, placed):
        self.original, self.signature, self.placed = original, signature, placed

    @property
    def forward(self):
        return self.original.forward  # for those who inspect the signature of what they find here

    def apply(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        call = self.signature.call(args, kwargs)
        temperature = call["temperature"]
        scale, softcap = call.get("logit_scale", 1.0), call.get("softcap")
        options = HeadOptions(logit_scale=scale, softcap=softcap, temperature=temperature, **self.placed.options)
        scale, softcap = call.get("ref_logit_scale", 1.0), call.get("ref_softcap")
        ref = HeadOptions(logit_scale=scale, softcap=softcap, temperature=temperature).transform
        settings = (kind_of(call["beta"]), call["beta"], ("entropy",), options, ref)
        ref_hidden, ref_weight, ref_bias = (call[name] for name in ("ref_hidden", "ref_weight", "ref_bias"))
        counted = torch.ones(call["hidden"].shape[:1], dtype=torch.bool, device=call["hidden"].device)
        gathered = sys.modules["trl.trainer.utils"].maybe_gather_lm_head_ctx

        def score(hidden, weight, bias) -> DivergenceOutput:
            with gathered(weight, bias), gathered(ref_weight, ref_bias):
                vocab_size = common_vocabulary(weight.shape[0], ref_weight.shape[0])
                if vocab_size is not None and hasattr(weight, "ds_id"):
                    raise NotImplementedError("student and teacher with heads of two sizes under DeepSpeed ZeRO-3")
                tensors = (hidden, weight, ref_hidden, ref_weight, counted, bias, ref_bias, None)
                return token_divergence(tensors, vocab_size, settings, _RegatheringDivergence)

        head = split_head()
        if head is not None and is_of_fsdp(head):
            found = in_forward_of(head, call["hidden"], score)
        else:
            refuse_unreduced(call["weight"])
            found = score(call["hidden"], call["weight"], call["bias"])
        return found.divergence, found.entropy.detach()


_RegatheringDivergence = regathering(LinearDivergenceFunction)


def kind_of(beta: float) -> str:
    """What TRL's `beta` chooses."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1]; got {beta!r}")
    return KINDS[int(beta)] if beta in (0, 1) else "jsd"


# Heads of two sizes


def is_padding(rows: int, ref_rows: int) -> bool:
    """Whether two heads of so many rows differ as those of one tokenizer do that are padded differently."""
    fewer, more = sorted((rows, ref_rows))
    return more - fewer <= min(MOST_PADDING, fewer // 16)


def common_vocabulary(rows: int, ref_rows: int) -> str | None:
    """`linear_divergence`'s vocab_size for heads of so many rows; says once where they differ.

    Raises:
        ValueError: the difference is no padding.
    """
    if rows == ref_rows:
        return None
    if not is_padding(rows, ref_rows):
        raise ValueError(
            f"the student's head has {rows} rows and the teacher's {ref_rows}: more of a difference than padding makes "
            "(GOLD is for other tokenizers)"
        )
    _say(rows, ref_rows)
    return "common"


@functools.cache
def _say(rows: int, ref_rows: int) -> None:
    warnings.warn(
        f"the student's head has {rows} rows and the teacher's {ref_rows}: fastdpo takes the difference for padding, "
        f"and compares their distributions over the first {min(rows, ref_rows)} ids. If it is none, resize a head",
        stacklevel=2,
    )


def admitting_padding(init, _):
    """The `__init__` of a trainer that refuses a teacher whose config has another vocab_size.

    Of models, not of names that it loads itself: there is nothing to ask before it does.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        student, teacher = (_text_config(given.get(name)) for name in ("model", "teacher_model"))
        if student is None or teacher is None:
            return init(self, *args, **kwargs)
        rows, ref_rows = student.vocab_size, teacher.vocab_size
        if rows == ref_rows or not is_padding(rows, ref_rows):
            return init(self, *args, **kwargs)
        try:
            teacher.vocab_size = rows
            init(self, *args, **kwargs)
        finally:
            teacher.vocab_size = ref_rows
        tokens = len(getattr(self.processing_class, "tokenizer", self.processing_class))
        if tokens > min(rows, ref_rows):
            raise ValueError(
                f"student and teacher have vocab_size {rows} and {ref_rows}, and the tokenizer {tokens} tokens: what "
                "one of them lacks is no padding"
            )

    return __init__


def _text_config(model):
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None
