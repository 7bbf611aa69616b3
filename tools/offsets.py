"""Offsets that a kernel works out in 32 bits, read from its TTIR (Triton's own intermediate code).

A tensor of more than 2^31 elements needs 64. Sums of a program's ranges and of multiples of a tile's size stay within
one dimension of a tensor; a product with an argument, that is a stride, does not.
"""

from __future__ import annotations

import re

LIMIT = (1 << 31) - 1
_VALUE = r"%[\w.]+(?:#\d+)?"
_DEFINITION = re.compile(r"\s*(%[\w.]+)(?::\d+)? = \"?([\w.]+)\"?(.*?)(?: loc\(.*)?$")
_CARRIED = re.compile(rf"({_VALUE}) = ({_VALUE})")
_BOUNDED = {
    "arith.divsi",
    "arith.remsi",
    "arith.divui",
    "arith.remui",
    "arith.cmpi",
    "tt.load",
    "arith.extsi",
}  # smaller


def _definitions(ttir: str) -> dict[str, tuple[str, list[str], str]]:
    """Value -> (operation, operands, the rest of its line). What a region yields is an operand of its operation."""
    defined: dict[str, tuple[str, list[str], str]] = {}
    regions: list[str | None] = []
    for line in ttir.splitlines():
        found = _DEFINITION.match(line)
        if found:
            name, operation, rest = found.groups()
            operands = re.findall(_VALUE, rest.split(" : ")[0])
            defined[name] = operation, [one.split("#")[0] for one in operands], rest
            for inner, outer in _CARRIED.findall(rest):
                defined[inner] = "carried", [outer.split("#")[0]], ""
        elif "scf.yield" in line and regions and regions[-1] is not None:
            operands = re.findall(_VALUE, line.split(" : ")[0])
            defined[regions[-1]][1].extend(one.split("#")[0] for one in operands)
        closed = regions.pop() if line.lstrip().startswith("}") and regions else None
        if re.search(r"{\s*(loc\(.*)?$", line):
            regions.append(found.group(1) if found else closed)  # closed: before its `else` or `do`
    return defined


def unused(ttir: str) -> set[str]:
    """Tensors that a kernel is given, by name, and neither reads nor writes."""
    head, _, body = ttir[ttir.index("tt.func public") :].partition("\n")
    tensors = re.findall(r"(%[\w.]+): !tt\.(?:ptr|tensordesc)", head)
    used = set(re.findall(r"%[\w.]+", body))
    return {name.removeprefix("%") for name in tensors if name not in used}


def narrow(ttir: str) -> set[str]:
    """Pointer arguments, by name, that are somewhere moved by a 32-bit product with an argument."""
    head = ttir[ttir.index("tt.func public") :].split("\n", 1)[0]
    pointers = set(re.findall(r"(%[\w.]+): !tt.ptr", head))
    numbers = set(re.findall(r"(%[\w.]+): i\d+", head))
    defined = _definitions(ttir)

    def sources(name: str) -> set[str]:
        """Arguments that a pointer comes from."""
        found, waiting, seen = set(), [name], set()
        while waiting:
            one = waiting.pop()
            if one in pointers:
                found.add(one)
            elif one in defined and one not in seen:
                seen.add(one)
                operation, operands, _ = defined[one]
                waiting += operands[:1] if operation == "tt.addptr" else operands
        return found

    def comes_from_number(name: str) -> bool:
        waiting, seen = [name], set()
        while waiting:
            one = waiting.pop()
            if one in numbers:
                return True
            if one in defined and one not in seen:
                seen.add(one)
                operation, operands, _ = defined[one]
                waiting += [] if operation in _BOUNDED else operands
        return False

    def is_narrow(name: str) -> bool:
        waiting, seen = [name], set()
        while waiting:
            one = waiting.pop()
            if one not in defined or one in seen:
                continue
            seen.add(one)
            operation, operands, rest = defined[one]
            if operation == "arith.muli" and re.search(r"i32>?\s*$", rest) and any(map(comes_from_number, operands)):
                return True
            waiting += [] if operation in _BOUNDED else operands
        return False

    found = set()
    for operation, operands, rest in defined.values():
        if operation == "tt.addptr" and re.search(r"i32>?\s*$", rest) and is_narrow(operands[1]):
            found |= sources(operands[0])
    return {name.removeprefix("%") for name in found}
