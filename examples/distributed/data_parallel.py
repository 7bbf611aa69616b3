"""DPO with each rank's own pairs: under FSDP2, the head in a group of its own, or under DDP.

torchrun --nproc-per-node 2 examples/distributed/data_parallel.py [--ddp]
"""

import argparse

import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdpo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddp", action="store_true", help="a whole model on every rank")
    ddp = parser.parse_args().ddp
    rank, size, device = tiny.start()
    model = tiny.model().to(device)
    fastdpo.patch_model(model, backward="exact")  # before it is wrapped: it runs the model once
    if ddp:
        model = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model.lm_head)  # gathered when it scores, and its gradient scattered, by its own hooks
        fully_shard(model)
    # Before a forward without gradients: FSDP2's root stays gathered after one, and its parameters are then copies
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    # this rank's pairs: the wrapper takes the mean over ranks, so each has as many
    ids, labels = (torch.cat([half.chunk(size)[rank] for half in x.chunk(2)]).to(device) for x in tiny.batch())
    with torch.no_grad():  # the reference: the model before training
        ref_logps = model(ids, labels=labels, fastdpo=True).logps.sum(-1)
    for step in range(4):
        logps = model(ids, labels=labels, fastdpo=True).logps.sum(-1)
        out = fastdpo.preference_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=0.1)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = out.loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss.item() / size:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
