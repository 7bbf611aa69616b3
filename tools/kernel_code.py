"""A kernel's machine code: compiled ahead of time for an architecture, counted, and held against what it must be."""

from __future__ import annotations

import importlib
import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from fastdpo.costs.gpus import KIB, MULTIPROCESSORS, RESERVED_MEMORY
from tools.code_paths import Instruction, TilePath, tile_path
from tools.kernel_variants import OPTIONS, Variant
from tools.offsets import narrow, unused

REGISTERS = 65536  # given to warps 256 at a time
TENSOR_COLUMNS = 512  # of tensor memory, on sm_100
# SASS mnemonics, by their first part
TENSOR_CORE = {"HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA", "QGMMA", "UTCOMMA", "UTCMXQMMA"}
WARP_GROUP = {90: "HGMMA", 100: "UTCHMMA"}  # of these, the architecture's full rate
TMA = {"UTMALDG", "UTMASTG", "UBLKCP", "UTMAREDG"}
SPILL = {"LDL"}  # for sm_120 the compiler also stores zeros that nothing loads
FEW = 12  # spills that may stand outside of a hot loop, once in a tile: 12 of 1453 instructions of a fold at H = 576
SHARE = 0.75  # of the products of the loop with most: loops with fewer, as over a low-rank head's rank, stand beside it
LARGE = {"fold", "hopper_fold", "exact"}  # whose time is all product
OF_LOGITS = {"fold", "hopper_fold", "exact", "routed_dz"}  # with tiles of logits: an exponential each
OPERANDS = {"hidden", "weight", "ref_hidden", "ref_weight"}  # of products, as kernels call them
FOLDING = {"hopper_fold": 256}  # threads that share a tile, where others do not


@dataclass(frozen=True)
class Code:
    registers: int
    shared: int  # bytes
    threads: int
    tensor_columns: int  # of tensor memory
    has_dot: bool
    instructions: dict[str, int] = field(default_factory=dict)  # SASS mnemonics with all their parts
    hot_spills: int = 0  # loads from local memory in an innermost loop of those with most products
    hot_loops: int = 1
    # as `instructions`: one step of the main product, that of the logits where there are several
    main_loop: dict[str, int] = field(default_factory=dict)
    logits: int = 0  # of a tile, for one thread; 0: the kernel makes none
    narrow: tuple[str, ...] = ()  # arguments that may be moved by more than 32 bits hold, and are not by 64
    unused: tuple[str, ...] = ()  # tensors that are neither read nor written
    path: TilePath | None = None  # of a tile of logits that needs nothing special

    def count(self, mnemonics: set[str], *parts: str) -> int:
        """Instructions of these, with all of `parts` among their modifiers."""
        return sum(
            n
            for name, n in self.instructions.items()
            if name.split(".")[0] in mnemonics and set(parts) <= set(name.split("."))
        )

    def tensor_core(self) -> dict[str, int]:
        counts = {name: self.count({name}) for name in sorted(TENSOR_CORE)}
        return {name: n for name, n in counts.items() if n}

    @property
    def spills(self) -> int:
        """Loads from local memory, wherever they stand."""
        return self.count(SPILL)

    def per_multiprocessor(self, capability: int) -> int:
        """Programs that fit on one multiprocessor."""
        m = MULTIPROCESSORS[capability]
        warp_registers = -(-self.registers * 32 // 256) * 256
        limits = [
            m.programs,
            m.threads // self.threads,
            REGISTERS // (warp_registers * self.threads // 32),
            m.memory // (self.shared + RESERVED_MEMORY),
        ]
        if self.tensor_columns:
            limits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)


def compile_variant(variant: Variant):
    function = getattr(importlib.import_module(variant.module), variant.kernel)
    language = GluonASTSource if function.is_gluon() else ASTSource
    source = language(function, variant.signature, variant.constants, variant.attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", variant.capability, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages, **OPTIONS},
    )


def code_of(variants: list[Variant]) -> list[Code | Exception]:
    """Of forms for one architecture, together: the disassembler takes longer to start than to read a kernel. In the
    place of one that does not compile stands the compiler's error."""
    compiled: list = []
    for variant in variants:
        try:
            compiled.append(compile_variant(variant))
        except Exception as error:  # the compiler's own, of many types
            compiled.append(error)
    right = [one for one in compiled if not isinstance(one, Exception)]
    codes = iter(disassemble([one.asm["cubin"] for one in right], variants[0].capability))
    return [
        one if isinstance(one, Exception) else counted(variant, one, next(codes))
        for variant, one in zip(variants, compiled)
    ]


def counted(variant: Variant, compiled, code: list[Instruction]) -> Code:
    found = re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])
    threads = int(found.group(1)) if found else 32 * variant.warps
    loops = hot_loops(code)
    products = [sum(map(is_product, loop)) for loop in loops]
    hottest = [loop for loop, n in zip(loops, products) if n >= SHARE * max(products)]
    main, path = max(loops, key=lambda loop: sum(map(is_product, loop)), default=[]), None
    sharing = FOLDING.get(variant.name, threads)
    logits = variant.constant("BM") * variant.constant("BN") // sharing if variant.name in OF_LOGITS else 0
    if logits:
        paths = [(loop, tile_path(code, loop, logits)) for loop in loops if any(map(is_product, loop))]
        found = [(loop, one) for loop, one in paths if one is not None]
        main, path = min(found, key=lambda one: sum(one[1].epilogue.values()), default=(main, None))
    return Code(
        registers=registers(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        threads=threads,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        has_dot="tt.dot" in compiled.asm.get("ttir", ""),
        instructions=dict(Counter(mnemonic for _, mnemonic, _ in code)),
        hot_spills=sum(is_spill(mnemonic) for loop in hottest for _, mnemonic, _ in loop),
        hot_loops=len(loops),
        main_loop=dict(Counter(mnemonic for _, mnemonic, _ in main if any(map(is_product, main)))),
        logits=logits,
        narrow=tuple(sorted(narrow(compiled.asm["ttir"]))) if "ttir" in compiled.asm else (),
        unused=tuple(sorted(unused(compiled.asm["ttir"]))) if "ttir" in compiled.asm else (),
        path=path,
    )


def disassemble(cubins: list[bytes], capability: int) -> list[list[Instruction]]:
    """Addresses go on from kernel to kernel."""
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        listed = instructions(run_tool("nvdisasm", "--binary", f"SM{capability}", file.name)) if codes else []
    ends = [bisect_left(listed, (end,)) for end in accumulate(map(len, codes))]
    return [listed[first:last] for first, last in zip([0, *ends], ends)]


def machine_code(cubin: bytes) -> bytes:
    """The kernel's section of an ELF file of 64 bits."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    (code,) = (s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0]))
    return cubin[code[4] : code[4] + code[5]]


def registers(cubin: bytes) -> int:
    """Of a thread."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        return max(int(n) for n in re.findall(r"REG:(\d+)", run_tool("cuobjdump", "-res-usage", file.name)))


def instructions(listing: str) -> list[Instruction]:
    line = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;/]*)", re.MULTILINE)
    return [
        (int(address, 16), mnemonic, f"{predicate}{rest.strip()}")
        for address, predicate, mnemonic, rest in line.findall(listing)
    ]


def is_spill(mnemonic: str) -> bool:
    return mnemonic.split(".")[0] in SPILL


def is_product(instruction: Instruction) -> bool:
    return instruction[1].split(".")[0] in TENSOR_CORE


def hot_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops of those with a product, or of all where there is none.

    A loop reaches from a branch back to its target. Of two that overlap the shorter is the inner one: a rotated outer
    loop may begin within it.
    """
    spans = set()
    for address, mnemonic, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if mnemonic.split(".")[0] == "BRA" else None
        if target and int(target.group(1), 16) < address:
            spans.add((int(target.group(1), 16), address))
    bodies = {(first, last): [one for one in code if first <= one[0] <= last] for first, last in spans}
    with_product = {span for span in spans if any(map(is_product, bodies[span]))}
    innermost: list[tuple[int, int]] = []
    for first, last in sorted(with_product or spans, key=lambda span: span[1] - span[0]):
        if all(last < other_first or other_last < first for other_first, other_last in innermost):
            innermost.append((first, last))
    return [bodies[span] for span in innermost]


def run_tool(tool: str, *arguments) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def faults(variant: Variant, code: Code) -> list[str]:
    """What must not be, in words."""
    found = []
    capability, limit = variant.capability, MULTIPROCESSORS[variant.capability].block_memory
    half = variant.compute in ("bf16", "fp16")
    if code.shared > limit:
        found.append(f"{code.shared / KIB:.0f} KiB of shared memory; a program has {limit // KIB}")
    if code.tensor_columns > TENSOR_COLUMNS:
        found.append(f"{code.tensor_columns} columns of tensor memory; there are {TENSOR_COLUMNS}")
    if code.hot_spills:
        found.append(f"registers are spilled in a hot loop: {code.hot_spills} loads from local memory")
    if code.has_dot and OPERANDS.intersection(code.unused):
        unread = ", ".join(sorted(OPERANDS.intersection(code.unused)))
        found.append(f"without the product it is launched for: {unread} never read")
    if code.spills > FEW * max(1, code.hot_loops):
        found.append(f"registers are spilled: {code.spills} loads from local memory")
    if code.has_dot and not code.tensor_core():
        found.append("tl.dot without a tensor-core instruction")
    if (variant.constant("TMA") or variant.has_descriptors) and capability >= 90 and not code.count(TMA):
        found.append("no TMA instruction in a kernel launched with descriptors")
    full_rate = WARP_GROUP.get(capability)
    if full_rate and half and variant.name in LARGE and not code.count({full_rate}):
        found.append(f"no {full_rate}: products run at a fraction of the tensor cores' rate")
    return found
