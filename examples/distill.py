"""Distillation in plain PyTorch: a student learns a teacher's whole distribution, and the logits of neither exist.

python examples/distill.py                       tiny models and data, made here: seconds on a CPU
python examples/distill.py --kind jsd

With models of transformers, hidden is `model.base_model(ids, attention_mask=mask).last_hidden_state` and the head
`model.get_output_embeddings()`; trainers of TRL take one line, fastdpo.patch_trl().
"""

import argparse

import torch
from torch import nn

import fastdpo

VOCAB = 4000


class Model(nn.Module):
    """A language model, small: what is fed to its head, and the head."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, hidden_size)
        self.layer = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, VOCAB)

    def hidden(self, ids):
        return self.layer(self.embedding(ids))[0]


def batch(size: int, length: int = 32):
    """(ids, mask) [B, T]: of every text some first tokens, its prompt, do not count, nor does what pads it."""
    ids = torch.randint(64, (size, length))
    position, prompt, end = torch.arange(length), torch.randint(2, 8, (size, 1)), torch.randint(20, 33, (size, 1))
    return ids, (position >= prompt) & (position < end)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="forward_kl", choices=("forward_kl", "reverse_kl", "jsd"))
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits of both")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = Model(96).to(device).eval(), Model(48).to(device)  # hidden sizes may differ
    teacher.head.weight.data *= 12  # as sure as a trained model
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    for step in range(1, args.steps + 1):
        ids, mask = (x.to(device) for x in batch(args.batch_size))
        with torch.no_grad():
            ref_hidden = teacher.hidden(ids)
        out = fastdpo.linear_divergence(
            student.hidden(ids),
            student.head.weight,
            ref_hidden,
            teacher.head.weight,
            mask,
            student.head.bias,
            teacher.head.bias,
            kind=args.kind,
            temperature=args.temperature,
            stats=("entropy",),
        )
        loss = out.divergence.sum() / mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        entropy = out.entropy.detach().sum() / mask.sum()
        print(f"step {step}: divergence {loss.item():.4f}, student's entropy {entropy.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
