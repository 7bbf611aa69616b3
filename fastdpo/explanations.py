"""A preference loss in words: what fastdpo/losses.py's table and `preference_loss`'s docstring say of it."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass

from .losses import F_DIVERGENCES, LOSSES, SYMBOLS, PreferenceOptions
from .preference import preference_loss


@dataclass(frozen=True, repr=False)
class Explanation:
    """Of one loss. `str` of it is the text that `python -m fastdpo explain` prints."""

    name: str
    formula: str
    source: str
    symbols: dict[str, str]  # of the formula, and what they stand for
    options: dict[str, object]  # those that it reads, and their defaults
    meanings: dict[str, str]  # of those
    reads: tuple[str, ...]  # arguments of `preference_loss`
    notes: tuple[str, ...]

    def __str__(self) -> str:
        out = [f"{self.name}: {self.source}", "", f"    {self.formula}", ""]
        out += [f"    {symbol:9} {meaning}" for symbol, meaning in self.symbols.items()]
        out += ["", f"reads     {', '.join(self.reads)}"]
        for option, default in self.options.items():
            text = f"{option}={default!r}" + (f": {self.meanings[option]}" if option in self.meanings else "")
            label = "options" if option == next(iter(self.options)) else ""
            out.append(textwrap.fill(text, 110, initial_indent=f"{label:10}", subsequent_indent=" " * 14))
        out += [
            textwrap.fill(note, 110, initial_indent="note      ", subsequent_indent=" " * 10) for note in self.notes
        ]
        out += ["", f'call      fastdpo.LinearDPOLoss(loss_type="{self.name}"), linear_dpo_loss or preference_loss']
        return "\n".join(out)

    __repr__ = __str__


def _meanings(name: str) -> dict[str, str]:
    """What `preference_loss`'s docstring says of each argument, for this loss alone; nothing under python -OO."""
    if preference_loss.__doc__ is None:
        return {}
    doc = inspect.cleandoc(preference_loss.__doc__)
    inside = doc.partition("Args:\n")[2].partition("\nReturns:")[0]
    found = {}
    for entry in re.split(r"\n(?=    \w)", inside):
        names, _, text = entry.partition(": ")
        found |= {key.strip(): " ".join(text.replace("``", "").split()).removesuffix(".") for key in names.split(",")}
    found["label_smoothing"] = f"{found['label_smoothing'].partition(':')[0]}; in {LOSSES[name].label_smoothing}"
    found["f_divergence_type"] = f"one of {', '.join(F_DIVERGENCES)}"
    if name not in ("ipo", "orpo"):
        found["beta"] = found["beta"].partition(". In ")[0]
    return found


def _symbols(formula: str, smoothing: bool) -> dict[str, str]:
    words = set(re.findall(r"[A-Za-z]+(?=_[wl]\b)|\b[A-Za-z]+\b", formula))
    if "smoothed" in words:
        words.add("e")
    if not smoothing:
        words.discard("e")  # Euler's number there
    if "d" in words:
        words.add("s")
    if "s" in words:
        words |= {"a", "b"}
    if words & {"a", "b"}:
        words |= {"chosen", "rejected"}
    return {symbol: meaning for symbol, meaning in SYMBOLS.items() if symbol in words}


def explain(loss_type: str) -> Explanation:
    """What a preference loss is: its formula, what it reads, its options and their defaults, and its source.

    Args:
        loss_type: a name as `preference_loss` and `linear_dpo_loss` take it.

    Returns:
        Explanation, whose text is for people: ``print(fastdpo.explain("simpo"))``. Its fields are `name`, `formula`,
        `source`, `symbols`, `options` (defaults by name), `meanings` of those, `reads` (the tensors) and `notes`.

    Raises:
        TypeError, ValueError: `loss_type` is no name of a loss; the message lists them.
    """
    if not isinstance(loss_type, str):
        raise TypeError(f"loss_type must be the name of a loss; got {loss_type!r}")
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type {loss_type!r} is unknown; the losses are {', '.join(LOSSES)}")
    loss = LOSSES[loss_type]
    options = ["beta"] if "beta" in loss.formula else []
    options += ["label_smoothing"] if loss.label_smoothing else []
    options += ["f_divergence_type", "f_alpha_divergence_coef"] if loss.f_divergence else []
    of_one = loss_type == "sft"
    reads = ["chosen_logps"] + ([] if of_one else ["rejected_logps"])
    reads += [] if loss.reference_free or of_one else ["ref_chosen_logps", "ref_rejected_logps"]
    reads += [*loss.lengths, *(("chosen_kl", "rejected_kl") if loss.kl else ())]
    notes = []
    if (loss.label_smoothing or "").startswith("("):
        notes.append(f"label_smoothing must be given: its default does not lie in {loss.label_smoothing}.")
    if loss.ranked:
        notes.append("The batch's rows are matched anew by rank, so that a weight per row has no meaning.")
    if loss.reference_free:
        notes.append("Never looks at a reference model; being given one raises.")
    if loss.per_token_reward:
        notes.append("Its implicit reward, which chosen_rewards and rejected_rewards report, is per token.")
    meanings = _meanings(loss_type)
    options = {name: getattr(PreferenceOptions, name) for name in (*options, *loss.options)}
    return Explanation(
        loss_type,
        loss.formula,
        loss.source,
        _symbols(loss.formula, loss.label_smoothing is not None),
        options,
        {name: meanings[name] for name in options if name in meanings},
        tuple(reads),
        tuple(notes),
    )
