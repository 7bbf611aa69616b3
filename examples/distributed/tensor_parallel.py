"""DPO with the head's rows split over ranks, as plain tensors: each rank scores all tokens against its part of the ids.

torchrun --nproc-per-node 2 examples/distributed/tensor_parallel.py
"""

import tiny
import torch
import torch.distributed as dist

import fastdpo


def main():
    rank, size, device = tiny.start()
    model = tiny.model().to(device)  # the same on every rank
    layers = model.model
    shard = torch.nn.Parameter(model.lm_head.weight.detach().tensor_split(size)[rank].clone())  # in rank order
    ids, labels = (x.to(device) for x in tiny.batch())  # the same on every rank
    labels = labels[:, 1:]

    def hidden():
        return layers(input_ids=ids).last_hidden_state[:, :-1]

    with torch.no_grad():  # the reference: the model before training
        ref_logps = fastdpo.linear_logps(hidden(), shard, labels, vocab_group=dist.group.WORLD).sum(-1)
    optimizer = torch.optim.SGD([*layers.parameters(), shard], lr=1e-2)
    for step in range(4):
        out = fastdpo.linear_dpo_loss(
            hidden(), shard, labels, ref_logps=ref_logps, beta=0.1, backward="exact", vocab_group=dist.group.WORLD
        )
        # The loss is whole on every rank, and so is the gradient of the hidden states, which is summed over ranks
        # already: nothing is divided, and the layers before need no reduction.
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {out.loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
