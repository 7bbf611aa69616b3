"""TRL's trainers: `trl.trainer.utils._ChunkedLogProbFunction`, looked up at every call, is replaced.

    apply(hidden [N, H], weight [V, H], bias, targets [N], temperature, chunk_size, softcap, logit_scale,
          outputs) -> (logps, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] or None

Trainers that take logits instead (all before 1.15, CPO and ORPO since) get lazy ones: trl_methods.py. Losses and
metrics stay TRL's; only the per-token log-probs change hands.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..head import HeadOptions
from ..logps import token_stats
from ..models.options import TRAINER_OPTIONS, head_options
from ..ops.operators import LinearLogpsFunction
from ..ops.problem import TokenStats
from .adapter import load
from .trl_distillers import of_logits
from .trl_divergence import of_hidden
from .trl_head import in_forward_of, is_of_fsdp, refuse_unreduced, regathering, split_head, telling_its_head
from .trl_methods import METHODS, STILL_LOGITS, Trainers, trl_modules
from .trl_release import Signature, of_unsloth, only_selects_rows, release, select_rows, unknown, version

if TYPE_CHECKING:
    from ..typed import TrainerOptions, Unpack

# TRL's parameter -> its name here; None: has no meaning here (the width of TRL's tiles)
PARAMETERS = {
    "hidden": "hidden",
    "last_hidden": "hidden",  # 1.1 to 1.14
    "weight": "weight",
    "bias": "bias",  # since 1.13
    "targets": "labels",
    "temperature": "temperature",
    "chunk_size": None,
    "final_logit_softcapping": "softcap",  # since 1.3
    "logit_scale": "logit_scale",
    "outputs": "outputs",  # since 1.15
}
REQUIRED = ("hidden", "weight", "labels", "temperature")

# TRL's output -> its name in TokenStats, in the order in which TRL returns them
OUTPUTS = {
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}

_MISSING = object()


def patch_trl(**options: Unpack[TrainerOptions]) -> bool:
    """Let every TRL trainer compute its log-probs with fastdpo, from the next step on.

    Works before and after trainers are constructed; where FSDP splits the head, before. Calling it again replaces the
    options.

    Args:
        backward, tau, seed: as in `fastdpo.linear_logps`; everything else is the trainer's to say.

    Returns:
        True when TRL's function is now fastdpo's. False, with a warning, when Unsloth has replaced it before:
        it is left alone.

    Raises:
        TypeError, ValueError: naming the option, before anything is replaced.
        ImportError: TRL is not installed.
        RuntimeError: this TRL's function has a signature, or a trainer of it methods, that are not understood, or it
            is older than 0.24; nothing is replaced.
        NotImplementedError: from a step of a trainer that takes logits (all before 1.15; CPO and ORPO): its lm_head is
            split by FSDP or DeepSpeed ZeRO-3, or is more than a linear layer with one LoRA adapter. From any step:
            FSDP splits the head, and the trainer was made before this call or another module than FSDP's is called.

    Guarantees:
        With ``backward="exact"`` losses, metrics and gradients are TRL's up to fp32 rounding; in reduced
        precision the logits are not rounded, as TRL's are. On the CPU TRL scores every row, prompts and
        padding included; patched, completion rows only. Under DeepSpeed ZeRO-3 the head is gathered for the
        forward and again for the backward, one gather each on every rank, as in TRL. A head to which FSDP was applied,
        alone or in a group, is scored in its own forward, where FSDP gathers it and averages its gradient. Trainers
        that take logits get those of `lazy_logits`; in evaluation with metrics of the user's own they get TRL's.
    """
    head_options("patch_trl", options, TRAINER_OPTIONS)
    utils = load("trl.trainer.utils", "patch_trl needs TRL: pip install 'fastdpo[trl]'")
    theirs = vars(utils).get("_ChunkedLogProbFunction", _MISSING)
    if type(theirs) is _Replacement:
        _placed.wrap_methods(theirs.trainers, options)
        return True
    if theirs is _MISSING:
        if not (0, 24) <= release() < (1, 1):
            raise unknown("has no trl.trainer.utils._ChunkedLogProbFunction")
        distillers = of_hidden() + of_logits()
        _placed.wrap_methods(METHODS, options)
        _placed.replace_all(distillers)
        return True
    if of_unsloth(theirs):
        warnings.warn(
            "Unsloth has replaced TRL's log-prob function; patch_trl leaves it alone. Train without unsloth "
            "to have fastdpo's",
            stacklevel=2,
        )
        return False

    forward = _forward_1_15 if theirs is None else getattr(theirs, "forward", None)
    signature = Signature("log-prob", forward, PARAMETERS, REQUIRED)
    trainers = STILL_LOGITS if "outputs" in signature else tuple(METHODS)
    distillers = of_hidden() + of_logits()
    _placed.wrap_methods(trainers, options)
    _placed.replace_all(distillers)
    if theirs is None:
        _placed.replace(utils, "_ChunkedLogProbFunction", lambda *_: _Replacement(None, signature, trainers))
    else:
        _placed.replace_everywhere(trl_modules(), theirs, lambda *_: _Replacement(theirs, signature, trainers))
    if "add_fused_lm_head" in vars(utils):
        _placed.replace_everywhere(trl_modules(), utils.add_fused_lm_head, telling_its_head)
    if "_use_triton" in vars(utils) and only_selects_rows(utils, "add_fused_lm_head"):
        _placed.replace(utils, "_use_triton", select_rows)
    return True


def unpatch_trl() -> None:
    """Put TRL's own objects back wherever `patch_trl`, or an import since then, has put fastdpo's.

    Does nothing where `patch_trl` has not been called. What another library has replaced since stays.
    """
    _placed.restore(trl_modules())


_placed = Trainers()
_RegatheringLogps = regathering(LinearLogpsFunction)


class _Replacement:
    """Stands in TRL's place for its autograd Function: `apply` takes and returns what that one did."""

    def __init__(self, original, signature: Signature, trainers: tuple[str, ...]):
        self.original = original
        self.trainers = trainers  # those that do not call it, or not always: their methods are wrapped
        self.signature = signature  # of the original's forward

    @property
    def forward(self):
        return self.original.forward  # for those who inspect the signature of what they find here

    def apply(self, *args, **kwargs):
        call = self.signature.call(args, kwargs)
        outputs = call.get("outputs", ("log_probs", "entropy"))
        for name in outputs:
            if name not in OUTPUTS:
                raise unknown(f"asks for the output {name!r}")
        stats = self._token_stats(call, tuple(OUTPUTS[name] for name in outputs if name != "log_probs"))
        every = tuple(getattr(stats, name) for name in OUTPUTS.values())
        return every if "outputs" in call else every[:2]

    def _token_stats(self, call: dict, stats: tuple[str, ...]) -> TokenStats:
        if call["weight"].shape[0] == 0:
            raise RuntimeError(f"TRL {version()} passes an lm_head without rows: ZeRO-3's, not gathered")
        options = {name: call[name] for name in ("logit_scale", "softcap", "temperature") if name in call}
        options = HeadOptions(**options, **_placed.options)

        def score(hidden, weight, bias) -> TokenStats:
            labels, function = call["labels"], _RegatheringLogps
            return token_stats(hidden, weight, labels, bias=bias, options=options, stats=stats, function=function)

        head = split_head()
        if head is not None and is_of_fsdp(head):
            return in_forward_of(head, call["hidden"], score)
        refuse_unreduced(call["weight"])
        return score(call["hidden"], call["weight"], call.get("bias"))


# TRL 1.15 without Triton has None in the symbol's place, and one caller, which passes these
def _forward_1_15(
    ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
): ...
