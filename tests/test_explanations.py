"""`fastdpo.explain`: what it says of a loss is what the loss does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import fastdpo
from fastdpo.explanations import explain
from fastdpo.losses import LOSSES, SYMBOLS, PreferenceOptions

OTHERS = {"label_smoothing": 0.3, "beta": 0.7, "f_divergence_type": "forward_kl", "f_alpha_divergence_coef": 0.3}


def arguments(name: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    tensors = {x: torch.randn(4, generator=g, dtype=torch.float64) - 3 for x in explain(name).reads}
    for x in tensors:
        if x.endswith("lengths"):
            tensors[x] = torch.tensor([3, 5, 2, 7])
        elif x.endswith("kl"):
            tensors[x] = tensors[x].abs()
    tensors.setdefault("rejected_logps", torch.full((4,), -2.0, dtype=torch.float64))
    return tensors


def value(name: str, tensors: dict[str, torch.Tensor], **options) -> float:
    required = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    return fastdpo.preference_loss(**tensors, loss_type=name, **(required | options)).loss.item()


@pytest.mark.parametrize("name", LOSSES)
def test_it_reads_what_it_says_and_nothing_else(name):
    tensors = arguments(name)
    before = value(name, tensors)
    for x in set(explain(name).reads) | {"rejected_logps"}:
        changed = dict(tensors)
        changed[x] = tensors[x] * 2 + torch.tensor([0, 0, 0, 2 if tensors[x].dtype == torch.int64 else -1.5])
        changed[x] = changed[x].to(tensors[x].dtype)
        moves = abs(value(name, changed) - before) > 1e-9
        assert moves == (x in explain(name).reads), x


@pytest.mark.parametrize("name", LOSSES)
def test_it_depends_on_the_options_it_names_and_on_no_other(name):
    tensors, told = arguments(name), explain(name).options
    before = value(name, tensors)
    for option in PreferenceOptions.__dataclass_fields__:
        if option in ("loss_type", "loss_weights"):
            continue
        default = getattr(PreferenceOptions, option)
        options = {option: OTHERS.get(option, None if isinstance(default, str) else 2 * default + 0.25)}
        if option == "f_alpha_divergence_coef":
            options["f_divergence_type"] = "alpha_divergence"
        try:
            moves = abs(value(name, tensors, **options) - before) > 1e-9
        except ValueError as error:
            assert "no effect" in str(error) or "no meaning" in str(error), error
            moves = False
        assert moves == (option in told), option
        if option in told:
            assert told[option] == default


@pytest.mark.parametrize("name", LOSSES)
def test_the_page_has_all_of_it(name):
    told = explain(name)
    text = str(told)
    assert repr(told) == text and text.startswith(f"{name}: {LOSSES[name].source}\n")
    assert LOSSES[name].formula in text
    for option, default in told.options.items():
        assert f"{option}={default!r}: {' '.join(told.meanings[option].split())[:20]}" in " ".join(text.split())
    assert all(f"    {symbol:9} {meaning}" in text for symbol, meaning in told.symbols.items())
    assert all(len(line) <= 112 for line in text.splitlines())
    assert "{" not in text and "``" not in text  # marks of the docstring's


@pytest.mark.parametrize("name", LOSSES)
def test_every_letter_of_the_formula_is_explained(name):
    """But for words, options, functions, and what a formula itself defines."""
    words = "log relu over the batch sum sorted policy reference margin odds of without gradient logp x m"
    known = {*words.split(), *PreferenceOptions.__dataclass_fields__}
    formula = LOSSES[name].formula
    letters = set(re.findall(r"[A-Za-z]+(?=_[wl]\b)|\b[a-z]+_[a-z_]+\b|\b[A-Za-z]+\b", formula)) - known
    if LOSSES[name].label_smoothing is None:
        letters.discard("e")
    letters = {x for x in letters if not re.fullmatch(r"[a-z]+_[wl]", x)}
    assert letters <= set(explain(name).symbols) <= set(SYMBOLS)


def test_what_is_no_loss():
    with pytest.raises(ValueError, match=r"loss_type 'dpo' is unknown; the losses are sigmoid, robust"):
        fastdpo.explain("dpo")
    with pytest.raises(TypeError, match=r"loss_type must be the name of a loss; got \['sigmoid'\]"):
        fastdpo.explain(["sigmoid"])


def test_without_docstrings_the_table_is_left():
    code = "import fastdpo; print(fastdpo.explain('ipo'))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert LOSSES["ipo"].formula in done.stdout and "beta=0.1\n" in done.stdout, done.stderr
