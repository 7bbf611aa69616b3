"""The adapter of open-instruct, against its contract: it is no package that can be installed, and needs vLLM and Ray.

allenai/open-instruct, main branch of 2026: open_instruct/dpo_utils.py (`concatenated_forward`, `separate_forward`,
`_get_batch_logps`, `dpo_loss`, and `ExperimentConfig.forward_fn`, which looks the forwards up when it is asked) and
padding_free_collator.py (`calculate_per_token_logps`, which dpo_utils imports by name, and `get_batch_logps`).
"""

import functools
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from fastdpo.integrations import open_instruct

CONTRACT = """
import torch
from torch.nn import functional as F

def calculate_per_token_logps(logits, labels):
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    logits = logits.to(torch.float32)
    mask = (shifted != -100).float()
    return torch.gather(logits.log_softmax(-1), 2, shifted.clamp(min=0).unsqueeze(2)).squeeze(2) * mask

def _get_batch_logps(per_token_logps, labels, average_log_prob=False):
    mask = labels[:, 1:] != -100
    sums = (per_token_logps[:, :-1] * mask).sum(-1)
    return sums / mask.sum(-1) if average_log_prob else sums

def pf_get_batch_logps(per_token_logps, labels, cu_seq_lens, average_log_prob=False):
    parts = per_token_logps.squeeze(0).split(cu_seq_lens.diff().tolist())
    return torch.stack([part.sum() for part in parts])

def concatenated_forward(model, batch, average_log_prob=False, output_router_logits=False, packing=False):
    ids, labels = (torch.cat((batch["chosen_" + x], batch["rejected_" + x])) for x in ("input_ids", "labels"))
    bs = len(ids) // 2
    if packing:
        ids, labels, (each, length) = ids.view(1, -1), labels.view(1, -1), ids.shape
        position_ids = torch.arange(length).repeat(each)[None]
        logits = model(input_ids=ids, position_ids=position_ids).logits
        per_token_logps = calculate_per_token_logps(logits, labels)
        cu_seq_lens = torch.arange(each + 1) * length
        all_logps = pf_get_batch_logps(per_token_logps, labels, cu_seq_lens, average_log_prob=average_log_prob)
    else:
        mask = torch.cat((batch["chosen_attention_mask"], batch["rejected_attention_mask"]))
        per_token_logps = calculate_per_token_logps(model(input_ids=ids, attention_mask=mask).logits, labels)
        all_logps = _get_batch_logps(per_token_logps, labels, average_log_prob=average_log_prob)
    return all_logps[:bs], all_logps[bs:], None

def separate_forward(model, batch, average_log_prob=False, output_router_logits=False):
    results = []
    for side in ("chosen", "rejected"):
        ids, mask, labels = (batch[f"{side}_{x}"] for x in ("input_ids", "attention_mask", "labels"))
        logits = model(input_ids=ids, attention_mask=mask).logits.to(torch.float32)
        per_token_logps = calculate_per_token_logps(logits, labels)
        results.append(_get_batch_logps(per_token_logps, labels, average_log_prob=average_log_prob))
    return *results, None

def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    logits = (chosen - rejected) - (reference_chosen - reference_rejected)
    rewards = [(beta * (x - y)).detach() for x, y in ((chosen, reference_chosen), (rejected, reference_rejected))]
    return -F.logsigmoid(beta * logits), *rewards
"""
FORWARDS = {
    "concatenated": ("concatenated_forward", {}),
    "average": ("concatenated_forward", {"average_log_prob": True}),
    "packing": ("concatenated_forward", {"packing": True}),
    "separate": ("separate_forward", {}),
}


@pytest.fixture
def module(monkeypatch):
    module = types.ModuleType("open_instruct.dpo_utils")
    exec(CONTRACT, vars(module))
    monkeypatch.setitem(sys.modules, "open_instruct", types.ModuleType("open_instruct"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    originals = dict(vars(module))
    yield module
    open_instruct.unpatch()
    assert all(vars(module)[name] is value for name, value in originals.items())


def batch(step):
    rows = {}
    for offset, side in enumerate(("chosen", "rejected")):
        ids = (torch.arange(20).view(2, 10) * (2 * step + 3) + 31 * offset) % 500 + 3
        mask = torch.ones_like(ids)
        mask[offset, -2:] = 0
        labels = ids.masked_fill(torch.arange(10) < 3 + offset, -100).masked_fill(mask == 0, -100)
        rows |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return rows


def train(module, name, options, model, reference, steps=10):
    forward = functools.partial(getattr(module, name), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        with torch.no_grad():
            reference_logps = forward(reference, batch(step))[:2]
        *logps, _ = forward(model, batch(step))
        losses, chosen_rewards, rejected_rewards = module.dpo_loss(*logps, *reference_logps, beta=0.1)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        history.append([losses.detach(), chosen_rewards, rejected_rewards, *(x.detach() for x in logps)])
    return history


@pytest.mark.parametrize("case", FORWARDS)
def test_parity(case, module, tiny_llama, monkeypatch):
    name, options = FORWARDS[case]
    theirs = train(module, name, options, tiny_llama(), tiny_llama(1))
    model, reference = tiny_llama(), tiny_llama(1)
    open_instruct.patch()
    open_instruct.patch(backward="exact")
    multiplied, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (multiplied.append(len(w)), linear(x, w, b))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = train(module, name, options, model, reference)
    assert multiplied and 512 not in multiplied  # the head, never as logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_options_and_other_versions(module, monkeypatch):
    with pytest.raises(TypeError, match="backwards"):
        open_instruct.patch(backwards="exact")
    forward = module.concatenated_forward
    for name in ("separate_forward", "calculate_per_token_logps"):
        with monkeypatch.context() as m:
            m.delattr(module, name)
            with pytest.raises(RuntimeError, match=name):
                open_instruct.patch()
        assert module.concatenated_forward is forward


def test_a_split_head_is_refused(module, tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks what it splits
    open_instruct.patch()
    for name in ("concatenated_forward", "separate_forward"):
        with pytest.raises(NotImplementedError, match="ZeRO-3"):
            getattr(module, name)(model, batch(0))
