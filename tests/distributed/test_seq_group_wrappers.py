"""seq_grads through what adds gradients up over ranks: DDP, FSDP2, and the ways of accelerate and ms-swift."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from heads import relative_error

import fastdpo

B, T, H, V, IGNORE = 2, 12, 8, 300, -100


class Policy(torch.nn.Module):
    """Its forward is what a trainer's step is; no token looks at another, as attention would do over the ranks."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding, self.trunk = torch.nn.Embedding(V, H), torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def hidden(self, ids):
        return self.trunk(self.embedding(ids)).tanh()

    def forward(self, ids, labels, **options):
        options = {"backward": "exact", "beta": 0.5, "loss_type": "ipo", **options}
        return fastdpo.linear_dpo_loss(self.hidden(ids), self.head.weight, labels, **options).loss


def batch(which: int):
    """(ids, labels that were shifted before any split) of 2B sequences."""
    generator = torch.Generator().manual_seed(10 + which)
    ids = torch.randint(0, V, (2 * B, T + 1), generator=generator)
    labels = ids.clone()
    labels[torch.rand(2 * B, T + 1, generator=generator) < 0.3] = IGNORE
    return ids[:, :-1], labels[:, 1:]


def expected(batches: int):
    """Gradients of the mean over the batches, in one process and fp64."""
    policy = Policy(torch.float64)
    (sum(policy(*batch(i)) for i in range(batches)) / batches).backward()
    return {name: x.grad for name, x in policy.named_parameters()}


def _wrapped(rank, size, wrapper, seq_size):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (size // seq_size, seq_size), mesh_dim_names=("dp", "cp"))
    (ids, labels), cuts = batch(mesh["dp"].get_local_rank()), [0, 5, 5, T] if seq_size == 3 else [0, 7, T]
    part = slice(*cuts[mesh["cp"].get_local_rank() :][:2])
    policy, step = Policy(), None
    if wrapper == "ddp":
        step = torch.nn.parallel.DistributedDataParallel(policy)
    else:
        from torch.distributed.fsdp import fully_shard

        step = fully_shard(policy)
    step(ids[:, part], labels[:, part], seq_group=mesh["cp"], seq_grads="mean").backward()
    grads = {name: x.grad for name, x in policy.named_parameters()}
    return {name: x.full_tensor() if wrapper == "fsdp" else x for name, x in grads.items()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("size,seq_size", [(2, 2), (3, 3), (4, 2)])
def test_what_averages_over_all_ranks_gives_the_gradient(wrapper, size, seq_size, ranks):
    """Over the ranks of the group, and those with other batches beside it."""
    found, whole = ranks(size)(_wrapped, wrapper, seq_size), expected(size // seq_size)
    for grads in found:
        for name, grad in whole.items():
            assert relative_error(grads[name], grad) < 2e-6, name


class SwiftGather(torch.autograd.Function):
    """As ms-swift's: every rank computes the whole loss, of gathered log-probs; the gradient of its own part is taken
    times the size, since all gradients are averaged later."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.width = x.shape[1]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        return (grad * dist.get_world_size()).split(ctx.width, 1)[dist.get_rank()]


def accelerate_gather(x):
    """As in transformers' loss under accelerate's sequence parallelism: its backward adds up what arrives at all
    ranks, and each has the whole loss."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()), 1)


def _theirs(rank, size, way):
    ids, labels = (x.chunk(size, 1)[rank] for x in batch(0))
    found = []
    for ours in (False, True):
        policy = Policy()
        hidden = policy.hidden(ids)
        hidden.retain_grad()
        if ours:
            options = {"backward": "exact", "beta": 0.5, "loss_type": "hinge"}
            group = {"seq_group": dist.group.WORLD, "seq_grads": "mean"}
            loss = fastdpo.linear_dpo_loss(hidden, policy.head.weight, labels, **options, **group).loss
        else:
            logps = fastdpo.linear_logps(hidden, policy.head.weight, labels, backward="exact")
            sums = (SwiftGather.apply if way == "ms-swift" else accelerate_gather)(logps).sum(1)
            loss = (1 - 0.5 * (sums[:B] - sums[B:])).relu().mean()
        loss.backward()
        for parameter in policy.parameters():  # as DDP and FSDP do
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        found.append((loss.detach(), hidden.grad, {name: x.grad for name, x in policy.named_parameters()}))
    return found


@pytest.mark.parametrize("way", ["ms-swift", "accelerate"])
def test_gradients_are_those_of_a_gathered_loss(way, ranks):
    for (loss, hidden, grads), (our_loss, our_hidden, ours) in ranks(2)(_theirs, way):
        assert relative_error(our_loss, loss) < 2e-6 and loss > 0
        assert relative_error(our_hidden, hidden) < 2e-6
        assert all(relative_error(ours[name], grad) < 2e-6 for name, grad in grads.items())
