"""DPO in a pipeline of torch.distributed.pipelining: each rank has some of the layers, the last one the head.

torchrun --nproc-per-node 2 examples/distributed/pipeline.py
"""

import tiny
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import fastdpo
from fastdpo.microbatches import interleave, paired, restore

CHUNKS = 2  # microbatches, of as many pairs each


class Stage(torch.nn.Module):
    """A part of the layers; before them the embedding, or after them the norm and the head, which the loss reads."""

    def __init__(self, model, rank: int, size: int):
        super().__init__()
        count = len(model.model.layers)
        self.layers = model.model.layers[rank * count // size : (rank + 1) * count // size]
        self.rotary = model.model.rotary_emb
        self.embedding = model.model.embed_tokens if rank == 0 else None
        self.norm = model.model.norm if rank == size - 1 else None
        self.head = model.lm_head if rank == size - 1 else None

    def forward(self, x):
        if self.embedding is not None:
            x = self.embedding(x)
        positions = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=positions)
        return x if self.norm is None else self.norm(x)


def main():
    rank, size, device = tiny.start()
    first, last = rank == 0, rank == size - 1

    stage = Stage(tiny.model(), rank, size).to(device)
    ids, labels = (x.to(device) for x in tiny.batch())
    labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # shifted; a stage returns every position

    def loss(hidden, labels, ref_logps):
        options = {"beta": 0.1, "backward": "exact", "ref_logps": ref_logps}
        return fastdpo.linear_dpo_loss(hidden, stage.head.weight, labels, **options).loss

    schedule = Schedule1F1B(PipelineStage(stage, rank, size, device), CHUNKS, loss_fn=paired(loss))
    rows = interleave(torch.arange(len(ids)), CHUNKS)  # the target: which rows a microbatch has
    inputs = (interleave(ids, CHUNKS),) if first else ()

    def given(ref_logps):
        return {"target": rows, "loss_kwargs": {"labels": labels, "ref_logps": ref_logps}} if last else {}

    hidden, ref_logps = schedule.eval(*inputs, **given(None)), None
    if last:  # the reference: the model before training
        with torch.no_grad():
            ref_logps = fastdpo.linear_logps(restore(hidden, CHUNKS), stage.head.weight, labels).sum(-1)
    optimizer = torch.optim.SGD(stage.parameters(), lr=1e-2)
    for step in range(4):
        losses = []
        schedule.step(*inputs, losses=losses, **given(ref_logps))  # gradients: the mean over microbatches
        optimizer.step()
        optimizer.zero_grad()  # or the next step would divide these gradients once more
        if last:
            print(f"step {step}: loss {torch.stack(losses).mean().item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
