"""TRL's trainers that take ``model(...).logits``: their methods run with lazy logits, otherwise unchanged.

0.24 to 0.28: `concatenated_forward`; 0.29 to 1.14: `_compute_loss`, `compute_ref_log_probs`, and their like. From 1.15
on only CPO and ORPO; the others no longer take logits.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable
from types import ModuleType

from ..models.lazy.logits import IGNORED, LazyLogits
from .adapter import Replacements, lazily, lazy_aware

# Trainer -> its methods that call a model and read its logits. A release has some of them.
METHODS = {
    "DPOTrainer": ("concatenated_forward", "_compute_loss", "compute_ref_log_probs"),
    "KTOTrainer": (
        "forward", "_compute_kl_logps", "compute_reference_log_probs", "_compute_loss", "compute_ref_log_probs",
    ),
    "CPOTrainer": ("concatenated_forward",),
    "ORPOTrainer": ("concatenated_forward",),
    "SFTTrainer": ("compute_loss",),
    "GRPOTrainer": ("_get_per_token_logps_and_entropies",),
    "RLOOTrainer": ("_get_per_token_logps_and_entropies",),
}  # fmt: skip
STILL_LOGITS = ("CPOTrainer", "ORPOTrainer")  # in 1.15 and newer


class Trainers(Replacements):
    """Of TRL: what is replaced in its classes and modules."""

    def wrap_methods(self, names: Iterable[str], options: dict) -> None:
        """The methods of the trainers called `names`, and TRL's functions of logits.

        Raises:
            RuntimeError: a trainer has none of the methods that are known; nothing is replaced.
        """
        found = [method for trainer in names for method in methods_of(trainer)]
        self.options = options
        for owner, name in found:
            self.replace(owner, name, lazily)
        for name, make in FUNCTIONS.items():
            original = vars(sys.modules["trl.trainer.utils"]).get(name)
            if original is not None:
                self.replace_everywhere(trl_modules(), original, make)


def trl_modules() -> list[ModuleType]:
    """TRL's loaded modules but `trl.kernels`, where its own Function stays for who asks for it there."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "trl"
        and not f"{name}.".startswith("trl.kernels.")
        and issubclass(type(module), ModuleType)
    ]


def module_of(name: str) -> ModuleType | None:
    """None: not in this release, or a package it needs is missing or broken, so that nobody can train with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental is for who imports it to hear
        try:
            return importlib.import_module(name)
        except Exception:
            return None


def methods_of(trainer: str, names: tuple[str, ...] = ()) -> list[tuple[type, str]]:
    """(class, method) where TRL defines them: releases moved some trainers to trl.experimental.

    `names`: of methods; those of METHODS where there are none.
    """
    names = names or METHODS[trainer]
    kind = trainer.removesuffix("Trainer").lower()
    found, seen = [], []
    for place in ("trl.trainer", f"trl.experimental.{kind}"):
        module = module_of(f"{place}.{kind}_trainer")
        owner = None if module is None else vars(module).get(trainer)
        if owner is not None and owner.__module__ == module.__name__:
            seen.append(module.__name__)
            found += [(owner, name) for name in names if name in vars(owner)]
    if seen and not found:
        raise RuntimeError(
            f"{trainer} of {', '.join(seen)} has none of the methods that patch_trl knows, {', '.join(names)}"
        )
    return found


def divided(logits: LazyLogits, arguments: dict) -> LazyLogits:
    temperature = arguments.get("temperature", 1.0)
    return logits if temperature == 1.0 else logits / temperature


def _selective_log_softmax(logits: LazyLogits, arguments: dict):
    index = arguments["index"]
    if index.ndim == logits.ndim:
        return logits.log_softmax(-1).gather(-1, index)
    return divided(logits, arguments).logps(index, arguments.get("row_mask"))


def _selective_log_softmax_and_entropy(logits: LazyLogits, arguments: dict):
    mask = arguments.get("row_mask")
    labels = arguments["index"] if mask is None else arguments["index"].masked_fill(mask == 0, IGNORED)
    stats = divided(logits, arguments).token_stats(labels, ("entropy",))
    return stats.logps, stats.entropy if arguments["entropy_requires_grad"] else stats.entropy.detach()


# Functions of trl.trainer.utils -> what they are of lazy logits
FUNCTIONS = {
    "selective_log_softmax": lazy_aware(_selective_log_softmax),
    "entropy_from_logits": lazy_aware(lambda logits, arguments: logits.entropy()),
    "selective_log_softmax_and_entropy": lazy_aware(_selective_log_softmax_and_entropy),
}
