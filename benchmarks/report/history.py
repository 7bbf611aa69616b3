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

from benchmarks.report.tables import COMMANDS, PEERS, RESULTS, STEPS, error, table

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


def _values(rows: list[dict], key: str, value: str, names: dict[str, str], write: Callable) -> dict[str, str]:
    by_name = {row[key]: row[value] for row in rows}
    return {title: write(by_name[name]) if name in by_name else "" for name, title in names.items()}


def _step(record: dict) -> dict[str, str]:
    names = ("eager", "trl compacted", "liger", "fastdpo exact", "fastdpo routed")
    return _values(record["rows"], "step", "median s", {x: f"{STEPS[x]}, s" for x in names}, "{:.2f}".format)


def _accuracy(record: dict) -> dict[str, str]:
    rows = [row for row in record["rows"] if row["inputs"] == "bfloat16"]
    names = {"eager": "eager: error of `dhidden`", "fastdpo exact": "exact", "fastdpo routed": "routed"}
    return _values(rows, "path", "dhidden", names, error)


def _fits(record: dict) -> dict[str, str]:
    size = min(row["GiB"] for row in record["rows"])
    rows = [
        row | {"said": ("at least " if row["at least"] else "") + str(row["most tokens"])} for row in record["rows"]
    ]
    names = {name: f"{title}, tokens in {size:g} GiB" for title, (*_, name) in PEERS.items()}
    held = {row["path"] for row in rows}
    names = {name: title for name, title in names.items() if name in held}
    return _values([row for row in rows if row["GiB"] == size], "path", "said", names, str)


def _memory(record: dict) -> dict[str, str]:
    most = max(row["N"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["N"] == most]
    names = {row["path"]: f"{row['path']}, MiB" for row in rows}
    return {"tokens": str(most)} | {
        title: str(row["failed"]) if row["MiB"] is None else f"{row['MiB']:.0f}"
        for row, title in zip(rows, names.values())
    }


def _training(record: dict) -> dict[str, str]:
    def distance(path: str) -> str:
        far = [run["distance"] for run in record["runs"] if run["path"] == path]
        return f"{sum(far) / len(far):.3f}"

    return {f"{path}: distance to the exact run": distance(path) for path in ("routed", "trl bf16")}


def _matrix(record: dict) -> dict[str, str]:
    return {f"classes {verdict}": str(count) for verdict, count in sorted(record["counts"].items())}


MAIN = {  # benchmark -> its main figures
    "cpu-step": _step,
    "cpu-accuracy": _accuracy,
    "cpu-fits": _fits,
    "cpu-memory": _memory,
    "training": _training,
    "model-matrix": _matrix,
}


TITLES = {"head-shares": "A head's shares of the tail, by block", "model-matrix": "Language models that were patched"}
TITLES |= {"triton-counts": "What one step launches on a GPU, counted"}


def title_of(name: str, records: list[tuple[str, str, dict]]) -> str:
    return next((record["title"] for *_, record in records if "title" in record), TITLES.get(name, name))


def of_benchmark(name: str, records: list[tuple[str, str, dict]]) -> list[str]:
    figures = [MAIN[name](record) for *_, record in records]
    columns = list(dict.fromkeys(title for found in figures for title in found))
    rows = []
    for (date, file, record), found in zip(records, figures):
        cells = [found.get(title, "") for title in columns]
        rows.append([f"[{date}](results/{file})", *cells, record.get("environment", {}).get("cpu", "")])
    return [f"## {title_of(name, records)}", "", *table(["date", *columns, "processor"], rows), ""]


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
