"""What GPUs reach: every rate has a source."""

from __future__ import annotations

from dataclasses import fields

import pytest

from fastdpo.costs.gpus import GPUS, KINDS, SOURCES, Gpu, named


@pytest.mark.parametrize("name", GPUS)
def test_every_rate_names_its_source(name):
    assert set(SOURCES[name]) == {field.name for field in fields(Gpu)}
    for text in SOURCES[name].values():
        assert text.startswith(KINDS)
        assert text.split(":")[0] == "data sheet" or len(text) > 30, "what was published, by whom; what was estimated"
    gpu = GPUS[name]
    assert gpu.clock <= gpu.boost
    assert gpu.flops < gpu.per_clock * gpu.multiprocessors * gpu.boost * 1.1
    assert gpu.bandwidth < gpu.l2


@pytest.mark.parametrize(
    "name, key",
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx5090", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H1000", None),
        ("", None),
    ],
)
def test_a_card_is_found_by_its_name_or_none_is(name, key):
    if key is not None:
        assert named(name) == key
        return
    with pytest.raises(ValueError, match="known are A100, H100"):
        named(name)
