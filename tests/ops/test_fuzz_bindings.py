"""Arguments that no caller gives, to every function of the extension: ../fuzz_bindings.py, for a few seconds."""

from __future__ import annotations

import fuzz_bindings
import pytest
import torch
from ops import test_native

from fastdpo.ops import native

C = native.EXTENSION
if C is None:
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)


def test_no_argument_crashes_a_call_or_writes_elsewhere(seeded):
    status, output = fuzz_bindings.fuzz(seeded, "--cases", "3000", "--minutes", "0.3")
    assert status == 0, output


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pairs(**changes) -> dict:
    given = {"bitmap": torch.tensor([[1], [3]], dtype=torch.uint8), "coef": torch.ones(2), "first_token": 0}
    return {**given, "last_token": 2, "first_block": 0, "num_blocks": 2, "num_threads": 1, **changes}


COLUMNS = {
    **test_native.TILE,
    **{"factor": torch.zeros(2, 8), "source_rows": None, "factor_first": 0, "out": torch.zeros(128, 8), "out_first": 0},
    **{"fresh": False, "bias": None, "rounded": 0, "product": 0},
}
TOKENS = {
    **test_native.TILE,
    **{"row_weight": None, "factor": torch.zeros(128, 8), "out": torch.zeros(2, 8), "out_first": 0, "rounded": 0},
    "product": 0,
}
FILLED = pairs(offsets=torch.tensor([0, 2, 3]), tokens=torch.zeros(3, dtype=torch.int32))
LOW_RANK = {"low_rank": torch.zeros(2, 3), "lora_b": torch.zeros(128, 4), "rank": 4}
WRONG = [  # each of them crashed, was read or written elsewhere, or passed for something else
    ("count_pairs", pairs(counts=torch.zeros(2, dtype=torch.int64)), {"num_blocks": -1}),
    ("count_pairs", pairs(counts=torch.zeros(2, dtype=torch.int64)), {"first_token": -(2**31)}),
    ("fill_pairs", FILLED, {"offsets": torch.tensor([0, 2, 2**40])}),
    ("fill_pairs", FILLED, {"offsets": torch.tensor([0, 1, 3])}),
    ("fill_pairs", FILLED, {"coef": torch.tensor([1.0, 0.0])}),
    ("products", test_native.PRODUCTS, {"first_block": -1, "blocks": None, "offsets": None, "tokens": None}),
    ("products", test_native.PRODUCTS, {"tokens": int32(0, 2)}),
    ("products", test_native.PRODUCTS, {"tokens": int32(1, 0)}),
    ("products", test_native.PRODUCTS, {"blocks": int32(1)}),
    ("products", test_native.PRODUCTS, {"source_rows": torch.tensor([0, 2])}),
    ("products", test_native.PRODUCTS, {"source_rows": torch.tensor([0])}),
    ("products", test_native.PRODUCTS, {"rounded": 3}),
    ("products", test_native.PRODUCTS, LOW_RANK),
    ("add_to_columns", COLUMNS, {"out": torch.zeros(127, 8)}),
    ("add_to_columns", COLUMNS, {"out_first": 1}),
    ("add_to_columns", COLUMNS, {"factor_first": 1}),
    ("add_to_tokens", TOKENS, {"product": 1, "rounded": 1}),  # csrc adds to gradients in fp32
    ("add_to_tokens", TOKENS, {"out": torch.zeros(1, 8)}),
    ("add_to_tokens", TOKENS, {"out": torch.zeros(8).expand(2, 8)}),
    ("routed_grad", test_native.PAIRS, {"tokens": int32(0, 7)}),
    ("grad", {**test_native.ROWS, "tokens": None}, {"tokens": int32(0, -1)}),
    ("grad", {**test_native.ROWS, "tokens": None}, {"lse": test_native.ROWS["data"].view(-1)[1:3]}),
    ("finish", test_native.OUTPUTS, {"lse": test_native.OUTPUTS["logps"]}),
]


@pytest.mark.parametrize("function,given,changes", WRONG, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)])
def test_numbers_that_point_elsewhere(function, given, changes):
    getattr(C, function)(**given)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        getattr(C, function)(**{**given, **changes})


def test_an_address_between_elements():
    bytes_ = torch.zeros(8 * 3 + 1, dtype=torch.uint8).numpy()[1:]
    between = torch.frombuffer(bytes_, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="rest_lse: its address is no multiple of an element's size"):
        C.sum_blocks(**test_native.fields(rest_lse=between))


def test_what_no_dict_is_and_what_no_loss_is():
    calls = [fields for name, fields in _recorded() if name == "host_preference_forward"]
    C.host_preference_forward(**calls[0])
    for changes in (
        {"options": None},
        {"options": {**calls[0]["options"], "divergence": 4}},
        {"terms": [(99, 1.0)]},
        {"logps": None},
        {"rewards": None},
        {"num_tokens": 2**62},
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            C.host_preference_forward(**{**calls[0], **changes})


def _recorded():
    from fuzz_calls import losses

    recorder = fuzz_bindings.Recorder(native.EXTENSION)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "EXTENSION", recorder)
        losses()
    return recorder.calls


def test_any_number_of_threads_is_served():
    logits = torch.randn(2000, 40, dtype=torch.float64)
    for threads in (-1, 0, 1, 3, 10**6):
        given = test_native.fields(
            block_lse=logits, rest_lse=torch.empty(2000, dtype=torch.float64), num_threads=threads
        )
        C.sum_blocks(**given)
        torch.testing.assert_close(given["rest_lse"], logits.logsumexp(1))


def test_no_instruction_set_of_that_name():
    with pytest.raises(TypeError):
        C.use_isa(None)
    assert not C.use_isa("none") and C.isa() in C.supported_isas()
