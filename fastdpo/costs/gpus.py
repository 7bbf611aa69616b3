"""What GPUs reach, and where each figure comes from. None of them was measured by this project.

A source begins with what it is worth: "published", somebody's measurement; "data sheet"; "estimated", by the rule that
follows. `make gpu` measures the first four of `Gpu` on the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("published", "data sheet", "estimated")


@dataclass(frozen=True)
class Gpu:
    """Rates per second, on a good day."""

    flops: float  # of a large plain bf16 product with fp32 sums
    bandwidth: float  # bytes read and written of a large copy
    launch: float = 2e-6  # seconds between two kernels that do nothing
    l2: float = 9.7e12  # bytes read by the multiprocessors out of the L2 cache
    cache: float = 40e6  # bytes that stay in the L2 cache beside what streams through it
    multiprocessors: int = 132
    boost: float = 1.98e9  # clock
    per_clock: int = 4096  # bf16 operations of one multiprocessor's tensor cores
    capability: int = 90
    memory: float = 80.0  # GiB

    @property
    def clock(self) -> float:
        """While the tensor cores are busy: a large product is taken to keep them busy 92% of the time."""
        return min(self.boost, self.flops / (0.92 * self.per_clock * self.multiprocessors))


KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share (CUDA C++ programming guide, table of technical specifications)."""

    block_memory: int  # bytes of shared memory that one program can have
    memory: int  # of all programs; each takes RESERVED_MEMORY more than it asks for
    threads: int
    programs: int
    count: int  # of a usual card


RESERVED_MEMORY = KIB
MULTIPROCESSORS = {
    80: Multiprocessor(163 * KIB, 164 * KIB, 2048, 32, 108),
    86: Multiprocessor(99 * KIB, 100 * KIB, 1536, 16, 82),
    89: Multiprocessor(99 * KIB, 100 * KIB, 1536, 24, 128),
    90: Multiprocessor(227 * KIB, 228 * KIB, 2048, 32, 132),
    100: Multiprocessor(227 * KIB, 228 * KIB, 2048, 32, 148),
    120: Multiprocessor(99 * KIB, 100 * KIB, 1536, 24, 188),
}

GPUS = {
    "A100": Gpu(250e12, 1.73e12, 2e-6, 5.4e12, 28e6, 108, 1.41e9, 2048, 80),
    "H100": Gpu(728e12, 3.0e12, 2e-6, 9.7e12, 40e6, 132, 1.98e9, 4096, 90),
    "H200": Gpu(785e12, 3.9e12, 2e-6, 9.7e12, 44e6, 132, 1.98e9, 4096, 90, 141),
    "B200": Gpu(1672e12, 6.8e12, 2e-6, 13e12, 100e6, 148, 1.97e9, 8192, 100, 180),
    "RTX 4090": Gpu(157e12, 0.92e12, 2e-6, 4.9e12, 58e6, 128, 2.52e9, 512, 89, 24),
    "RTX 5090": Gpu(224e12, 1.6e12, 2e-6, 6.2e12, 77e6, 170, 2.41e9, 512, 120, 32),
}

_BENCHES = "published: github.com/te42kyfo/gpu-benches"
_COMMON = {
    "launch": "estimated: the same for all; published figures of graphs and streams lie between 1 and 4 us",
    "multiprocessors": "data sheet",
    "boost": "data sheet",
    "per_clock": "data sheet: dense bf16 rate over multiprocessors and clock",
    "capability": "data sheet",
    "memory": "data sheet",
}
SOURCES: dict[str, dict[str, str]] = {
    "A100": {
        "flops": "estimated: 80% of the data sheet's 312e12; 268e12 is published for the best of many shapes "
        "(stas00/ml-engineering)",
        "bandwidth": f"{_BENCHES}, gpu-l2-cache/a100_80.txt, reading far more than the cache holds",
        "l2": f"{_BENCHES}, gpu-l2-cache/a100_80.txt",
        "cache": f"{_BENCHES}: half the rate beyond 28 to 36 MB of the 40, each half of the chip keeps copies",
    },
    "H100": {
        "flops": "published: 42 ms for three products of 8192 x 4096 x 151936 (huggingface/trl#7244); 720e12 by "
        "SemiAnalysis, 794e12 for the best of many shapes (stas00/ml-engineering)",
        "bandwidth": "estimated: 90% of the data sheet's 3.35e12; the H200's share would be 2.7e12",
        "l2": "estimated: the H200's, which is the same chip; gpu-benches has 6.9e12 for the PCIe card at 350 W",
        "cache": "estimated: 80% of the data sheet's 50 MB; gpu-benches sees 36 MB on the PCIe card",
    },
    "H200": {
        "flops": "published: 763e12 and 787e12 by linkedin/Liger-Kernel (peers.py)",
        "bandwidth": f"{_BENCHES}, gpu-l2-cache and gpu-stream, h200.txt: reading, and writing; 81% of the data sheet",
        "l2": f"{_BENCHES}, gpu-l2-cache/h200.txt, 10 to 40 MB",
        "cache": f"{_BENCHES}: the rate falls beyond 44 MB",
    },
    "B200": {
        "flops": "published: 1672e12 at 8192 cubed, 1448e12 to 1562e12 at model shapes (arXiv 2604.23466, as cited by "
        "others); 1745e12 for the best of many shapes (stas00/ml-engineering)",
        "bandwidth": "estimated: 85% of the data sheet's 8e12",
        "l2": "estimated: the least that feeds 1672e12 in tiles of 256 x 256 by two multiprocessors; nothing measured "
        "was found",
        "cache": "estimated: 80% of the data sheet's 126 MB",
        "boost": "data sheet, as listed by others",
    },
    "RTX 4090": {
        "flops": "estimated: 95% of the data sheet's 165e12",
        "bandwidth": "estimated: 91% of the data sheet's 1.008e12",
        "l2": "published: github.com/smallscientist1/cuda_microbenchmark, cp.async; gpu-benches has 5.2e12 for the L40",
        "cache": "estimated: 80% of the data sheet's 72 MB",
    },
    "RTX 5090": {
        "flops": "published: torch.matmul at 16384 x 8192 x 1280 (main-horse.github.io/posts/5090-mm-perf); the data "
        "sheet has 209e12 at its lower clock",
        "bandwidth": "estimated: 89% of the data sheet's 1.79e12",
        "l2": "estimated: the RTX 4090's bytes per clock and multiprocessor",
        "cache": "estimated: 80% of the data sheet's 96 MB",
    },
}
for _name in SOURCES:
    SOURCES[_name] = _COMMON | SOURCES[_name]


def named(name: str) -> str:
    """The key in GPUS of a card's name, as people or torch write it: "h100", "NVIDIA H100 80GB HBM3".

    Raises:
        ValueError: none of them is in `name`, or only a card that shares the number and is another.
    """
    words = "".join(c if c.isalnum() else " " for c in name.upper()).split()
    for key in GPUS:
        number = key.upper().split()[-1]
        if number in words and not {"PCIE", "NVL", "LAPTOP", "MOBILE", "D", "MIG"} & set(words):
            return key
    raise ValueError(f"no rates are known of the GPU {name!r}; known are {', '.join(GPUS)}")
