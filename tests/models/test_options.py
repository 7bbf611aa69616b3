"""The options of a head that each function takes: subsets of one list."""

import inspect

import pytest

import fastdpo
from fastdpo.head import HEAD_OPTIONS
from fastdpo.integrations import lazy_logits
from fastdpo.models import options


def test_subsets_of_the_one_list():
    assert set(options.TRAINER_OPTIONS) < set(options.MODEL_OPTIONS) < set(HEAD_OPTIONS)
    assert set(HEAD_OPTIONS) - set(options.MODEL_OPTIONS) == {"logit_scale", "softcap", "vocab_group"}


@pytest.mark.parametrize("name", HEAD_OPTIONS)
def test_others_are_refused_by_name(name):
    default = getattr(fastdpo.head.HeadOptions, name)
    for function, known in (("patch_trl", options.TRAINER_OPTIONS), ("patch_model", options.MODEL_OPTIONS)):
        if name in known:
            assert getattr(options.head_options(function, {name: default}, known), name) == default
        else:
            with pytest.raises(TypeError, match=rf"{function} takes {', '.join(known)}; got {name}="):
                options.head_options(function, {name: default}, known)


@pytest.mark.parametrize("patch", [fastdpo.patch_trl, lambda **given: lazy_logits(**given).__enter__()])
def test_the_public_functions_take_no_others(patch):
    with pytest.raises(TypeError, match="ignore_index=-100"):
        patch(ignore_index=-100)
    assert inspect.signature(fastdpo.patch_trl).parameters.keys() == {"options"}
