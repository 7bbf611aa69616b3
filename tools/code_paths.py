"""What a persistent kernel issues for a tile beside its main loop: the way from the loop's end back to its beginning.

That way has branches. Counted is the cheapest on which a thread takes an exponential for each of its logits: a tile that
needs nothing special goes it. A call counts as one instruction, and a wait as one that succeeds at once.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass

Instruction = tuple[int, str, str]  # address, mnemonic with all its parts, operands; a predicate begins the operands

EXPONENTIAL = "MUFU.EX2"
ENDS = {"EXIT", "RET", "BRX", "BRXU", "KILL", "BPT"}  # nothing goes on here


@dataclass(frozen=True)
class TilePath:
    """Instructions of one thread."""

    epilogue: int  # from the main loop's end to the next tile
    start: int  # of a tile: its place, its accumulator, the first loads
    exponentials: int


def is_conditional(operands: str) -> bool:
    return re.match(r"@!?U?P\w|!?U?P\d|~?!?UR", operands) is not None and not operands.startswith("@PT")


def tile_path(code: list[Instruction], loop: list[Instruction], exponentials: int) -> TilePath | None:
    """None where no way back has so many exponentials."""
    address_of = [address for address, _, _ in code]
    index_of = {address: index for index, address in enumerate(address_of)}
    inside = {index_of[address] for address, _, _ in loop}

    def following(index: int) -> list[int]:
        _, mnemonic, operands = code[index]
        name, conditional = mnemonic.split(".")[0], is_conditional(operands) or ".DIV" in mnemonic
        found = []
        if name in ("BRA", "JMP"):
            target = re.search(r"0x([0-9a-f]+)", operands)
            if target is not None and int(target.group(1), 16) in index_of:
                found.append(index_of[int(target.group(1), 16)])
        if (name not in ENDS and name not in ("BRA", "JMP")) or conditional:
            found.append(index + 1)
        return [one for one in found if one < len(code)]

    # (instructions, of them before the jump back to the next tile, exponentials), by instruction and exponentials
    queue: list[tuple[int, int, int, int, bool]] = []
    for index in inside:
        for after in following(index):
            if after not in inside:
                heapq.heappush(queue, (0, 0, after, 0, False))
    seen = set()
    while queue:
        count, before, index, exponents, is_back = heapq.heappop(queue)
        if index in inside:
            if exponents >= exponentials:
                return TilePath(before if is_back else count, count - before if is_back else 0, exponents)
            continue
        if (index, exponents, is_back) in seen:
            continue
        seen.add((index, exponents, is_back))
        exponents = min(exponents + code[index][1].startswith(EXPONENTIAL), exponentials)
        for after in following(index):
            back = not is_back and after <= index and exponents >= exponentials
            at = count + 1 if back else before
            heapq.heappush(queue, (count + 1, at, after, exponents, is_back or back))
    return None
