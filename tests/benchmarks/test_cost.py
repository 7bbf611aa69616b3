"""What the CPU engine costs, counted: floating-point operations and memory. No clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heads import peaked_head, shares
from torch.utils.flop_counter import FlopCounterMode

import fastdpo
from fastdpo import routing

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cpu_engine(monkeypatch):
    reason = fastdpo.backends()["engines"]["cpu"]["reason"]
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")


def passes(head, frozen: bool, **options) -> float:
    """lm_head GEMMs of one policy and reference forward and a backward."""
    leaves = head.leaves(torch.float32)
    leaves.weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, **options).sum().backward()
        with torch.no_grad():
            fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels)
    scored = int((head.labels != -100).sum())
    return counter.get_total_flops() / (2 * scored * leaves.weight.numel())


@pytest.mark.parametrize("frozen,expected", [(False, 5.0), (True, 4.0)])
def test_exact_passes(frozen, expected):
    head = peaked_head(N=256, V=8192)
    head.labels[::4] = -100  # rows whose label is ignored never enter a product
    assert passes(head, frozen, backward="exact") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_routed_passes_follow_the_kept_pairs(frozen):
    """2 forwards, and 3 products (2 when frozen) for the kept share of pairs."""
    head = peaked_head(N=512, V=8192)
    tau = 1e-2
    share = routing.odds(*shares(head), tau).double().mean().item() / routing.ONE
    products = 2 if frozen else 3
    count = passes(head, frozen, tau=tau, seed=0)
    assert 2 + products * share * 0.9 < count < 2 + products * share * 1.1
    assert count < (3.0 if frozen else 3.5)


def test_the_first_call_of_a_process_is_counted():
    script = (
        "import torch, fastdpo\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    fastdpo.linear_logps(torch.randn(4, 8), torch.randn(256, 8), torch.arange(4))\n"
        "print(counter.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 4 * 8 * 256


def test_flat_distributions_cost_no_more_than_exact():
    head = peaked_head(N=128, V=4096)
    head.hidden *= 1e-3
    assert passes(head, False, tau=1e-3, seed=0) <= 5.0 * (1 + 1e-6)


def test_frozen_and_no_grad_calls_save_nothing_to_route():
    head = peaked_head(N=128, V=4096).leaves(torch.float32, False)
    with FlopCounterMode(display=False) as counter:
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels)
    assert logps.grad_fn is None
    assert counter.get_total_flops() == 2 * 128 * head.weight.numel()


def test_a_shifted_slice_of_hidden_is_not_copied():
    from fastdpo.ops.by_token import as_rows

    hidden = torch.randn(3, 9, 32)
    rows, source = as_rows(hidden[:, :-1])
    assert rows.data_ptr() == hidden.data_ptr()
    assert torch.equal(rows[source], hidden[:, :-1].reshape(-1, 32))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backward", ["routed", "exact"])
@pytest.mark.parametrize(
    "tokens,shape",
    [  # the logits alone would be 512 MiB or more; of the slow ones fp32 copies of hidden states and head are seen too
        (1024, "--vocab 131072 --hidden-size 64 --frozen"),
        (4096, "--vocab 32768 --hidden-size 128 --dtype bfloat16"),
        (32768, "--vocab 4096 --hidden-size 128 --dtype bfloat16"),
        pytest.param(4096, "--vocab 131072 --hidden-size 64 --frozen", marks=pytest.mark.slow),
        pytest.param(4096, "--vocab 65536 --hidden-size 256 --dtype bfloat16", marks=pytest.mark.slow),
        pytest.param(16384, "--vocab 4096 --hidden-size 1024 --dtype bfloat16", marks=pytest.mark.slow),
    ],
)
def test_memory_beyond_inputs_and_gradients(tokens, shape, backward):
    """At most 128 MiB + 256 bytes per token, whatever N, V and H."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu.memory",
        "--tokens",
        str(tokens),
        *shape.split(),
        "--path",
        f"fastdpo {backward}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 128 + tokens * 256 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tokens", [4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_memory_of_a_step_on_a_trained_head(tmp_path, tokens):
    """Lists of kept tokens of every length: what products of so many shapes leave behind counts too."""
    pytest.importorskip("safetensors")
    make = (
        "from benchmarks import inputs\n"
        "from safetensors.torch import save_file\n"
        "head = inputs.synthetic_head(2048, 32768, 256)\n"
        "tensors = {'hidden': head.hidden, 'weight': head.weight, 'labels': head.labels}\n"
        f"save_file(tensors, {str(tmp_path / 'head.safetensors')!r})"
    )
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "benchmarks.cpu.sweep", "--one", "fastdpo routed", json.dumps({"tokens": tokens})]
    command += ["--head", tmp_path / "head.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 128 + tokens * 256 / 2**20
