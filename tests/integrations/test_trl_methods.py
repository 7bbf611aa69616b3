"""TRL's functions of logits are of lazy logits what they are of logits. What is wrapped: test_trl_releases.py."""

import pytest
import torch

pytest.importorskip("trl", minversion="0.24")

from lazy_models import Model, T, V, inputs, lazily
from trl.trainer import utils as trl_utils

from fastdpo.integrations import patch_trl, trl_methods, unpatch_trl

HERE = [name for name in trl_methods.FUNCTIONS if hasattr(trl_utils, name)]
MASK = torch.arange(T) > 1
CALLS = {
    "selective_log_softmax": [{}, {"temperature": 0.7}, {"row_mask": MASK.expand(4, T)}],
    "entropy_from_logits": [{}],
    "selective_log_softmax_and_entropy": [{}, {"temperature": 0.7}, {"row_mask": MASK.expand(4, T)}],
}


@pytest.fixture(autouse=True)
def patched():
    patch_trl()
    yield
    unpatch_trl()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in HERE for options in CALLS[name]], ids=str)
def test_values_and_gradients(name, options):
    model, (hidden, labels) = Model(), inputs()
    function, found = getattr(trl_utils, name), []
    for lazy in (True, False):
        model.zero_grad()
        logits = lazily(model, hidden) if lazy else model(hidden)
        values = function(logits, labels, **options) if "selective" in name else function(logits)
        values = values if isinstance(values, tuple) else (values,)
        sum(value.square().sum() for value in values).backward()
        found.append([*values, model.head.weight.grad.clone()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_several_labels_a_row():
    model, (hidden, labels) = Model(), inputs()
    several = torch.stack([labels, (labels + 1) % V], -1)
    expected = trl_utils.selective_log_softmax(model(hidden), several)
    with pytest.warns(UserWarning, match="needs the logits"):
        found = trl_utils.selective_log_softmax(lazily(model, hidden), several)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
