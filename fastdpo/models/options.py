"""Which of a head's options are for whom to say: subsets of `HeadOptions`."""

from __future__ import annotations

from ..head import HeadOptions

TRAINER = ("backward", "tau", "seed")  # beside a trainer, which says everything else in its own terms
MODEL = (
    *TRAINER,
    "temperature",
    "ignore_index",
    "check_labels",
)  # beside a model, whose scale, softcap, bias are its own


def head_options(function: str, given: dict, known: tuple[str, ...]) -> HeadOptions:
    """What `function` was given. Raises TypeError or ValueError naming the option."""
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{function} takes {', '.join(known)}; got {name}={value!r}")
    return HeadOptions(**given)
