"""What the compiler makes of every Triton kernel, in every form the engine launches it, for four GPU architectures.

python -m tools.kernels [--arch 90 --kernel fold --dtype bf16 --problem exact] [--essential | --all] [--json FILE]
                        [--counts] [--revision REVISION]

No GPU is needed. Fails on registers spilled in a hot loop (or more than a few elsewhere), on a product without tensor
cores (or, in the large kernels, without the architecture's full-rate ones), on descriptors without TMA, and on too much
shared memory.

--counts prints instructions instead: of a step of the main loop, and of what surrounds it in kernels whose tiles are
logits (tools/code_paths.py says how the way of a common tile is found). --revision takes the kernels of another commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table

from fastdpo.costs.gpus import KIB, MULTIPROCESSORS
from tools.kernel_code import SPILL, TENSOR_CORE, TMA, Code, code_of, faults
from tools.kernel_variants import ARCHITECTURES, PROBLEMS, TYPES, Variant, variants

Result = tuple[Variant, Code | None, list[str]]  # with its faults; no code: it does not compile
TOGETHER = 8  # forms that a process compiles before it disassembles them


def examine(variants: list[Variant]) -> list[Result]:
    results: list[Result] = []
    for variant, code in zip(variants, code_of(variants)):
        if isinstance(code, Exception):
            results.append((variant, None, [f"does not compile: {str(code).strip().splitlines()[-1]}"]))
        else:
            results.append((variant, code, faults(variant, code)))
    return results


def together(wanted: list[Variant]) -> Iterator[list[Variant]]:
    """Parts of the list, the costly ones first, so that no process is left with one at the end."""
    costly_first = sorted(wanted, key=lambda one: (one.name != "exact", not one.compute))
    for first in range(0, len(costly_first), TOGETHER):
        yield costly_first[first : first + TOGETHER]


def table_of(capability: int, results: list[Result]) -> Table:
    """A line per kernel, type and tile: the worst of its forms."""
    table = Table(title=f"sm_{capability}, Triton {triton.__version__}", title_justify="left")
    for column in ("kernel", "type", "tile", "forms", "registers", "KiB shared", "programs / SM", "local",
                   "tensor core",
                   "TMA",
                   "LDGSTS 128", "RED"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("kernel", "type", "tile", "tensor core") else "right")
    groups: dict[tuple, list[tuple[Variant, Code]]] = {}
    for variant, code, _ in results:
        if code is not None:
            groups.setdefault((variant.name, variant.compute, variant.shape), []).append((variant, code))
    for (name, compute, shape), members in groups.items():
        codes = [code for _, code in members]
        tensor = {kind: n for code in codes for kind, n in code.tensor_core().items()}
        table.add_row(
            name, compute, shape, str(len(codes)),
            str(max(code.registers for code in codes)),
            f"{max(code.shared for code in codes) / KIB:.0f}",
            str(min(code.per_multiprocessor(capability) for code in codes)),
            str(max(code.spills for code in codes)),
            " ".join(f"{n} {kind}" for kind, n in tensor.items()),
            str(max(code.count(TMA) for code in codes)),
            str(max(code.count({"LDGSTS"}, "128") for code in codes)),
            str(max(code.count({"RED", "REDG", "ATOMG"}) for code in codes)),
        )  # fmt: skip
    return table


def counts_of(capability: int, results: list[Result]) -> Table:
    """A line per form of a kernel with a product: instructions of one thread; spills are loads from local memory, those
    on the way of a common tile first."""
    table = Table(title=f"sm_{capability}, Triton {triton.__version__}", title_justify="left")
    words, numbers = ("kernel", "type", "tile", "launched for"), ("per logit", "spills", "start of a tile", "main loop")
    for column in (*words, *numbers, "of it products", "registers", "all spills", "KiB shared"):
        table.add_column(column, justify="left" if column in words else "right")
    for variant, code, _ in results:
        if code is None or not code.main_loop:
            continue
        way = ("-", "-", "-")
        if code.path is not None:
            epilogue, start = sum(code.path.epilogue.values()), sum(code.path.start.values())
            spills = counted(code.path.epilogue, SPILL) + counted(code.path.start, SPILL)
            way = (f"{epilogue / code.logits:.2f}", str(spills), str(start))
        table.add_row(
            variant.name, variant.compute, variant.shape, variant.problems[0].split(": ")[1], *way,
            str(sum(code.main_loop.values())), str(counted(code.main_loop, TENSOR_CORE)), str(code.registers),
            str(code.spills), f"{code.shared / KIB:.0f}",
        )  # fmt: skip
    return table


def counted(instructions: Mapping[str, int], mnemonics: set[str]) -> int:
    return sum(n for name, n in instructions.items() if name.split(".")[0] in mnemonics)


def of_revision(revision: str, arguments: list[str]) -> int:
    """This tool with `arguments`, on fastdpo as it was committed there."""
    root = Path(__file__).parents[1]
    archive = subprocess.run(["git", "archive", revision, "fastdpo"], cwd=root, check=True, capture_output=True).stdout
    run = (
        "import sys; sys.path[:0] = sys.argv.pop(1), sys.argv.pop(1); from tools.kernels import main; sys.exit(main())"
    )
    with tempfile.TemporaryDirectory() as directory:
        tarfile.open(fileobj=BytesIO(archive)).extractall(directory, filter="data")
        return subprocess.run([sys.executable, "-c", run, directory, root, *arguments]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=MULTIPROCESSORS, help="default: 80, 90, 100, 120")
    parser.add_argument("--kernel", help="part of a kernel's name")
    parser.add_argument("--dtype", action="append", choices=TYPES, help="all by default")
    parser.add_argument("--all", action="store_true", help="every problem in every type, not in bf16 alone")
    parser.add_argument("--essential", action="store_true", help="few problems in bf16 too, unless --all")
    parser.add_argument("--json", type=Path, help="write every form's figures to this file")
    names = [problem.name for problem in PROBLEMS]
    parser.add_argument("--problem", action="append", choices=names, help="all by default")
    parser.add_argument("--counts", action="store_true", help="print instructions")
    parser.add_argument("--revision", help="a commit, whose kernels are compiled instead")
    args = parser.parse_args()
    if args.revision:
        return of_revision(args.revision, [*sys.argv[1:], "--revision", ""])
    essential = () if args.all else TYPES if args.essential else ("fp16", "fp32", "mixed")
    console, started = Console(width=170 if args.counts else 150), time.monotonic()
    forms: dict[int, list[Variant]] = {}
    for capability in args.arch or ARCHITECTURES:
        wanted = variants(capability, args.dtype or list(TYPES), args.kernel, essential=essential)
        if args.problem:
            wanted = [one for one in wanted if any(p.split(": ")[1] in args.problem for p in one.problems)]
        forms[capability] = wanted
    failed, figures = 0, []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        # one queue: no architecture waits for another's last form
        examined = pool.imap(examine, [some for wanted in forms.values() for some in together(wanted)])
        for capability, wanted in forms.items():
            of_key: dict[str, Result] = {}
            while len(of_key) < len(wanted):
                of_key |= {result[0].key: result for result in next(examined)}
                if sys.stderr.isatty():
                    print(f"\rsm_{capability}: {len(of_key)} of {len(wanted)}", end="", file=sys.stderr)
            results = [of_key[one.key] for one in wanted]
            console.print((counts_of if args.counts else table_of)(capability, results))
            bad = [(variant, found) for variant, _, found in results if found]
            for variant, found in bad:
                form = f"sm_{capability} {variant.name} {variant.compute} {variant.shape}"
                console.print(f"FAULT {form}: {'; '.join(found)}"
                              f" (launched for {variant.problems[0]})", markup=False)  # fmt: skip
            console.print(f"sm_{capability}: {len(results)} forms, {len(bad)} with faults\n")
            failed += len(bad)
            figures += [
                {"capability": capability, "kernel": v.name, "type": v.compute, "tile": v.shape,
                 "launched for": v.problems,
                 "faults": f, **({} if c is None else asdict(c))} for v, c, f in results
            ]  # fmt: skip
        pool.close()
        pool.join()  # before their time is counted
    took = f"{time.monotonic() - started:.0f} s, of a core {sum(os.times()[:4]):.0f} s"
    console.print(f"Triton {triton.__version__}: {len(figures)} forms, {failed} with faults, {took}\n")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if failed or not figures else 0  # nothing was checked where there is no form


if __name__ == "__main__":
    sys.exit(main())
