"""Inputs of the benchmarks: hidden states, labels and a head with a trained model's statistics.

`--head FILE` takes a safetensors file with `hidden` [N, H], `weight` [V, H], `labels` [N]; without one a synthetic head
with a trained model's peaked, Zipf-weighted distributions is made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdpo import routing


@dataclass
class HeadInputs:
    name: str
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N] int64


def add_arguments(parser: argparse.ArgumentParser, default: str = "a synthetic head") -> None:
    parser.add_argument("--head", help=f"safetensors file with hidden, weight and labels (default: {default})")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")


def load(path: str | None, **synthetic) -> HeadInputs:
    if path is None:
        return synthetic_head(**synthetic)
    from safetensors.torch import load_file

    tensors = load_file(path)
    return HeadInputs(Path(path).name, tensors["hidden"], tensors["weight"], tensors["labels"].long())


# Per token, of the trained head that the committed CPU results were measured on (3-layer Llama, V = 32768, trained on
# 42 million tokens of documentation; 2048 rows, labels drawn from the model): capture_head.statistics. `synthetic_head`
# follows them; larger models have fewer live columns (0.02% of them above 2^-12 are reported for Gemma-2 2B).
TRAINED = {
    "entropy, mean": 1.885,
    "entropy, median": 1.627,
    "p(label), mean": 0.448,
    "share of p(label) > 0.9": 0.209,
    "logits above 2^-12": 71.8,
    "blocks above 2^-12": 31.3,
}
RANK = 256  # of the synthetic logits, as on that head


def synthetic_head(num_tokens=4096, vocab_size=32768, hidden_size=256, seed=0, device="cpu") -> HeadInputs:
    """A head with the statistics of TRAINED at any number of tokens, V and H >= 256; labels are drawn from it.

    Each hidden state points at a dozen Zipf-distributed weight rows, with geometrically falling strength and a
    sharpness of its own, over a shared direction that makes logits fall with the logarithm of the rank, by 1.2. A
    larger H holds the same logits, turned into more dimensions. The numbers were found by random search.
    """
    small = min(hidden_size, RANK)
    g = torch.Generator(device).manual_seed(seed)
    at = {"generator": g, "device": device}
    weight = torch.randn(vocab_size, small, **at) / small**0.5
    rank = torch.arange(1, vocab_size + 1, device=device).float()
    weight[:, 0] = (rank.log().mean() - rank.log()) / 8
    candidates = torch.multinomial(1.0 / rank, num_tokens * 12, True, generator=g).view(num_tokens, 12)
    sharpness = 6.7 * (0.65 + 0.35 * torch.rand(num_tokens, 1, **at))
    strength = sharpness * (0.7 + 0.3 * torch.rand(num_tokens, 12, **at)) * 0.8 ** torch.arange(12, device=device)
    hidden = torch.cat(
        [torch.einsum("nk,nkh->nh", s, weight[c]) for s, c in zip(strength.split(1024), candidates.split(1024))]
    )
    hidden[:, 0] = 8 * 1.2 * (1 + 0.1 * torch.rand(num_tokens, **at))
    labels = torch.cat([torch.multinomial((h @ weight.T).softmax(-1), 1, generator=g)[:, 0] for h in hidden.split(512)])
    head = HeadInputs("synthetic", hidden, weight, labels)
    return head if hidden_size == small else lifted(head, hidden_size)


def lifted(inputs: HeadInputs, hidden_size: int) -> HeadInputs:
    """The same logits at a larger H: both factors times one matrix with orthonormal rows."""
    small = inputs.hidden.shape[1]
    g = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(hidden_size, small, generator=g, dtype=torch.float64))
    q = q.T.float().to(inputs.hidden.device)
    return HeadInputs(inputs.name, inputs.hidden.float() @ q, inputs.weight.float() @ q, inputs.labels)


def repeated(inputs: HeadInputs, num_tokens: int) -> HeadInputs:
    """So many rows, again from the first where there are fewer; fp32."""
    rows = torch.arange(num_tokens) % len(inputs.labels)
    return HeadInputs(inputs.name, inputs.hidden[rows].float(), inputs.weight.float(), inputs.labels[rows])


def shares(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """fastdpo.routing.shares of a head's logits."""
    return routing.shares(hidden @ weight.T, labels)


def environment() -> dict:
    """What a reader needs beside a figure: machine, versions, date."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for module in ("fastdpo", "trl", "liger_kernel", "cut_cross_entropy", "transformers"):
        try:
            from importlib.metadata import version

            versions[module] = version(module.replace("_", "-"))
        except Exception:
            continue
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def report(output: Path | None, title: str, rows: list[dict], notes: dict) -> None:
    """Print the rows as a table, and keep everything as JSON when asked to."""
    env = environment()
    print(f"\n{title}\n{json.dumps(notes)}\n{json.dumps(env)}\n")
    columns = list(rows[0])
    cells = [[_text(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"title": title, "notes": notes, "environment": env, "rows": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
