"""Signatures of another package's functions, read by name. Those of TRL's: test_trl.py, test_trl_divergence.py."""

import sys
import types

import pytest

from fastdpo.integrations.trl_release import Signature, of_unsloth, release, unknown, version

PARAMETERS = {"hidden": "hidden", "last_hidden": "hidden", "weight": "weight", "chunk_size": None}


def forward(ctx, last_hidden, weight, chunk_size, clip=0.2): ...
def without_weight(ctx, hidden, chunk_size=1): ...
def needs_more(ctx, hidden, weight, clip): ...
def anything(ctx, hidden, weight, *more): ...


def test_arguments_by_their_names_here():
    signature = Signature("loss", forward, PARAMETERS, ("hidden", "weight"))
    assert signature.call((1, 2, 3), {}) == {"hidden": 1, "weight": 2, None: 3}
    assert signature.call((1,), {"chunk_size": 3, "weight": 2, "clip": 0.2})["weight"] == 2
    assert "clip" in signature and "hidden" not in signature
    with pytest.raises(RuntimeError, match=r"passes clip=0\.5 to its loss function"):
        signature.call((1, 2, 3, 0.5), {})
    with pytest.raises(TypeError, match="weight"):
        signature.call((1,), {})


@pytest.mark.parametrize(
    ("function", "message"),
    [(without_weight, "lacks 'weight'"), (needs_more, "needs 'clip'"), (anything, "takes"), (None, "another library")],
)
def test_what_cannot_be_served(function, message):
    with pytest.raises(RuntimeError, match=message):
        Signature("loss", function, PARAMETERS, ("hidden", "weight"))


@pytest.mark.parametrize(("given", "found"), [("1.16.0", (1, 16)), ("0.24.0.dev0", (0, 24)), (None, (0, 0))])
def test_release(given, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(__version__=given) if given else None)
    assert release() == found
    assert version() in str(unknown("does something"))


def test_unsloth_is_told_by_its_marks():
    assert of_unsloth(types.SimpleNamespace(_unsloth_fused_linear=True))
    assert not of_unsloth(types.SimpleNamespace(_unsloth_fused_linear=False)) and not of_unsloth(None)
