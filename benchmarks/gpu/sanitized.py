"""Every CUDA kernel of csrc/ on small inputs, to be run under compute-sanitizer; the GPU suite does.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools

import torch

import fastdpo


def logits_kernels(device: str) -> None:
    """Rows of every alignment, shorter and longer than a block of threads and split over several, with left-out and
    invalid labels, with entropy and without."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab_size, return_entropy in itertools.product((7, 333, 9001, 70001), (False, True)):
            base = torch.randn(6, vocab_size + 8, device=device).to(dtype)
            for start in (0, 1, 3):
                logits = base[:, start : start + vocab_size].detach().requires_grad_()
                labels = torch.tensor([0, -100, vocab_size - 1, vocab_size, vocab_size // 2, -1], device=device)
                out = fastdpo.selective_log_softmax(logits, labels, temperature=0.7, return_entropy=return_entropy)
                out = sum(out) if return_entropy else out
                out[[0, 2, 4]].sum().backward()
                assert logits.grad[[0, 2, 4]].isfinite().all() and (logits.grad[1] == 0).all()


def loss_kernels(device: str) -> None:
    """A step from hidden states: lists of kept pairs, and the loss from padded and from packed tokens."""
    hidden = torch.randn(4, 300, 64, device=device, requires_grad=True)
    weight = (3 * torch.randn(2000, 64, device=device)).requires_grad_()
    labels = torch.randint(2000, (4, 300), device=device)
    labels[:, :100] = -100
    labels[1] = -100
    offsets = torch.arange(5, device=device, dtype=torch.int32) * 300
    options = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "use_weighting": True, "seed": 1}
    ref_logps = torch.randn(4, 300, device=device)
    padded = fastdpo.linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, **options).loss
    flat = (x.flatten(0, 1) for x in (hidden, labels, ref_logps))
    hidden_rows, label_rows, ref_rows = flat
    packed = fastdpo.linear_dpo_loss(
        hidden_rows, weight, label_rows, ref_logps=ref_rows, cu_seqlens=offsets, **options
    ).loss
    torch.testing.assert_close(padded, packed)
    (padded + packed).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    logits_kernels(args.device)
    loss_kernels(args.device)
    operations = fastdpo.backends()["operations"]
    print({name: operations[name] for name in ("selective_log_softmax", "preference_loss")})


if __name__ == "__main__":
    main()
