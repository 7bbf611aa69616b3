"""Which kernels changed since they were last measured on a GPU.

python -m benchmarks.gpu.measured [--check] [--keep FOLDER]

A result file of the GPU suite carries a digest of every kernel it ran: of a Triton kernel's code with all that it calls
and its tiles, of a CUDA file with the headers that it includes. `--check` fails where the README's line on the last run
is not what the newest result file says. `--keep` takes a folder that the suite wrote: its result becomes
benchmarks/results/<date>-<device>.json, its tables of measured kernels and tiles those of the library.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = sorted((ROOT / "fastdpo" / "ops" / "triton").glob("*.py"))
TABLES = ROOT / "fastdpo" / "ops" / "triton"
CUDA = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
README_LINE = re.compile(r"^\*\*Last GPU run:\*\* .*$", re.MULTILINE)


def digests(triton: list[Path] = KERNELS, cuda: list[Path] = CUDA) -> dict[str, str]:
    """Kernel, or CUDA file -> digest. Comments, docstrings and Python's layout do not count."""
    return {**_triton_digests(triton), **{f"csrc/cuda/{file.name}": _digest(_included(file)) for file in cuda}}


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _included(file: Path) -> list[str]:
    """The text of a source and of our headers in it, without comments."""
    texts, waiting = {}, [file]
    while waiting:
        current = waiting.pop()
        text = re.sub(r"//.*", "", current.read_text())
        texts[current.name] = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
        names = re.findall(r'#include "([^"]+)"', text)
        waiting += [file.parents[1] / name for name in names if Path(name).name not in texts]
    return [texts[name] for name in sorted(texts)]


TILES_OF = {"exact": ("dz", "dhidden", "dweight")}


def _triton_digests(files: list[Path]) -> dict[str, str]:
    functions: dict[str, ast.FunctionDef] = {}
    tiles: dict[str, str] = {}
    for file in files:
        tree = ast.parse(file.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                functions[node.name] = _without_docstring(node)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_TILES":
                tiles = {key.value: ast.dump(value) for key, value in zip(node.value.keys, node.value.values)}
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_SINCE":  # after _TILES
                for release, entries in zip(node.value.keys, node.value.values):
                    for key, value in zip(entries.keys, entries.values):
                        tiles[key.elts[0].value] += ast.dump(release) + ast.dump(key) + ast.dump(value)
    found = {}
    for name in functions:
        if not name.endswith("_kernel"):
            continue
        parts = [ast.dump(functions[used]) for used in sorted(_reached(name, functions))]
        name = name.removesuffix("_kernel")
        found[name] = _digest([*parts, *(tiles.get(key, "") for key in TILES_OF.get(name, (name,)))])
    return found


def _without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        function.body = function.body[1:]
    return function


def _reached(name: str, functions: dict[str, ast.FunctionDef]) -> set[str]:
    """`name` and every kernel function that it calls, however deep."""
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        reached.add(current)
        names = {node.id for node in ast.walk(functions[current]) if isinstance(node, ast.Name)}
        waiting += [other for other in names & functions.keys() if other not in reached]
    return reached


def results(folder: Path = RESULTS) -> list[dict]:
    """The GPU suite's result files, oldest first."""
    found = []
    for file in folder.glob("*.json"):
        record = json.loads(file.read_text())
        if isinstance(record, dict) and "kernels" in record and record.get("device"):
            found.append({**record, "file": file.name})
    return sorted(found, key=lambda record: record["date"])


def changed(runs: list[dict], now: dict[str, str]) -> dict[str, str]:
    """Kernel -> why it is not known at its present state: "never measured", or when its last measured state was run."""
    stale = {}
    for name, digest in now.items():
        last = next((run for run in reversed(runs) if name in run["kernels"]), None)
        if not any(run["kernels"].get(name) == digest for run in runs):
            stale[name] = "never measured" if last is None else f"changed since {last['date']} ({last['file']})"
    return stale


def line(runs: list[dict]) -> str:
    """As it stands in the README."""
    if not runs:
        return "**Last GPU run:** none yet."
    last = runs[-1]
    return f"**Last GPU run:** {last['date']}, {last['device']['name']} ([figures](benchmarks/results/{last['file']}))."


def keep(folder: Path, results: Path = RESULTS, tables: Path = TABLES) -> list[Path]:
    """The files that were written."""
    record = json.loads((folder / "result.json").read_text())
    if record["device"]["name"] == "none":
        raise ValueError(f"{folder} is of a dry run: nothing in it is a measurement")
    name = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    copies = {folder / "result.json": results / f"{record['date']}-{name}.json"}
    copies |= {folder / table: tables / table for table in ("special.json", "tuned.json")}
    copies = {source: target for source, target in copies.items() if source.exists()}
    for source, target in copies.items():
        shutil.copyfile(source, target)
    return list(copies.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    for file in keep(args.keep) if args.keep else ():
        print(f"written: {file.relative_to(ROOT)}")
    runs = results()
    stale = changed(runs, digests())
    print(line(runs))
    for name, why in stale.items():
        print(f"  {name:16} {why}")
    if not stale:
        print("  every kernel has been measured as it is now")
    stated = README_LINE.search((ROOT / "README.md").read_text())
    if args.check and (stated is None or stated.group(0) != line(runs)):
        print(f"README.md says {stated and stated.group(0)!r}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
