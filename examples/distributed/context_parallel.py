"""DPO with every sequence split over ranks (context parallelism): each has a part of the tokens of all pairs.

torchrun --nproc-per-node 2 examples/distributed/context_parallel.py

The model stands in for one whose attention spans the ranks (ring or Ulysses): here each rank runs it on whole sequences
and keeps its own positions.
"""

import tiny
import torch
import torch.distributed as dist

import fastdpo


def main():
    rank, size, device = tiny.start()
    group = dist.group.WORLD
    model = tiny.model().to(device)  # the same on every rank
    ids, labels = (x.to(device) for x in tiny.batch())
    labels = labels[:, 1:].tensor_split(size, dim=1)[rank]  # shifted first, then split

    def hidden():
        return model.model(input_ids=ids).last_hidden_state[:, :-1].tensor_split(size, dim=1)[rank]

    with torch.no_grad():  # the reference: the model before training; log-probs of this rank's tokens
        ref_logps = fastdpo.linear_logps(hidden(), model.lm_head.weight, labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(4):
        out = fastdpo.linear_dpo_loss(
            hidden(),
            model.lm_head.weight,
            labels,
            ref_logps=ref_logps,
            beta=0.1,
            backward="exact",
            seq_group=group,
        )
        out.loss.backward()  # the same loss on every rank; of parameters this rank's tokens' part of the gradient
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)  # a sum; seq_grads="mean" is for wrappers that average
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {out.loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
