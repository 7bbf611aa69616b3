"""What was measured when: every result of benchmarks/results, the newest first, and how its main figures went.

python -m benchmarks.report.history     prints the page, which the documentation's site takes as it is

A result is named `<date>-<benchmark>.json`; those of one benchmark make a table, a line for each. Nothing is typed: a
new result is a new line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.tables import COMMANDS, RESULTS, error, table

NAMED = re.compile(r"(\d{4}-\d{2}(?:-\d{2})?)-(.+)\.json")
NO_GPU = (
    "None: nothing of fastdpo has been timed on a GPU. Figures of GPU kernels in these pages are counted or modelled."
)


def results(folder: Path = RESULTS) -> dict[str, list[tuple[str, str, dict]]]:
    """{benchmark: [(date, file name, record)]}, the newest first."""
    found: dict[str, list[tuple[str, str, dict]]] = {}
    for path in sorted(folder.glob("*.json")):
        match = NAMED.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not named <date>-<benchmark>.json")
        record = json.loads(path.read_text())
        date = record.get("environment", record).get("date", match[1])
        found.setdefault(match[2], []).append((date, path.name, record))
    return {name: sorted(of_one, key=lambda x: x[:2], reverse=True) for name, of_one in sorted(found.items())}


def machine(record: dict) -> str:
    """The processor or GPU, and the versions of what was compared."""
    if "device" in record:
        return record["device"]["name"]
    environment = record.get("environment", {})
    parts = [environment["cpu"], f"{environment['threads']} threads"] if environment else []
    versions = environment.get("versions") or {x: record[x] for x in ("torch", "transformers") if x in record}
    return ", ".join(parts + [f"{name} {version}" for name, version in versions.items()])


SHORT = {  # the results' names of a path -> a column
    "eager": "eager",
    "trl": "TRL",
    "trl compacted": "TRL",
    "liger": "Liger",
    "cce torch_compile": "Cut Cross-Entropy, compiled",
    "torch linear_cross_entropy": "torch",
    "fastdpo exact": "fastdpo, exact",
    "fastdpo routed": "fastdpo, routed",
}


def _columns(rows: list[dict], key: str, write: Callable[[dict], str]) -> dict[str, str]:
    by_name = {row[key]: row for row in rows}
    return {title: write(by_name[name]) for name, title in SHORT.items() if name in by_name}


def _step(record: dict) -> dict[str, str]:
    return _columns(record["rows"], "step", lambda row: f"{row['median s']:.2f}")


def _accuracy(record: dict) -> dict[str, str]:
    rows = [row for row in record["rows"] if row["inputs"] == "bfloat16"]
    return _columns(rows, "path", lambda row: error(row["dhidden"]))


def _fits(record: dict) -> dict[str, str]:
    rows = [row for row in record["rows"] if row["GiB"] == min(row["GiB"] for row in record["rows"])]
    return _columns(rows, "path", lambda row: ("at least " if row["at least"] else "") + str(row["most tokens"]))


def _memory(record: dict) -> dict[str, str]:
    rows = [row for row in record["rows"] if row["N"] == max(row["N"] for row in record["rows"])]
    return _columns(rows, "path", lambda row: f"{row['MiB']:.0f}" if row["MiB"] is not None else str(row["failed"]))


def _training(record: dict) -> dict[str, str]:
    def distance(path: str) -> str:
        far = [run["distance"] for run in record["runs"] if run["path"] == path]
        return f"{sum(far) / len(far):.3f}"

    return {"fastdpo, routed": distance("routed"), "bf16 logits": distance("trl bf16")}


def _matrix(record: dict) -> dict[str, str]:
    return {verdict: str(count) for verdict, count in sorted(record["counts"].items())}


MAIN = {  # benchmark -> what its main figures are, and they
    "cpu-step": ("Seconds.", _step),
    "cpu-accuracy": ("Relative L2 error of `dhidden`, bf16 inputs.", _accuracy),
    "cpu-fits": ("Completion tokens in the smallest memory that was tried.", _fits),
    "cpu-memory": ("MiB, at the most tokens that were tried.", _memory),
    "training": ("Distance of the parameters to the exact run's at the end, mean over seeds.", _training),
    "model-matrix": ("Classes of transformers.", _matrix),
}


TITLES = {"head-shares": "A head's shares of the tail, by block", "model-matrix": "Language models that were patched"}
TITLES |= {"triton-counts": "What one step launches on a GPU, counted"}


def title_of(name: str, records: list[tuple[str, str, dict]]) -> str:
    return next((record["title"] for *_, record in records if "title" in record), TITLES.get(name, name))


def of_benchmark(name: str, records: list[tuple[str, str, dict]]) -> list[str]:
    what, figures_of = MAIN[name]
    figures = [figures_of(record) for *_, record in records]
    columns = list(dict.fromkeys(title for found in figures for title in found))
    rows = []
    for (date, file, record), found in zip(records, figures):
        cells = [found.get(title, "") for title in columns]
        rows.append([f"[{date}](results/{file})", *cells, record.get("environment", {}).get("cpu", "")])
    return [f"## {title_of(name, records)}", "", what, "", *table(["date", *columns, "processor"], rows), ""]


def everything(found: dict[str, list[tuple[str, str, dict]]]) -> list[str]:
    rows = []
    for name, records in found.items():
        for date, file, record in records:
            made = f"`python -m {COMMANDS[file]}`" if file in COMMANDS else ""
            rows.append([date, f"[{title_of(name, records)}](results/{file})", made, machine(record)])
    rows.sort(key=lambda row: row[0], reverse=True)
    return ["## All results", "", *table(["date", "result", "made by", "machine, versions"], rows), ""]


def page(folder: Path = RESULTS) -> str:
    found = results(folder)
    on_gpus = [name for name, records in found.items() if any("device" in record for *_, record in records)]
    lines = [
        "# Benchmark history",
        "",
        "Every committed result, the newest first; what they mean is in [the tables](README.md). The machines differ",
        "from date to date, so compare within a line first: a line's peers and fastdpo ran on the same machine.",
        "",
        "## On a GPU",
        "",
        f"Measured: {', '.join(on_gpus)}." if on_gpus else NO_GPU,
        "",
    ]
    for name in MAIN:
        if name in found:
            lines += of_benchmark(name, found[name])
    return "\n".join([*lines, *everything(found)])


if __name__ == "__main__":
    print(page())
