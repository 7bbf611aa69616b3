"""The measuring programs: they walk every case without a GPU, count right, and say what was not measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def is_a_reason(why: str) -> bool:
    known = ("not installed", "has no", "need a GPU", "are for ", "no loss per token", "torch.compile failed")
    return any(reason in why for reason in known)


# The GPU suite


def test_without_a_gpu_the_suite_says_so():
    done = run("-m", "benchmarks.gpu.suite", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA GPU here" in done.stdout


def dry_run_of(folder: Path, *options, **environment) -> dict:
    done = run("-m", "benchmarks.gpu.suite", "--dry-run", "--output", folder, *options, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {file.name for file in folder.iterdir()} == {
        "result.json", "summary.txt", "log.txt", "special.json", "tuned.json",
    }  # fmt: skip
    return {**json.loads((folder / "result.json").read_text()), "printed": done.stdout}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> dict:
    """Of one shape, with every contender; what peers compile, which takes most of the time, runs as it is written."""
    eager = tmp_path_factory.mktemp("eager")
    (eager / "sitecustomize.py").write_text("import torch\ntorch.compiler.set_stance('force_eager')\n")
    path = os.pathsep.join([str(eager), os.environ.get("PYTHONPATH", "")])
    return dry_run_of(tmp_path_factory.mktemp("gpu"), "--stages", "ceilings", "target", PYTHONPATH=path)


@pytest.mark.slow
def test_a_dry_run_walks_every_stage(tmp_path):
    from benchmarks.gpu.cases import GROUPS
    from benchmarks.gpu.shapes import GRID

    dry_run = dry_run_of(tmp_path)
    assert {name: stage["state"] for name, stage in dry_run["stages"].items()} == dict.fromkeys(
        ("first", "ceilings", "target", "compile", "tests", "forwards", "tune", "shapes", "sanitizers"), "done"
    )
    assert dry_run["device"]["name"] == "none" and "no GPU" in dry_run["title"]
    assert dry_run["compile"]["status"] == 0 and dry_run["compile"]["faults"] == []
    assert dry_run["tests"]["status"] == 0 and dry_run["tests"]["collected"] > 200
    assert dry_run["sanitizers"] == {"without": 0}
    assert dry_run["forwards"] == ["no special forward kernel for the interpreter"]
    assert any("(present)" in line for line in dry_run["tune"])
    assert dry_run["ceilings"]["flops"] > 0 and dry_run["ceilings"]["left out"] == {}
    assert {"errors", "kernels", *GROUPS} == {group for _, _, groups, _ in GRID for group in groups}
    assert set(dry_run["shapes"][1]["groups"]) == set(GROUPS) and len(dry_run["shapes"][1]["errors"]) == 6
    assert any(shape[2] <= 1024 for shape, *_ in GRID)
    assert "MISS" not in dry_run["printed"]  # nothing of a dry run is judged


def test_a_dry_run_runs_every_contender(dry_run):
    from benchmarks.peers import PEERS, TOKEN_LOGPS

    (shape,) = dry_run["shapes"]
    left_out = {name.partition("/")[2]: why for name, why in shape["left out"].items()}
    seen = {name: {row["name"] for row in group["rows"]} for name, group in shape["groups"].items()}
    assert {"fastdpo exact", "fastdpo routed", "eager", "two torch.mm"} <= seen["step"] & seen["frozen step"]
    assert {"exact", "routed", "exact, frozen head", "routed, frozen head"} <= seen["backward"]
    assert set(TOKEN_LOGPS) <= seen["forward"] | left_out.keys()
    assert set(PEERS) - {"trl as its trainer"} <= seen["step"] | left_out.keys()
    assert all(is_a_reason(why) for why in left_out.values()), left_out
    for backward in ("routed", "exact"):
        kernels = {row["kernel"] for row in shape["kernels"][backward]}
        assert {"fold", "compact", "finish", "exact"} <= kernels and ("routed_dz" in kernels) == (backward == "routed")


def test_a_result_becomes_a_picture(dry_run, tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({name: value for name, value in dry_run.items() if name != "printed"}))
    done = run("-m", "benchmarks.report.gpu", result)
    assert done.returncode == 0, done.stderr
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_forwards_is_written(monkeypatch, tmp_path):
    from benchmarks.gpu import forwards
    from fastdpo.ops.triton import special
    from fastdpo.ops.triton.fold import plain_fold

    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("no Triton engine here")
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    shape = {"tokens": 32, "columns": 300, "seconds": 0.0}  # three rounds
    one = forwards.measure("fake", {"a": plain_fold, "b": plain_fold}, 32, torch.float32, device, **shape)
    assert (
        one.form in ("a", "b")
        and one.hidden_size == 32
        and one.dtype == "float32"
        and one.special_ms > 0
        and one.plain_ms > 0
    )
    monkeypatch.setattr(special, "TABLE", tmp_path / "special.json")
    special.TABLE.write_text("[]")
    special.table.cache_clear()
    forwards.write([one])
    forwards.write([replace(one, hidden_size=64), replace(one, special_ms=7.5)])
    assert special.table() == (replace(one, special_ms=7.5), replace(one, hidden_size=64))
    special.table.cache_clear()

    def wrong(call, tokens, hidden, low_rank, label_logit, sums):
        plain_fold(call, tokens, hidden, low_rank, label_logit, sums)
        sums.lse[5, 1] += 0.01

    with pytest.raises(forwards.Differs, match=r"by 0\.01 on the small problem"):
        forwards.measure("fake", {"a": plain_fold, "b": wrong}, 32, torch.float32, device, **shape)


def test_targets_are_judged_by_ratios():
    from benchmarks.gpu.summary import targets

    def row(name, median, over, extra=None):
        return {"name": name, "median": median, "over unit": over, "extra_mib": extra}

    shape = {
        "N": 8192, "V": 128256, "H": 4096, "dtype": "bfloat16",
        "groups": {
            "forward": {"rows": [row("torch.mm", 10.0, 1.0), row("fastdpo", 12.0, 1.2)]},
            "step": {"rows": [row("two torch.mm", 20.0, 1.0), row("fastdpo routed", 24.0, 1.2, 100.0),
                              row("fastdpo exact", 60.0, 3.0, 200.0), row("eager", 50.0, 2.5), row("cce", 80.0, 4.0)]},
        },
    }  # fmt: skip
    met = {what.split(": ")[1]: value <= limit for what, value, limit in targets({"shapes": [shape]})}
    assert met == {
        "forward over torch.mm": False,
        "routed step over two torch.mm": True,
        "exact step over eager": False,
        "routed step over eager": True,
        "MiB beyond inputs and gradients, fastdpo routed": True,
        "MiB beyond inputs and gradients, fastdpo exact": False,
    }


def test_a_contender_that_fails_is_named_and_the_others_timed():
    from benchmarks.gpu.timing import interleaved
    from benchmarks.peers import Unavailable

    def absent():
        raise Unavailable("not installed")

    def broken():
        raise ValueError("bad shape")

    order = []
    timings, left_out = interleaved(
        {"a": lambda: order.append("a"), "absent": absent, "broken": broken, "b": lambda: order.append("b")},
        "cpu",
        rounds=4,
    )
    assert left_out == {"absent": "not installed", "broken": "ValueError: bad shape"}
    assert {name: timing.runs for name, timing in timings.items()} == {"a": 4, "b": 4}
    assert order[-8:] == ["a", "b"] * 4
    assert all(timing.low <= timing.median <= timing.high for timing in timings.values())


# The peers


def _agree_with_fp64(peers: dict, run, exact) -> set[str]:
    """The names of those that run here; `run(peer)` and `exact` are tensors. The others give a reason."""
    from benchmarks.peers import Unavailable

    ran = set()
    for name, peer in peers.items():
        try:
            mine = run(peer)
        except Unavailable as error:
            assert is_a_reason(str(error)), (name, error)
            continue
        ran.add(name)
        for x, e in zip(mine, exact):
            torch.testing.assert_close(x.double(), e, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    return ran


@pytest.fixture(params=["as written", pytest.param("compiled", marks=pytest.mark.slow)])
def peers_code(request):
    """What peers give to torch.compile, which takes half a minute, runs as it is written."""
    with torch.compiler.set_stance("force_eager" if request.param == "as written" else "default"):
        yield


def _peer_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(4, 16, 64, generator=g), torch.randn(384, 64, generator=g) / 4
    return hidden, weight, torch.randint(384, (4, 16), generator=g)


@pytest.mark.usefixtures("peers_code")
def test_every_peers_token_logps_agree_with_fp64_or_say_why():
    from benchmarks.peers import TOKEN_LOGPS, eager_logps

    hidden, weight, labels = _peer_inputs()
    coef = torch.linspace(-1, 1, labels.numel(), dtype=torch.float64)

    def run(logps, dtype=torch.float32):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden.flatten(0, 1), weight))
        out = logps(h, w, labels.flatten())
        return out.detach(), *torch.autograd.grad(out, (h, w), coef.to(out.dtype))

    def eager64(h, w, y):
        return (h @ w.T).log_softmax(-1).gather(1, y[:, None])[:, 0]

    ran = _agree_with_fp64(TOKEN_LOGPS, run, run(eager64, torch.float64))
    assert eager_logps in {TOKEN_LOGPS[name] for name in ran} and "fastdpo" in ran


def test_every_peers_selective_logps_agree_with_fp64_or_say_why():
    from benchmarks.peers import SELECTIVE_LOGPS

    hidden, weight, labels = _peer_inputs()
    logits = (hidden @ weight.T).flatten(0, 1)

    def run(logps, dtype=torch.float32):
        z = logits.to(dtype).requires_grad_()
        out = logps(z, labels.flatten())
        return out.detach(), torch.autograd.grad(out.sum(), z)[0]

    exact = run(lambda z, y: z.log_softmax(-1).gather(1, y[:, None])[:, 0], torch.float64)
    assert "torch" in _agree_with_fp64(SELECTIVE_LOGPS, run, exact)


@pytest.mark.usefixtures("peers_code")
def test_every_peers_step_agrees_with_fp64_or_says_why():
    from benchmarks.peers import BETA, OURS, PEERS, Problem

    hidden, weight, labels = _peer_inputs()
    labels[:, :5] = -100
    ref_hidden, ref_weight = hidden.flip(-1) / 2, weight * 0.5

    def problem(dtype) -> Problem:
        h, w, ref_h, ref_w = (x.to(dtype, copy=True) for x in (hidden, weight, ref_hidden, ref_weight))
        return Problem(h.requires_grad_(), w.requires_grad_(), labels, ref_h, ref_w)

    p = problem(torch.float64)
    logps = [
        ((h @ w.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(-1)
        for h, w in ((p.hidden, p.weight), (p.ref_hidden, p.ref_weight))
    ]
    chosen, rejected = (logps[0] - logps[1]).chunk(2)
    exact = p.gradients(-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean())
    assert {"eager", *OURS} <= _agree_with_fp64(PEERS, lambda step: step(problem(torch.float32)), exact)


@pytest.mark.parametrize("sort", [False, True])
def test_the_simulated_filter_drops_tiles_below_its_threshold(sort):
    from benchmarks.cpu.cce_filter import cce_filter_logps

    hidden, weight, labels = (x.flatten(0, -2) if x.ndim == 3 else x for x in _peer_inputs())
    hidden, labels = hidden.repeat(4, 1).requires_grad_(), labels.flatten().repeat(4)
    weight.requires_grad_()

    def gradients(eps):
        live = []
        return live, torch.autograd.grad(
            cce_filter_logps(hidden, weight, labels, eps, live, sort).sum(), (hidden, weight)
        )

    z = (hidden @ weight.T).log_softmax(-1)
    exact = torch.autograd.grad(z.gather(1, labels[:, None]).sum(), (hidden, weight))
    live, everything = gradients(0.0)
    assert live == [1.0]
    for x, e in zip(everything, exact):
        torch.testing.assert_close(x, e, rtol=1e-4, atol=1e-5)
    live, nothing = gradients(2.0)
    assert live == [0.0] and all((x == 0).all() for x in nothing)
    step = z.exp().detach() - torch.nn.functional.one_hot(labels, weight.shape[0])
    order = (hidden @ weight.T).mean(0).argsort() if sort else torch.arange(weight.shape[0])
    largest = step[:, order].abs().view(2, 128, 3, 128).amax((1, 3))
    live, _ = gradients(largest.flatten().sort().values[2].item())
    assert live[0] == pytest.approx(4 / 6)


def test_bias_and_noise_are_told_apart():
    from benchmarks.cpu.bias import moments

    exact = [torch.full((4, 4), 2.0, dtype=torch.float64), torch.full((3,), 1.0, dtype=torch.float64)]

    def draw(seed):
        return [exact[0] * 1.25 + (-1) ** seed * 0.5, exact[1].clone()]

    row = moments(draw, exact, 64)
    assert row["dhidden bias"] == pytest.approx(0.25) and row["dweight bias"] == 0.0
    assert row["dhidden noise"] == pytest.approx(0.25 * (64 / 63) ** 0.5) and row["dweight noise"] == 0.0
    assert row["dhidden standard error"] == pytest.approx(row["dhidden noise"] / 8)


def test_the_share_of_pairs_is_that_of_the_routing_rule():
    from benchmarks.cpu.bias import TAUS, shares
    from fastdpo.routing import BLOCK, num_blocks, route, unpack_bits

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=g) * 3, torch.randn(8 * BLOCK, 32, generator=g)
    labels = torch.randint(8 * BLOCK, (64,), generator=g)
    rest = (hidden @ weight.T).scatter(1, labels[:, None], -torch.inf)
    share = rest.softmax(-1).view(64, 8, BLOCK).sum(-1)
    found = shares(hidden, weight, labels)
    for tau in TAUS:
        kept = [
            unpack_bits(route(share, labels, (tau,), seed, torch.arange(64))[0], num_blocks(8 * BLOCK))
            for seed in range(400)
        ]
        assert found[tau] == pytest.approx(torch.stack(kept).float().mean().item(), abs=5e-3)
    assert found[min(TAUS)] - found[max(TAUS)] > 0.05


# What was measured


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    from benchmarks.gpu.measured import KERNELS

    copies = [tmp_path / file.name for file in KERNELS]
    for file, copy in zip(KERNELS, copies):
        copy.write_text(file.read_text())
    return copies


def edited(sources, old: str, new: str) -> set[str]:
    """The kernels whose digest an edit changes."""
    from benchmarks.gpu.measured import digests

    before = digests(sources)
    file = next(file for file in sources if old in file.read_text())
    text = file.read_text()
    file.write_text(text.replace(old, new, 1))
    after = digests(sources)
    return {kernel for kernel in before if before[kernel] != after[kernel]}


def test_an_edit_changes_the_digests_of_what_it_reaches(sources):
    every = {"fold", "exact", "routed_dz", "routed_dhidden", "routed_dweight", "finish", "compact", "list"}
    assert edited(sources, '"""', '""" ') == set()  # a docstring
    assert edited(sources, "@triton.jit", "# a comment\n@triton.jit") == set()
    assert edited(sources, 'float("nan")', "0.0") == {"exact"}
    assert edited(sources, '"fold": {', '"fold": {"other": {80: Tile(1, 1, 1, 1, 1)}, ') == {"fold"}
    reached = edited(sources, "0xFFFFE000", "0xFFFFF000")  # what start_products calls
    assert {"fold", "exact", "routed_dz"} <= reached and not reached & {"routed_dweight", "list", "finish"}
    assert edited(sources, '"dhidden": {', '"dhidden": {"other": {80: Tile(1, 1, 1, 1, 1)}, ') == {"exact"}
    newer = '("routed_dhidden", "half", 80): Tile(64'  # from a release of Triton on
    assert edited(sources, newer, newer.replace("64", "32")) == {"routed_dhidden"}
    assert every - {"routed_dz"} - edited(sources, "+ 0x7FFF", "+ 0x7FFE") < every


def test_an_edit_of_a_header_changes_the_digest_of_the_cuda_files_with_it(tmp_path):
    import shutil

    from benchmarks.gpu.measured import CUDA, digests

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    files = [tmp_path / "csrc" / "cuda" / file.name for file in CUDA]
    before = digests([], files)
    assert "csrc/cuda/logits.cu" in before
    header = tmp_path / "csrc" / "shared" / "logits_row.h"
    text = header.read_text()
    header.write_text("// a comment\n" + text)
    assert digests([], files) == before
    header.write_text(text.replace("kBatch = 16", "kBatch = 32"))
    assert digests([], files)["csrc/cuda/logits.cu"] != before["csrc/cuda/logits.cu"]


def test_what_changed_since_it_was_measured_is_listed():
    from benchmarks.gpu.measured import changed, line

    now = {"fold": "a", "dz": "b", "spread": "c"}
    old = {
        "date": "2026-01-01",
        "file": "old.json",
        "device": {"name": "NVIDIA H200"},
        "kernels": {"fold": "a", "dz": "x"},
    }
    assert changed([], now) == dict.fromkeys(now, "never measured")
    assert changed([old], now) == {"dz": "changed since 2026-01-01 (old.json)", "spread": "never measured"}
    assert "2026-01-01, NVIDIA H200" in line([old]) and "none yet" in line([])


def test_the_readme_says_when_a_gpu_was_last_used():
    done = run("-m", "benchmarks.gpu.measured", "--check")
    assert done.returncode == 0, done.stdout
