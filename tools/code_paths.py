"""What a persistent kernel issues for a tile beside its main loop: the way from the loop's end back to its beginning.

That way has branches. Counted is the cheapest on which a thread takes an exponential for each of its logits: that of a
tile that needs nothing special. A call counts as one instruction, and a wait as one that succeeds at once.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass

Instruction = tuple[int, str, str]  # address, mnemonic with all its parts, operands; a predicate begins the operands
State = tuple[int, int, bool]

EXPONENTIAL = "MUFU.EX2"
ENDS = {"EXIT", "RET", "BRX", "BRXU", "KILL", "BPT"}  # nothing goes on here


@dataclass(frozen=True)
class TilePath:
    """Instructions of one thread, by mnemonic."""

    epilogue: dict[str, int]  # from the main loop's end to the next tile
    start: dict[str, int]  # of a tile: its place, its accumulator, the first loads


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

    # By instruction, exponentials so far, and whether the jump back to the next tile is behind: how one came there.
    came_from: dict[State, State | None] = {}
    queue: list[tuple[int, State, State | None]] = []
    for index in inside:
        for after in following(index):
            if after not in inside:
                heapq.heappush(queue, (0, (after, 0, False), None))
    while queue:
        count, state, previous = heapq.heappop(queue)
        index, exponents, is_next = state
        if state in came_from:
            continue
        came_from[state] = previous
        if index in inside:
            if exponents >= exponentials:
                return _counted(code, came_from, previous)
            continue
        exponents = min(exponents + code[index][1].startswith(EXPONENTIAL), exponentials)
        for after in following(index):
            is_back = after <= index and exponents >= exponentials
            heapq.heappush(queue, (count + 1, (after, exponents, is_next or is_back), state))
    return None


def _counted(code: list[Instruction], came_from: dict[State, State | None], state: State | None) -> TilePath:
    epilogue, start = Counter(), Counter()
    while state is not None:
        index, _, is_next = state
        (start if is_next else epilogue)[code[index][1]] += 1
        state = came_from[state]
    return TilePath(dict(epilogue), dict(start))
