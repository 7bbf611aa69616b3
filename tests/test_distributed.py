"""Vocabulary shards: two ranks over gloo give what one rank with the whole head gives."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from heads import relative_error, small_head

import fastdpo

SPLIT = 384  # rows of the first rank: three blocks, the rest ragged
OPTIONS = {"logit_scale": 1.2, "softcap": 6.0, "temperature": 0.8}


def _scored(head, group=None, backward="exact", **options):
    stats = fastdpo.linear_token_stats(
        head.hidden,
        head.weight,
        head.labels,
        head.bias,
        lora=head.lora,
        vocab_group=group,
        backward=backward,
        **OPTIONS,
        **options,
    )
    (stats.logps * torch.arange(1.0, 1 + len(stats.logps))).sum().backward()
    return stats, {name: x.grad for name, x in head.tensors().items()}


def _rank(rank, port, engine, head, options, directory):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), FASTDPO_ENGINE=engine)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    shard = head.leaves(torch.float32, False)
    lora = (shard.lora[0], shard.lora[1][rows].clone(), shard.lora[2])
    shard = type(head)(shard.hidden, shard.weight[rows].clone(), shard.labels, shard.bias[rows].clone(), lora)
    stats, grads = _scored(shard.leaves(torch.float32), dist.group.WORLD, **options)
    torch.save(([x.detach() for x in stats], grads), directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options", [{"backward": "exact"}, {"backward": "routed", "tau": 0.0}], ids=["exact", "routed"]
)
def test_two_shards_equal_one_head(engine, options, tmp_path):
    head = small_head(V=1000, bias=True, lora=True, masked=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # spawn() ends all ranks and raises when one fails.
    mp.spawn(_rank, (port, engine, head.leaves(torch.float64, False), options, tmp_path), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    whole = head.leaves(torch.float32)
    stats, grads = _scored(whole)
    for rank in range(2):
        for name, ours, expected in zip(stats._fields, results[rank][0], stats):
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-5, msg=name)
    for name in ("hidden", "lora_a"):
        for rank in range(2):
            assert relative_error(results[rank][1][name], grads[name]) < 5e-6, name
    for name in ("weight", "bias", "lora_b"):
        joined = torch.cat([results[rank][1][name] for rank in range(2)])
        assert relative_error(joined, grads[name]) < 5e-6, name
