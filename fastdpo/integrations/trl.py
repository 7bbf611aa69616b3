"""TRL's trainers: `trl.trainer.utils._ChunkedLogProbFunction`, looked up at every call, is replaced.

    apply(hidden [N, H], weight [V, H], bias, targets [N], temperature, chunk_size, softcap, logit_scale,
          outputs) -> (logps, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] or None

Trainers that take logits instead (all before 1.15, CPO and ORPO since) get lazy ones: trl_methods.py. Losses and
metrics stay TRL's; only the per-token log-probs change hands.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch

from ..autograd import apply
from ..head import HeadOptions
from ..logps import LinearLogpsFunction, TokenStats
from ..models.lazy_head import check_options
from .trl_methods import METHODS, STILL_LOGITS, patch_methods, trl_modules, unpatch_methods

SUPPORTED = "0.24 to 1.16"

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

# Attributes of what Unsloth puts in place of the same symbol
UNSLOTH_MARKS = ("_unsloth_fused_linear", "_unsloth_device_patched", "_unsloth_cpu_dispatch")

_MISSING = object()


def patch_trl(**options) -> bool:
    """Let every TRL trainer compute its log-probs with fastdpo, from the next step on.

    Works before and after trainers are constructed. Calling it again replaces the options.

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
            split by FSDP or DeepSpeed ZeRO-3, or is more than a linear layer with one LoRA adapter.

    Guarantees:
        With ``backward="exact"`` losses, metrics and gradients are TRL's up to fp32 rounding; in reduced
        precision the logits are not rounded, as TRL's are. On the CPU TRL scores every row, prompts and
        padding included; patched, completion rows only. Under DeepSpeed ZeRO-3 the head is gathered for the
        forward and again for the backward, one gather each on every rank, as in TRL. Trainers that take logits get
        those of `lazy_logits`; in evaluation with metrics of the user's own they get TRL's.
    """
    check_options("patch_trl", options)
    utils = _trl_utils()
    current = getattr(utils, "_ChunkedLogProbFunction", _MISSING)
    if isinstance(current, _Replacement):
        current.options = options
        patch_methods(current.trainers, options)
        return True
    if current is _MISSING:
        if not (0, 24) <= _release() < (1, 1):
            raise RuntimeError(
                f"TRL {_version()} has no trl.trainer.utils._ChunkedLogProbFunction; fastdpo supports TRL {SUPPORTED}"
            )
        patch_methods(METHODS, options)
        return True
    if any(getattr(current, mark, False) for mark in UNSLOTH_MARKS):
        warnings.warn("Unsloth has replaced TRL's log-prob function; patch_trl leaves it alone", stacklevel=2)
        return False

    signature = _understood(current)
    trainers = STILL_LOGITS if "outputs" in signature.parameters else tuple(METHODS)
    patch_methods(trainers, options)
    replacement = _Replacement(current, signature, options, trainers)
    utils._ChunkedLogProbFunction = replacement
    if current is not None:
        for module in trl_modules():
            for name in [name for name, value in vars(module).items() if value is current]:
                setattr(module, name, replacement)
    use_triton = getattr(utils, "_use_triton", None)
    if use_triton is not None and _only_selects_rows(utils):
        utils._use_triton = _SelectsRows(use_triton)
    return True


def unpatch_trl() -> None:
    """Put TRL's own objects back wherever `patch_trl`, or an import since then, has put fastdpo's.

    Does nothing where `patch_trl` has not been called. What another library has replaced since stays.
    """
    unpatch_methods()
    for module in trl_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (_Replacement, _SelectsRows)):
                setattr(module, name, value.original)


class _Replacement:
    """Stands in TRL's place for its autograd Function: `apply` takes and returns what that one did."""

    def __init__(self, original, signature: inspect.Signature, options: dict, trainers: tuple[str, ...]):
        self.original = original
        self.trainers = trainers  # those that do not call it, or not always: their methods are wrapped
        self.signature = signature  # of the original's forward, without ctx
        self.options = options

    @property
    def forward(self):
        return self.original.forward  # for those who inspect the signature of what they find here

    def apply(self, *args, **kwargs):
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        call = {}
        for name, value in given.arguments.items():
            if name in PARAMETERS:
                call[PARAMETERS[name]] = value
                continue
            default = self.signature.parameters[name].default
            if value is not default and value != default:
                raise RuntimeError(
                    f"TRL {_version()} passes {name}={value!r} to its log-prob function, which fastdpo does "
                    f"not understand; it supports TRL {SUPPORTED}"
                )
        if "outputs" not in call:
            stats = self._token_stats(call, ("entropy",))
            return stats.logps, stats.entropy
        outputs = call["outputs"]
        for name in outputs:
            if name not in OUTPUTS:
                raise RuntimeError(
                    f"TRL {_version()} asks for the output {name!r}, which fastdpo does not know; "
                    f"it supports TRL {SUPPORTED}"
                )
        stats = self._token_stats(call, tuple(OUTPUTS[name] for name in outputs if name != "log_probs"))
        return tuple(getattr(stats, name) for name in OUTPUTS.values())

    def _token_stats(self, call: dict, stats: tuple[str, ...]) -> TokenStats:
        hidden, weight, bias = call["hidden"], call["weight"], call.get("bias")
        if weight.shape[0] == 0:
            raise RuntimeError(f"TRL {_version()} passes an lm_head without rows: it does not gather it under ZeRO-3")
        options = HeadOptions(
            logit_scale=call.get("logit_scale", 1.0),
            softcap=call.get("softcap"),
            temperature=call["temperature"],
            **self.options,
        )
        # Inside an autograd Function grad mode is off and needs_input_grad is True even under no_grad
        differentiable = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (hidden, weight, bias)
        )
        arguments = (hidden, weight, bias, None, None, call["labels"], options, stats, differentiable)
        return TokenStats(*apply(_RegatheringLogps, *arguments))


class _RegatheringLogps(LinearLogpsFunction):
    """Under ZeRO-3, TRL gathers the head for the forward only; when the backward comes it is split again."""

    @staticmethod
    def backward(ctx, *grads):
        # ZeRO-3 splits a parameter in place: what was saved is the parameter, with its ds_* attributes
        split = [x for x in ctx.saved_tensors if hasattr(x, "ds_status")]
        if not split:
            return LinearLogpsFunction.backward(ctx, *grads)
        with _trl_utils().maybe_gather_lm_head_ctx(*split):
            return LinearLogpsFunction.backward(ctx, *grads)


class _SelectsRows:
    """Stands in for `_use_triton` of trl.trainer.utils, by which TRL drops the rows without a label or not.

    CPU tensors gain by it as CUDA tensors do. Elsewhere (Neuron recompiles per shape) TRL's answer stands.
    """

    def __init__(self, original):
        self.original = original

    def __call__(self, device: torch.device) -> bool:
        return device.type == "cpu" or self.original(device)


def _trl_utils() -> ModuleType:
    try:
        import trl.trainer.utils
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "trl":
            raise
        raise ImportError("patch_trl needs TRL: pip install 'fastdpo[trl]'") from error
    return trl.trainer.utils


def _version() -> str:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def _release() -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", _version())
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _understood(function) -> inspect.Signature:
    """The signature of the Function's forward, without ctx, when every call it allows can be served."""
    if function is None:
        return inspect.signature(_forward_1_15)
    forward = getattr(function, "forward", None)
    if forward is None:
        raise RuntimeError(
            f"the log-prob function of TRL {_version()} is {function!r}, not an autograd Function; "
            "has another library replaced it?"
        )
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())[1:]
    problem = None
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            problem = f"takes {parameter}"
        elif parameter.name not in PARAMETERS and parameter.default is parameter.empty:
            problem = f"needs {parameter.name!r}, which fastdpo does not understand"
    for name in REQUIRED:
        if name not in [PARAMETERS.get(parameter.name) for parameter in parameters]:
            problem = f"lacks {name!r} under a name that fastdpo understands"
    if problem:
        raise RuntimeError(
            f"the log-prob function of TRL {_version()} {problem}; its parameters are "
            f"{', '.join(parameter.name for parameter in parameters)}; fastdpo supports TRL {SUPPORTED}"
        )
    return signature.replace(parameters=parameters)


# TRL 1.15 without Triton has None in the symbol's place, and one caller, which passes these
def _forward_1_15(
    hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
): ...


def _only_selects_rows(utils: ModuleType) -> bool:
    """Whether `add_fused_lm_head` alone asks `_use_triton` in trl.trainer.utils: nothing else may change."""

    def names(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from names(constant)

    users = set()
    for name, value in vars(utils).items():
        if getattr(value, "__module__", None) == utils.__name__:
            for member in vars(value).values() if isinstance(value, type) else [value]:
                member = inspect.unwrap(getattr(member, "__func__", member))
                if isinstance(member, FunctionType) and "_use_triton" in names(member.__code__):
                    users.add(name)
    return users == {"add_fused_lm_head"}
