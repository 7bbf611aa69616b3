"""What the compiler made of every CUDA kernel in the built extension, for each architecture that it holds.

python -m tools.cuda_kernels [--arch 90]

No GPU is needed. Fails on local memory, and where the logits are read or written in less than 16 bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastdpo.ops import native
from tools.kernel_code import Instruction, hot_loops, instructions, run_tool

LOCAL = {"LDL", "STL"}
TYPE_NAMES = {"f": "fp32", "8BFloat16": "bf16", "7Float16": "fp16"}  # as they are mangled
READS_ROWS = re.compile(r"logits_(forward|backward)")  # names of kernels that stream rows of logits
WRITES_ROWS = "logits_backward"  # and of those that write as much as they read


@dataclass(frozen=True)
class CudaKernel:
    name: str
    type: str
    registers: int
    shared: int  # bytes
    local: int  # bytes of stack and spills
    code: list[Instruction]

    @property
    def loops(self) -> list[list[Instruction]]:
        """The loops that read whole vectors."""
        return [loop for loop in hot_loops(self.code) if count(loop, {"LDG"}, "128")]

    @property
    def main_loop(self) -> list[Instruction]:
        return max(self.loops, key=lambda loop: count(loop, {"LDG"}, "128"), default=[])


def count(code: list[Instruction], names: set[str], part: str | None = None) -> int:
    split = [mnemonic.split(".") for _, mnemonic, _ in code]
    return sum(name in names and (part is None or part in parts) for name, *parts in split)


def kernels_in(listing: str, usage: str) -> Iterator[CudaKernel]:
    """From what `cuobjdump -sass` and `cuobjdump -res-usage` print."""
    figures = {
        name: dict(re.findall(r"(\w+):(\d+)", line))
        for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage)
    }
    for part in re.split(r"Function : ", listing)[1:]:
        mangled = part.split()[0]
        pattern = r"([a-z][a-z_]*_kernel)(?:I(?:NS_)?(f|\d[A-Za-z]+\d*)E?(Lb1E)?)?"
        name, kind, entropy = re.search(pattern, mangled).groups()
        used = {key: int(value) for key, value in figures[mangled].items()}
        local = used["STACK"] + used["LOCAL"]
        name += ", entropy" if entropy else ""
        yield CudaKernel(name, TYPE_NAMES.get(kind, ""), used["REG"], used["SHARED"], local, instructions(part))


def faults(kernel: CudaKernel) -> list[str]:
    """What must not be, in words."""
    found = []
    if kernel.local or count(kernel.code, LOCAL):
        found.append(f"local memory: {kernel.local} bytes, {count(kernel.code, LOCAL)} accesses")
    if not READS_ROWS.match(kernel.name):
        return found
    if not kernel.main_loop:
        found.append("no loop with 16-byte loads")
    elif WRITES_ROWS in kernel.name:
        loads, stores = (count(kernel.main_loop, {name}, "128") for name in ("LDG", "STG"))
        if loads != stores:
            found.append(f"{loads} loads but {stores} stores of 16 bytes in the hot loop")
    return found


def table_of(arch: int, kernels: list[CudaKernel]) -> Table:
    table = Table(title=f"sm_{arch}", title_justify="left")
    columns = ("kernel", "type", "registers", "bytes shared", "local", "LDG 128", "STG 128", "instructions / loop")
    for column in columns:
        table.add_column(column, justify="left" if column in ("kernel", "type") else "right")
    for kernel in kernels:
        loop = kernel.main_loop
        figures = (kernel.registers, kernel.shared, kernel.local, count(loop, {"LDG"}, "128"))
        table.add_row(kernel.name, kernel.type, *map(str, figures), str(count(loop, {"STG"}, "128")), str(len(loop)))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="all that were built by default")
    args = parser.parse_args()
    console = Console(width=150)
    built = native.build_info().get("cuda_archs", []) if native.available() else []
    if not built:
        console.print(f"no CUDA kernels to examine: {native.cuda_problem()}", markup=False)
        return 0
    failed = 0
    for arch in args.arch or built:
        if arch not in built:
            parser.error(f"--arch must be one of {built}; got {arch}")
        extension = Path(native.EXTENSION.__file__)
        listing, usage = (
            run_tool("cuobjdump", option, "-arch", f"sm_{arch}", extension) for option in ("-sass", "-res-usage")
        )
        found = list(kernels_in(listing, usage))
        found.sort(key=lambda kernel: (kernel.name, kernel.type))
        console.print(table_of(arch, found))
        bad = [(kernel, text) for kernel in found if (text := faults(kernel))]
        for kernel, text in bad:
            console.print(f"FAULT sm_{arch} {kernel.name} {kernel.type}: {'; '.join(text)}", markup=False)
        console.print(f"sm_{arch}: {len(found)} kernels, {len(bad)} with faults\n")
        failed += len(bad) or not found
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
