"""What this GPU reaches on work that no kernel of ours does: the rates that floors are made of. One line of JSON.

python -m benchmarks.gpu.ceilings [cuda | cpu]
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.gpu.timing import interleaved


def main(device: str) -> None:
    on_gpu = device == "cuda"
    size, copied, rows = (8192, 1 << 31, 4096) if on_gpu else (64, 1 << 16, 64)
    contenders = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        contenders[f"mm {dtype}"] = lambda a=a, b=b: torch.mm(a, b)
    source = torch.randint(0, 255, (copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    contenders["copy"] = lambda: target.copy_(source)
    # rows added in fp32 to rows in any order, as the routed dhidden adds them
    sums, added = (torch.randn(rows, rows, device=device) for _ in range(2))
    index = torch.randint(0, rows, (rows,), device=device)
    contenders["index_add"] = lambda: sums.index_add_(0, index, added)
    timings, left_out = interleaved(contenders, device, rounds=20 if on_gpu else 1, seconds=20)
    seconds = {name: timing.median / 1e3 for name, timing in timings.items()}
    small = torch.zeros(1, device=device)
    launches = 1000 if on_gpu else 10
    begin = time.perf_counter()
    for _ in range(launches):
        small.add_(1)
    if on_gpu:
        torch.cuda.synchronize()
    record = {
        "flops": 2 * size**3 / seconds["mm torch.bfloat16"],
        "flops fp16": 2 * size**3 / seconds["mm torch.float16"],
        "flops fp32": 2 * size**3 / seconds["mm torch.float32"],
        "bandwidth": 2 * copied / seconds["copy"],
        "index_add bytes": 3 * 4 * rows * rows / seconds["index_add"],
        "launch": (time.perf_counter() - begin) / launches,
        "left out": left_out,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
