"""The adapter of OpenRLHF: its own `Actor` and `DPOTrainer.fit` where it is installed, otherwise the actor's contract.

Last run with OpenRLHF 0.11.2, transformers 5.23.0, torch 2.13.0 on the CPU. It imports flash_attn and deepspeed, which
need a GPU: stand-ins take their names, and the strategy, which is DeepSpeed's, is the test's own. The contract is
openrlhf/models/actor.py of 0.11.2: `Actor.forward`, which calls `log_probs_from_logits` and `compute_entropy` by the
names it imported.
"""

import importlib.util
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from fastdpo.integrations import openrlhf

REAL = importlib.util.find_spec("openrlhf") is not None
CONTRACT = """
import torch

def log_probs_from_logits(logits, labels, temperature=1.0):
    if temperature != 1.0:
        logits.div_(temperature)
    chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)

def compute_entropy(logits):
    return torch.logsumexp(logits, dim=-1) - torch.sum(logits.softmax(-1) * logits, dim=-1)

class Actor(torch.nn.Module):
    def __init__(self, pretrain_or_model, temperature=1.0):
        super().__init__()
        self.model, self.temperature = pretrain_or_model, temperature

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False, return_logprobs=False,
        ring_attn_group=None, return_entropy=False,
    ):
        rolled = torch.roll(sequences, shifts=-1, dims=1)
        position_ids = attention_mask.long().cumsum(-1) - 1
        position_ids.masked_fill_(attention_mask == 0, 1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
        output["logits"] = output["logits"].to(torch.float32)
        if self.temperature != 1.0:
            output["logits"].div_(self.temperature)
        if return_entropy:
            setattr(output, "entropy", compute_entropy(output["logits"])[:, :-1])
        log_probs = log_probs_from_logits(output["logits"], rolled)[:, :-1]
        if action_mask is not None:
            log_probs = log_probs[:, -action_mask.shape[1]:] * action_mask.float()
        return (log_probs, output) if return_output else log_probs
"""


def stand_in(name, **members):
    module = types.ModuleType(name)
    module.__path__ = []
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    vars(module).update(members)
    return module


@pytest.fixture
def actor(monkeypatch):
    """The module openrlhf.models.actor."""
    if not REAL:
        module = stand_in("openrlhf.models.actor")
        exec(CONTRACT, vars(module))
        for name in ("openrlhf", "openrlhf.models"):
            monkeypatch.setitem(sys.modules, name, stand_in(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module
    attention = dict.fromkeys(("index_first_axis", "pad_input", "rearrange", "unpad_input"))
    for name, members in {
        "flash_attn": {},
        "flash_attn.bert_padding": attention,
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": None},
        "deepspeed": {},
    }.items():
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, stand_in(name, **members))
    return importlib.import_module("openrlhf.models.actor")


@pytest.fixture(autouse=True)
def unpatched(actor):
    names = {(actor, "log_probs_from_logits"), (actor, "compute_entropy"), (actor.Actor, "forward")}
    originals = {(owner, name): vars(owner)[name] for owner, name in names}
    yield
    openrlhf.unpatch()
    assert all(vars(owner)[name] is value for (owner, name), value in originals.items())


@pytest.fixture
def multiplied(monkeypatch):
    """How many rows the weights of `F.linear` had: 512 is the head, multiplied into logits."""
    rows, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (rows.append(len(w)), linear(x, w, b))[1])
    return rows


def patch():
    openrlhf.patch()
    openrlhf.patch(backward="exact")


def batch(step=0):
    ids = (torch.arange(40).view(4, 10) * 7 * (step + 1)) % 500 + 3
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return ids, mask


def build(actor, model, **options):
    model = actor.Actor(model, **options)
    model.packing_samples = False  # an actor of a model has none, one of a path has
    return model


CALLS = {
    "logprobs": {"return_logprobs": True},
    "output": {"return_logprobs": True, "return_output": True},
    "actions": {"action_mask": torch.arange(16).view(4, 4) % 3 > 0},
    "entropy": {"return_logprobs": True, "return_output": True, "return_entropy": True},
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("call", CALLS)
def test_the_actor(call, temperature, actor, tiny_llama, multiplied):
    model = build(actor, tiny_llama(), temperature=temperature)  # made before patching
    ids, mask = batch()

    def step():
        model.zero_grad()
        logps = model(ids, attention_mask=mask, **CALLS[call])
        logps, output = logps if isinstance(logps, tuple) else (logps, None)
        entropy = getattr(output, "entropy", torch.zeros(()))
        (logps.square().mean() + entropy.mean()).backward()
        return logps, entropy, [p.grad.clone() for p in model.parameters()]

    theirs = step()
    patch()
    multiplied.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = step()
    assert multiplied and 512 not in multiplied
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_options_and_other_releases(actor, monkeypatch):
    with pytest.raises(TypeError, match="backwards"):
        openrlhf.patch(backwards="exact")
    forward = actor.Actor.forward
    with monkeypatch.context() as m:
        m.delattr(actor, "log_probs_from_logits")
        with pytest.raises(RuntimeError, match="log_probs_from_logits"):
            openrlhf.patch()
    assert actor.Actor.forward is forward


def test_a_split_head_is_refused(actor, tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks what it splits
    model = build(actor, model)
    openrlhf.patch()
    ids, mask = batch()
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        model(ids, attention_mask=mask, return_logprobs=True)


class Engine(nn.Module):
    """DeepSpeed's, which OpenRLHF puts in the place of `Actor.model`: it hands on what it does not have itself."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        return vars(self)["_modules"]["module"] if name == "module" else getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_inside_an_engine(actor, tiny_llama, multiplied):
    model = build(actor, tiny_llama())
    ids, mask = batch()
    theirs = model(ids, attention_mask=mask, return_logprobs=True)
    model.model = Engine(model.model)
    patch()
    multiplied.clear()
    torch.testing.assert_close(model(ids, attention_mask=mask, return_logprobs=True), theirs, rtol=1e-4, atol=1e-4)
    assert 512 not in multiplied


class Strategy:
    """What `DPOTrainer.fit` asks of OpenRLHF's DeepSpeed strategy, on one process."""

    accumulated_gradient, ring_attn_group = 1, None

    def __init__(self, **model):
        off = types.SimpleNamespace
        self.args = off(
            model=off(
                **{"label_smoothing": 0.0, "ipo_enable": False, "aux_loss_coef": 0.0, "nll_loss_coef": 0.0} | model
            ),
            ds=off(packing_samples=False),
            logger=off(wandb=off(key=None), tensorboard_dir=None, logging_steps=1),
            eval=off(steps=5),
            ckpt=off(save_steps=-1),
            train=off(batch_size=4),
        )
        self.history = []

    def is_rank_0(self):
        return True

    def backward(self, loss, model, optimizer):
        optimizer.zero_grad()
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        optimizer.step()
        scheduler.step()

    def get_grad_norm(self, model):
        return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    def all_reduce(self, logs):
        self.history.append(dict(logs))
        return logs


@pytest.mark.skipif(not REAL, reason="needs OpenRLHF itself")
@pytest.mark.parametrize("options", [{}, {"ipo_enable": True}, {"label_smoothing": 0.1, "nll_loss_coef": 0.2}])
def test_dpo_training(options, actor, tiny_llama, multiplied):
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from trl_runs import largest_difference

    loader = []
    for i in range(10):
        (chosen, mask), (rejected, _) = batch(i), batch(i + 11)
        loader.append((chosen[:, None], mask[:, None], rejected[:, None], mask[:, None].flip(0), [3, 2, 4, 1]))

    class Loader(list):
        sampler = None

    def run():
        actors = [build(actor, tiny_llama(seed)) for seed in (0, 1)]
        strategy = Strategy(**options)
        optim = torch.optim.AdamW(actors[0].parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optim, 1.0)
        tokenizer = types.SimpleNamespace(pad_token_id=0)
        arguments = (*actors, strategy, tokenizer, optim, Loader(loader), Loader(loader[:2]), scheduler)
        DPOTrainer(*arguments, beta=0.1, max_epochs=1).fit(strategy.args)
        return strategy.history

    theirs = run()
    patch()
    multiplied.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run()
    assert len(theirs) == 12 and multiplied and 512 not in multiplied  # ten steps and two evaluations
    print(f"largest metric difference {largest_difference(ours, theirs):.2g}")
