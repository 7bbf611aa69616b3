"""Every CUDA kernel of csrc/ on small inputs, to be run under compute-sanitizer; the GPU suite does.

compute-sanitizer --tool memcheck python benchmarks/gpu_sanitized.py [--device cuda]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    logits_kernels(args.device)
    print(fastdpo.backends()["operations"]["selective_log_softmax"])


if __name__ == "__main__":
    main()
