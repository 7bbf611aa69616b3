"""The tables of measurements in the documents of DOCUMENTS, from the committed results: no number is typed.

python -m benchmarks.report.tables            write them, between `<!-- table: NAME -->` and `<!-- end -->`
python -m benchmarks.report.tables --check    fail where a document says something else

Every table ends with its result files and the commands that made them. A table whose file is missing says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.report.frontier import candidates, frontier
from benchmarks.report.markdown import bold, error, not_measured, table
from benchmarks.report.processor import batches, folds, threads

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WITH_TABLES = ("README.md", "benchmarks/README.md", "docs/index.md", "docs/choose.md", "examples/frontier/README.md")
DOCUMENTS = tuple(ROOT / name for name in WITH_TABLES)
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


STEPS = {
    "eager": "eager logits",
    "trl compacted": "TRL's chunked function, given completion rows only",
    "trl as its trainer": "TRL's chunked function as its trainer calls it on a CPU (all rows, statistics)",
    "liger": "Liger `LigerFusedLinearDPOLoss`, not compiled",
    "cce torch_compile": "Cut Cross-Entropy's `torch_compile`, completion rows only",
    "torch linear_cross_entropy": "torch's `linear_cross_entropy`, completion rows only",
    "fastdpo exact": 'fastdpo, `backward="exact"`',
    "fastdpo routed": "fastdpo, routed",
    "two plain GEMMs (torch.mm)": "two plain `torch.mm` GEMMs, for scale",
    "two plain GEMMs (oneDNN)": "the same two by oneDNN",
    "two plain GEMMs (fastdpo's library)": "the same two by fastdpo's library",
}


def step(record: dict) -> list[str]:
    routed = next(row["median s"] for row in record["rows"] if row["step"] == "fastdpo routed")
    rows = []
    for row in sorted(record["rows"], key=lambda row: list(STEPS).index(row["step"]) if row["step"] in STEPS else 0):
        name, seconds, spread = STEPS.get(row["step"], row["step"]), row["median s"], row["spread s"]
        cells = [name, f"{seconds:.2f}", f"{spread:.2f}", f"{seconds / routed:.1f}"]
        rows.append(bold(cells, row["step"] == "fastdpo routed"))
    lines = table(["one DPO step on the head", "seconds", "spread", "times fastdpo routed"], rows)
    return lines + not_measured(record["notes"]["skipped"])


def tau(record: dict) -> list[str]:
    blocks, rows = record["notes"]["blocks"], []
    for row in record["rows"]:
        pairs = row["pairs per token"]
        cells = [row["path"], str(blocks) if pairs is None else f"{pairs:.1f}"]
        cells += [f"{row[name]:.2f}" for name in ("passes", "frozen")]
        cells += [error(row[f"{name} error"]) for name in ("dhidden", "dweight")]
        rows.append(bold(cells, row["path"] in record["notes"]["defaults"]))
    header = ["path", f"blocks per token, of {blocks}", "passes", "passes, frozen head"]
    return table(header + ["`dhidden` error", "`dweight` error"], rows)


def bias(record: dict) -> list[str]:
    """Bold: the routed defaults."""
    rows = []
    for row in record["rows"]:
        routed, power = row["path"] == "routed", f"2^{math.log2(row['threshold']):.0f}"
        default = not routed and row["threshold"] == record["notes"]["default filter"]
        name = f"routed, `tau` {power}" if routed else f"cce's filter, {power}{', its default' * default}"
        cells = [name, f"{100 * row['share']:.0f}%"]
        for gradient in ("dhidden", "dweight"):
            biased, noise = error(row[f"{gradient} bias"]), error(row[f"{gradient} noise"])
            known = f"{biased} ± {error(row[f'{gradient} standard error'])}"
            cells += [known, noise] if routed else [biased, "0"]
        rows.append(bold(cells, routed and row["threshold"] in record["notes"]["default tau"]))
    header = ["backward", "pairs computed", "`dhidden` bias", "noise", "`dweight` bias", "noise"]
    return table(header, rows)


def rules(record: dict) -> list[str]:
    keys = ("dhidden", "p > 0.99", "worst token", "dweight")
    rows = []
    for row in record["rows"]:
        worst = "" if row["alternating"] is None else error(row["alternating"])
        cells = [row["rule"], row["tau"], f"{row['pairs per token']:.1f}", *(error(row[key]) for key in keys), worst]
        rows.append(bold(cells, row["rule"] == "systematic" and row["tau"] in ("2^-9", "2^-10")))
    return table(["rule", "`tau`", "pairs per token", *keys, "alternating"], rows)


def memory(record: dict) -> list[str]:
    paths = list(dict.fromkeys(row["path"] for row in record["rows"]))
    found = {(row["N"], row["path"]): row for row in record["rows"]}

    def cell(row: dict | None) -> str:
        if row is None:
            return "not measured"
        return f"{row['MiB']:.0f}" if row["MiB"] is not None else row["failed"]

    logits = {row["N"]: row["logits alone, fp32 MiB"] for row in record["rows"]}
    rows = [[str(n), *(cell(found.get((n, path))) for path in paths), f"{logits[n]:.0f}"] for n in sorted(logits)]
    return table(["completion tokens", *(f"{path}, MiB" for path in paths), "the logits alone, fp32"], rows)


def accuracy(record: dict) -> list[str]:
    keys = ("sequence log-prob, nats", "dhidden", "dhidden, p(label) 0.99 to 1.0", "dhidden, worst token", "dweight")
    rows = []
    for row in record["rows"]:
        if row["inputs"] == "bfloat16":
            rows.append(bold([row["path"], *(error(row[key]) for key in keys)], row["path"].startswith("fastdpo")))
    return table(["bf16 inputs", *keys], rows) + not_measured(record["notes"]["left out"])


def training(record: dict, last: int = 50) -> list[str]:
    """Means over seeds of the mean of the last steps; the spread is the seeds' own, smallest to largest."""
    header = ["gradient of the head", "seeds", "loss", "margin", "accuracy", "entropy"]
    rows = []
    for path in dict.fromkeys(run["path"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["path"] == path]
        cells = [path, str(len(runs))]
        for name in ("loss", "margin", "accuracy", "entropy"):
            ends = [sum(run[name][-last:]) / len(run[name][-last:]) for run in runs]
            cells.append(f"{sum(ends) / len(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})")
        far = [run["distance"] for run in runs if "distance" in run]
        cells.append(f"{sum(far) / len(far):.3f}" if far else "0")
        rows.append([*cells, f"{sum(run['travelled'] for run in runs) / len(runs):.2f}"])
    return table([*header, "distance to exact", "travelled"], rows)


def sweep(record: dict, axis: str, title: str) -> list[str]:
    """Seconds and MiB of every path along one axis; the best of each row is bold."""
    rows = [row for row in record["rows"] if row["along"] == axis]
    paths = list(dict.fromkeys(row["path"] for row in rows))
    lines = []
    for value in dict.fromkeys(row[axis] for row in rows):
        at = {row["path"]: row for row in rows if row[axis] == value}
        for key, unit, text in (("seconds", "s", ".2f"), ("MiB", "MiB", ".0f")):
            known = [at[path][key] for path in paths if at[path][key] is not None]
            cells = [f"{value}, {unit}"]
            for path in paths:
                number = at[path][key]
                cell = (at[path]["failed"] or "not measured") if number is None else format(number, text)
                cells += bold([cell], number is not None and number == min(known))
            lines.append(cells)
    return table([title, *paths], lines)


def fits(record: dict) -> list[str]:
    sizes = list(dict.fromkeys(row["GiB"] for row in record["rows"]))
    found = {(row["path"], row["GiB"]): row for row in record["rows"]}
    rows = []
    for path in dict.fromkeys(row["path"] for row in record["rows"]):
        cells = [("at least " if row["at least"] else "") + f"{row['most tokens']}"
                 for row in (found[path, size] for size in sizes)]  # fmt: skip
        rows.append(bold([path, *cells], path == "fastdpo routed"))
    return table(["completion tokens that fit, measured", *(f"in {size:g} GiB" for size in sizes)], rows)


def context_model(record: dict) -> list[str]:
    sizes = [key for key in record["rows"][0] if key.endswith("GiB")]
    rows = [[row["path"], *(str(row[size]) for size in sizes), row["kept"]] for row in record["rows"]]
    header = ["completion tokens that fit, by the cost model", *(f"in {size}" for size in sizes)]
    return table([*header, "kept beside head, hidden states and their gradients"], rows)


def counts(record: dict) -> list[str]:
    given = record["inputs"]
    rows = []
    for title, counted in record["results"].items():
        if "passes" in counted:
            floor = f"{counted['floor over two products']:.2f}"
            rows.append([title, f"{counted['passes']:.2f}", str(counted["launches"]), floor])
    header = f"N = {given['tokens']}, V = {given['vocab']}, H = {given['hidden_size']}"
    return table([header, "passes", "launches", f"floor at {given['gpu']} rates, over two plain products"], rows)


PEERS = {  # as the README calls them: their names in step, sweep, accuracy and fits
    "eager logits": ("eager", "eager", "eager", "eager"),
    "TRL's chunked function": ("trl compacted", "trl compacted", "trl", "trl"),
    "Liger `LigerFusedLinearDPOLoss`": ("liger", "liger", "liger", "liger"),
    "torch 2.13 `linear_cross_entropy`": ("torch linear_cross_entropy",) * 4,
    "Cut Cross-Entropy's `torch_compile`": ("cce torch_compile",) * 4,
    'fastdpo, `backward="exact"`': ("fastdpo exact",) * 4,
    "fastdpo, routed": ("fastdpo routed",) * 4,
    "Cut Cross-Entropy's kernels": ("cce",) * 4,
    "Liger's scaled cross entropy": ("liger scaled ce",) * 4,
    "Unsloth": ("unsloth",) * 4,
    "verl": ("verl",) * 4,
    "Megatron": ("megatron",) * 4,
}


def summary(step: dict, sweep: dict, fits: dict, accuracy: dict) -> list[str]:
    """Every peer in a line; the best of each column is bold, whoever it is."""
    timed = {row["step"]: row["median s"] for row in step["rows"]}
    base = [row for row in sweep["rows"] if row["along"] == "frozen" and not row["frozen"]]
    memory = {row["path"]: row["MiB"] for row in base}
    size = min(row["GiB"] for row in fits["rows"])
    context = {row["path"]: row for row in fits["rows"] if row["GiB"] == size}
    exact = {row["path"]: row for row in accuracy["rows"] if row["inputs"] == "bfloat16"}
    columns = []
    keys = ("sequence log-prob, nats", "dhidden", "dhidden, p(label) 0.99 to 1.0", "dhidden, worst token", "dweight")
    for in_step, in_sweep, in_accuracy, in_fits in PEERS.values():
        most = context.get(in_fits)
        errors = [exact.get(in_accuracy, {}).get(key) for key in keys]
        columns.append([timed.get(in_step), memory.get(in_sweep), most and -most["most tokens"], *errors])
    best = [min(x for x in column if x is not None) for column in zip(*columns)]
    why = step["notes"]["skipped"] | accuracy["notes"]["left out"]

    def cell(column: int, value: float | None, path: tuple[str, ...]) -> str:
        if value is None:
            return "not measured"
        text = f"{value:.2f}" if column == 0 else f"{value:.0f}" if column == 1 else error(value)
        if column == 2:
            text = ("at least " if context[path[3]]["at least"] else "") + f"{-value}"
        return f"**{text}**" if value == best[column] else text

    rows = []
    for (name, path), values in zip(PEERS.items(), columns):
        if all(value is None for value in values):
            rows.append([name, f"not measured: {why.get(path[0], 'not among the results')}", *[""] * (len(values) - 1)])
        else:
            rows.append([name, *(cell(i, value, path) for i, value in enumerate(values))])
    header = ["", "step, s", "memory, MiB", f"tokens that fit in {size:g} GiB", "sequence log-prob error, nats"]
    return table(
        [*header, "error of `dhidden`", "where p(label) > 0.99", "of the worst token", "error of `dweight`"], rows
    )


DIVERGENCE_PATHS = {
    "eager": "eager logits",
    "bf16 logits": "logits rounded to bf16",
    "trl": "TRL's `ChunkedDivergenceFunction`",
    "liger": "Liger `LigerFusedLinearJSDLoss`, not compiled",
    "fastdpo exact": 'fastdpo, `backward="exact"`',
    "fastdpo routed": "fastdpo, routed",
}


def divergence(record: dict) -> list[str]:
    header = ["student", "kind", "path", "s", "in GEMMs of both heads", "memory, MiB", "error of the divergence"]
    header += ["of `dhidden`", "of sure tokens", "of the worst token", "of `dweight`"]
    used, rows = record["notes"]["memory, MiB"], []
    for row in record["rows"]:
        path, held = row["path"], used.get(row["path"])
        cells = [row["pair"], row["divergence of"], DIVERGENCE_PATHS[path], f"{row['median s']:.2f}"]
        cells += [f"{row['this / one GEMM of each head']:.1f}", "not measured" if held is None else f"{held:.0f}"]
        errors = ("divergence", "dhidden", "dhidden, sure", "dhidden, worst token", "dweight")
        rows.append(bold([*cells, *(error(row[name]) for name in errors)], path == "fastdpo routed"))
    return [*table(header, rows), *not_measured(record["notes"]["left out"])]


@dataclass(frozen=True)
class Source:
    """A table: `render` takes the records of `files`, each made by its command."""

    render: Callable[..., list[str]]
    files: tuple[str, ...]


COMMANDS = {  # result file -> what made it
    "2026-11-cpu-step.json": "benchmarks.cpu.step --head head.safetensors",
    "2026-11-cpu-step-bf16.json": "benchmarks.cpu.step --head head.safetensors --dtype bfloat16",
    "2026-11-cpu-sweep.json": "benchmarks.cpu.sweep --longest 100` and, of fastdpo alone, `--memory-again",
    "2026-11-cpu-fits.json": "benchmarks.cpu.memory --fits 2 4 --vocab 131072 --hidden-size 256",
    "2026-11-context-model.json": "tools.context",
    "2026-11-cpu-tau.json": "benchmarks.cpu.tau --head head.safetensors",
    "2026-11-cpu-bias.json": "benchmarks.cpu.bias --head head.safetensors",
    "2026-11-cpu-rules.json": "benchmarks.cpu.rules --head head.safetensors",
    "2026-11-cpu-memory.json": "benchmarks.cpu.memory --frozen",
    "2026-11-cpu-accuracy.json": "benchmarks.cpu.accuracy --head head.safetensors",
    "2026-11-cpu-batches.json": "benchmarks.cpu.batches --head head.safetensors",
    "2026-11-cpu-batches-bf16.json": "benchmarks.cpu.batches --head head.safetensors --dtype bfloat16",
    "2026-11-cpu-folds.json": "benchmarks.cpu.folds --rounds 15",
    "2026-11-cpu-threads.json": "benchmarks.cpu.threads --head head.safetensors",
    "2026-11-cpu-divergence.json": "benchmarks.cpu.divergence --head head.safetensors",
    "2026-11-training.json": "benchmarks.models.training",
    "2026-11-cpu-frontier.json": "examples.frontier",
    "2026-11-cpu-frontier-sweep.json": "examples.frontier --sweep",
    "2026-11-triton-counts.json": "tools.count_step --head head.safetensors",
}
AXES = {
    "tokens": "completion tokens",
    "vocab": "V",
    "hidden": "H",
    "prompt_share": "share of prompt tokens, of 4096",
    "frozen": "frozen head",
}
SOURCES = {
    "summary": Source(
        summary,
        ("2026-11-cpu-step.json", "2026-11-cpu-sweep.json", "2026-11-cpu-fits.json", "2026-11-cpu-accuracy.json"),
    ),
    "step": Source(step, ("2026-11-cpu-step.json",)),
    "step-bf16": Source(step, ("2026-11-cpu-step-bf16.json",)),
    "batches": Source(batches, ("2026-11-cpu-batches.json",)),
    "batches-bf16": Source(batches, ("2026-11-cpu-batches-bf16.json",)),
    "threads": Source(threads, ("2026-11-cpu-threads.json",)),
    "folds": Source(folds, ("2026-11-cpu-folds.json",)),
    **{
        f"sweep-{axis}": Source(partial(sweep, axis=axis, title=title), ("2026-11-cpu-sweep.json",))
        for axis, title in AXES.items()
    },
    "fits": Source(fits, ("2026-11-cpu-fits.json",)),
    "context-model": Source(context_model, ("2026-11-context-model.json",)),
    "tau": Source(tau, ("2026-11-cpu-tau.json",)),
    "rules": Source(rules, ("2026-11-cpu-rules.json",)),
    "bias": Source(bias, ("2026-11-cpu-bias.json",)),
    "memory": Source(memory, ("2026-11-cpu-memory.json",)),
    "accuracy": Source(accuracy, ("2026-11-cpu-accuracy.json",)),
    "divergence": Source(divergence, ("2026-11-cpu-divergence.json",)),
    "training": Source(training, ("2026-11-training.json",)),
    "frontier": Source(frontier, ("2026-11-cpu-frontier.json",)),
    "frontier-sweep": Source(candidates, ("2026-11-cpu-frontier-sweep.json",)),
    "counts": Source(counts, ("2026-11-triton-counts.json",)),
}


def where_and_when(record: dict) -> str:
    env = record["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    return f"{env['cpu']} ({env['capability']}), {env['threads']} threads, {versions}, {env['date']}"


def rendered(name: str, results: Path = RESULTS, beside: Path = ROOT) -> str:
    """The Markdown between the marks of table `name`, in a document in folder `beside`."""
    source = SOURCES[name]
    missing = [file for file in source.files if not (results / file).exists()]
    if missing:
        commands = ", ".join(f"`python -m {COMMANDS[file]}`" for file in missing)
        return f"\nNot measured yet: {commands}\n\n"
    records = [json.loads((results / file).read_text()) for file in source.files]
    folder = Path(os.path.relpath(RESULTS, beside)).as_posix()
    made = [f"[`{file}`]({folder}/{file}): `python -m {COMMANDS[file]}`" for file in source.files]
    places = dict.fromkeys(where_and_when(record) for record in records)
    return "\n".join(["", *source.render(*records), "", f"{', '.join(made)}. {'; '.join(places)}.", "", ""])


def filled(text: str, results: Path = RESULTS, beside: Path = ROOT) -> str:
    """`text` with every marked table as the results have it. Raises ValueError for a table nobody knows."""

    def replace(match: re.Match) -> str:
        if match[2] not in SOURCES:
            raise ValueError(f"a table {match[2]!r} is marked; known are {', '.join(SOURCES)}")
        return match[1] + rendered(match[2], results, beside) + match[3]

    return MARKED.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a document differs")
    args = parser.parse_args()
    for document in DOCUMENTS:
        text = document.read_text()
        wanted = filled(text, beside=document.parent)
        if args.check and wanted != text:
            sys.exit(f"{document}'s tables differ from benchmarks/results: run python -m benchmarks.report.tables")
        if not args.check:
            document.write_text(wanted)


if __name__ == "__main__":
    main()
