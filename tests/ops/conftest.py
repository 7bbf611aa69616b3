"""The CUDA kernels on the CPU, for the tests of what launches them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import cuda_on_cpu
import pytest
import torch

from fastdpo.ops import native


@pytest.fixture(scope="session")
def cuda_kernels() -> ModuleType:
    if not native.available():
        pytest.skip(f"no native extension here: {native.REASON}")
    return cuda_on_cpu.load()


@pytest.fixture
def cuda_on_the_cpu(cuda_kernels, monkeypatch, seeded) -> Iterator[set[str]]:
    """CPU tensors go the way of a GPU's, to the kernels of csrc/cuda; which have run. Unfilled memory holds NaN."""
    launched = cuda_on_cpu.install(monkeypatch, cuda_kernels, seeded)
    torch.use_deterministic_algorithms(True)  # which fills it
    yield launched
    torch.use_deterministic_algorithms(False)
