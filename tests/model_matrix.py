"""patch_model on every causal and image-text-to-text class of the installed transformers.

python tests/model_matrix.py [CLASS ...] [--json FILE]

Each class is built tiny with random weights and patched; per-token log-probs, and the gradients of all its
parameters, are compared with those through fp32 log_softmax of the model's own logits, in fp32 and bf16.
"exact": equal up to rounding. "refused": patch_model raised. "not built": no tiny model, and why.
"wrong": different, and not refused; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import warnings
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny_models
import torch
import transformers

from fastdpo import patch_model

# Largest error allowed: of a log-prob, relative to the largest logit (nats), and of a gradient, relative to the
# largest of its parameter. In bf16 the model's own logits are rounded, to 2^-9 of each, and fastdpo's are not.
NATS = {torch.float32: 5e-6, torch.bfloat16: 2**-7}
GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.15}
IGNORED = 4  # labels of the first row's first positions


def examine(class_name: str, model_type: str) -> dict:
    """One row of the table."""
    row = {"class": class_name, "config": model_type}
    try:
        model = tiny_models.build(class_name, model_type)
    except Exception as error:
        return row | {"verdict": "not built", "why": _line(error)}
    try:
        patched = patch_model(copy.deepcopy(model), backward="exact")
    except (TypeError, ValueError, NotImplementedError) as error:
        return row | {"verdict": "refused", "why": _line(error)}
    row["head"] = features(patched)
    wrong, failures = [], []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        twin = copy.deepcopy(model).to(dtype)
        inputs, labels = _inputs(twin)
        try:
            logits, expected, expected_grads = definition(twin, inputs, labels)
        except Exception as error:  # the class cannot be trained so, patched or not
            row[name] = {"why": _line(error)}
            failures.append(f"its own step fails in {name}: {row[name]['why']}")
            continue
        try:
            nats, gradient = differences(twin, inputs, labels, expected, expected_grads)
        except Exception as error:
            wrong.append(f"{name}: {_line(error)}")
            continue
        row[name] = {"nats": nats, "gradient": gradient}
        if not (nats <= NATS[dtype] * max(1.0, logits) and gradient <= GRADIENT[dtype]):
            wrong.append(f"{name}: off by {nats:.2g} nats, gradients by {gradient:.2g}")
    if wrong:
        return row | {"verdict": "wrong", "why": "; ".join(wrong)}
    if len(failures) == 2:
        return row | {"verdict": "not built", "why": failures[0]}
    return row | {"verdict": "exact"}


def _inputs(model):
    inputs = tiny_models.inputs(model)
    labels = inputs["input_ids"].clone()
    labels[0, :IGNORED] = -100
    return inputs, labels


def definition(model, inputs: dict, labels) -> tuple[float, torch.Tensor, dict]:
    """(largest logit, log-probs, gradients) through fp32 log_softmax of the model's own logits."""
    logits = model(**inputs).logits[:, :-1].float()
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    logps = logps.masked_fill(targets == -100, 0.0)
    return logits.abs().max().item(), logps.detach(), _gradients(model, logps)


def differences(model, inputs: dict, labels, expected, expected_grads: dict) -> tuple[float, float]:
    """Largest difference of a log-prob, in nats, and of a gradient, relative to the largest of its parameter."""
    patch_model(model, backward="exact")
    logps = model(**inputs, labels=labels, fastdpo=True).logps
    grads = _gradients(model, logps)
    if grads.keys() != expected_grads.keys():
        missing = sorted(expected_grads.keys() ^ grads.keys())
        raise ValueError(f"gradients of {', '.join(missing[:3])} come from one of the two ways only")
    # The floor: a gradient that is zero but for rounding (of a bias before a softmax) has no size of its own
    floor = 1e-3 * max(g.abs().max().item() for g in expected_grads.values())
    worst = max(
        (grads[name] - g).abs().max().item() / max(g.abs().max().item(), floor) for name, g in expected_grads.items()
    )
    return (logps - expected).abs().max().item(), worst


def _gradients(model, logps) -> dict:
    coef = torch.linspace(-1.0, 2.0, logps.numel()).view_as(logps)
    model.zero_grad()
    (logps * coef).sum().backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def features(model) -> list[str]:
    """What the head has beside a weight."""
    head, (scale, softcap, _) = model.get_output_embeddings(), model.forward.transform
    rows, vocab_size = head.weight.shape[0], getattr(model.config.get_text_config(), "vocab_size", None)
    found = {
        "bias": getattr(head, "bias", None) is not None,
        "tied": head.weight is model.get_input_embeddings().weight,
        f"scale {scale}": scale != 1.0,
        f"softcap {softcap}": softcap != 0.0,
        f"{rows} rows for {vocab_size} tokens": rows != vocab_size,
    }
    return [name for name, present in found.items() if present]


def _figures(found: dict) -> str:
    if "why" in found:
        return "own step fails"
    return f"{found['nats']:.1e} {found['gradient']:.1e}" if found else ""


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="default: all")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = []
    for class_name, model_type in tiny_models.mappings().items():
        if not args.classes or class_name in args.classes:
            rows.append(examine(class_name, model_type))
            gc.collect()
    title = f"transformers {transformers.__version__}, torch {torch.__version__}: nats, gradient"
    table = Table("class", "verdict", "head", "fp32", "bf16", title=title)
    for row in rows:
        figures = [_figures(row.get(name, {})) for name in ("float32", "bfloat16")]
        table.add_row(row["class"], row["verdict"], row.get("why", "") or ", ".join(row["head"]), *figures)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    counts = Counter(row["verdict"] for row in rows)
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.most_common()), f"of {len(rows)} classes")
    if args.json:
        result = {"transformers": transformers.__version__, "torch": torch.__version__, "counts": counts, "rows": rows}
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
