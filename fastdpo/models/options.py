"""Which of a head's options are for whom to say: subsets of `HeadOptions`."""

from __future__ import annotations

from ..head import HeadOptions

TRAINER_OPTIONS = ("backward", "tau", "seed")  # of a trainer's step: everything else is the trainer's to say
# Of a patched model: scale, softcap and bias are its own
MODEL_OPTIONS = (*TRAINER_OPTIONS, "temperature", "ignore_index", "check_labels", "accumulate_into")


def head_options(function: str, given: dict, known: tuple[str, ...]) -> HeadOptions:
    """What `function` was given. Raises TypeError or ValueError naming the option."""
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{function} takes {', '.join(known)}; got {name}={value!r}")
    return HeadOptions(**given)
