"""Lazy logits inside DistributedDataParallel: two ranks have the gradients of one process with everything."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel

from fastdpo.integrations import lazy_logits

V, PAIRS, LENGTH, RANKS = 512, 8, 12, 2


def build():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def pairs() -> torch.Tensor:
    return torch.randint(V, (2, PAIRS, LENGTH), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """The reference-free DPO loss as trainers write it, of ids [2, B, T], chosen first."""
    ids = ids.flatten(0, 1)
    logits = model(input_ids=ids).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    chosen, rejected = logps[:, 3:].sum(-1).chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*needs the logits themselves")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    whole = build()
    loss_of(whole, pairs()).backward()
    expected = gradients(whole)
    mine = pairs().chunk(RANKS, dim=1)[rank]
    for find_unused in (False, True):
        for unused in (False, True) if find_unused else (False,):
            model = build()
            if unused:  # takes no part in the loss: only with find_unused_parameters does DDP go on
                model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
            model = DistributedDataParallel(model, find_unused_parameters=find_unused)
            for _ in range(2):  # the second step is where DDP finds out that one of the first never ended
                model.zero_grad()
                with lazy_logits(model, backward="exact"):
                    loss_of(model, mine).backward()
                found = gradients(model)
                assert found.keys() - {"unused"} == expected.keys()
                for name, grad in expected.items():
                    torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)
            model.zero_grad()
            first, second = mine.chunk(2, dim=1)
            with lazy_logits(model, backward="exact"):
                with model.no_sync():  # gradient accumulation
                    (loss_of(model, first) / 2).backward()
                (loss_of(model, second) / 2).backward()
            for name, grad in expected.items():
                torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.distributed.barrier()  # a rank that leaves early can take the other down with it
    torch.distributed.destroy_process_group()


def test_inside_ddp(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=RANKS)
