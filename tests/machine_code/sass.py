"""A kernel's machine code: the path that an aligned thread takes through it, and what limits that path.

The path is the shortest one from the entry over the widest load and the widest store of global memory to an exit: the
branches for unaligned rows, single elements and masked rows are longer. A loop counts once. Of a kernel that walks
through its data, the path is that of one round.
"""

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

ALU = ("FMNMX", "FSETP", "FSEL", "SEL", "ISETP", "IADD3", "LOP3", "SHF", "LEA", "PRMT", "IMNMX", "VIADD", "P2R", "R2P")
END = -1  # the node behind every EXIT


class Instruction(NamedTuple):
    name: str  # such as LDG.E.128
    goes_on: bool  # may be followed by the next instruction although it branches or exits
    registers: list[int]  # in the order of the operands; of a load, the first is where it goes
    target: int | None  # the address that it may branch to


class Path(NamedTuple):
    instructions: int  # of a warp
    alu: int  # of them, those of the integer and comparison pipe, which takes a warp in two clocks
    special: int  # MUFU: exponentials, logarithms, reciprocals
    loaded: int  # bytes of a thread, by loads of the widest kind
    stored: int
    flight: int  # bytes of the widest batch of loads that are issued before the first of them is used


def kernels(text: str) -> dict[str, list[tuple[int, Instruction]]]:
    """Of the output of ``cuobjdump -sass``: each kernel's instructions with their addresses, by its mangled name."""
    functions = re.findall(r"Function : (\S+)\n((?:(?!\s*Function :).*\n)*)", text)
    return {name: instructions(body) for name, body in functions}


def instructions(text: str) -> list[tuple[int, Instruction]]:
    """Of disassembled code: its instructions with their addresses."""
    line = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?);")
    return [
        (int(address, 16), _instruction(opcode, predicate, operands))
        for address, predicate, opcode, operands in line.findall(text)
    ]


def _instruction(name: str, predicate: str, operands: str) -> Instruction:
    branches = name.startswith(("BRA", "CALL.REL")) and ".DIV" not in name
    address = re.search(r"0x([0-9a-f]+)\s*$", operands) if branches else None
    # what is called returns to the next instruction
    goes_on = bool(predicate) or name.startswith("CALL") or (branches and bool(re.search(r"!?U?P\d", operands)))
    registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
    return Instruction(name, goes_on, registers, int(address[1], 16) if address else None)


def width(name: str) -> int:
    """Bytes of a load or store."""
    bits = re.search(r"\.(256|128|64|[US]?16|[US]8)\b", name)
    return 4 if bits is None else int(bits[1].lstrip("US")) // 8


def path(
    code: Sequence[tuple[int, Instruction]],
    *,
    load: int | None = None,
    over: str | None = None,
    stores: int | None = 1,
    walks: bool = False,
) -> Path | None:
    """None for a kernel that loads or stores nothing in global memory.

    Where the shortest path is not the usual one: ``load``, the bytes of the loads that count, if they are not the
    widest; ``over``, an instruction that the path goes over between load and store; ``stores``, how many it goes over,
    None for as many as some path does. ``walks``: the path is the shortest round of a loop with the loads that count.
    """
    steps = [instruction for _, instruction in code]
    if walks:
        route = _round(code, load)
    else:
        counts = [stores] if stores is not None else range(len(_accesses(code, "STG", None)), 0, -1)
        routes = (_route(code, load, over, count) for count in counts)
        route = next((found for found in routes if found is not None), None)
    if route is None:
        return None
    taken = [steps[i] for i in route]
    loads, kept = ([width(step.name) for step in taken if step.name.startswith(kind)] for kind in ("LDG", "STG"))
    loaded = (load or max(loads)) * loads.count(load or max(loads))
    return Path(
        instructions=len(taken),
        alu=sum(step.name.split(".")[0] in ALU for step in taken),
        special=sum(step.name.startswith("MUFU") for step in taken),
        loaded=loaded,
        stored=max(kept) * kept.count(max(kept)) if kept else 0,
        flight=_flight([*taken, *taken] if walks else taken),
    )


def _round(code: Sequence[tuple[int, Instruction]], load: int | None) -> list[int] | None:
    """The places of the shortest way from one of the loads that count back to it."""
    next_of, found = _successors(code), []
    for start in _accesses(code, "LDG", load):
        before: dict[tuple[int, int], tuple[int, int] | None] = {(place, 0): None for place in next_of[start]}
        queue = deque(before)
        while queue and (start, 0) not in before:
            node = queue.popleft()
            for after in next_of[node[0]] if node[0] != END else ():
                if (after, 0) not in before:
                    before[after, 0] = node
                    queue.append((after, 0))
        if (start, 0) in before:
            found.append([*_back(before, (start, 0)), start])
    return min(found, key=len, default=None)


def _route(
    code: Sequence[tuple[int, Instruction]], load: int | None, over: str | None, stores: int
) -> list[int] | None:
    """The places of the shortest way from the entry over a load, ``over`` and the stores to an exit."""
    wanted = [_accesses(code, "LDG", load), *[_accesses(code, "STG", None)] * stores]
    if over is not None:
        wanted.insert(1, {i for i, (_, step) in enumerate(code) if step.name.startswith(over)})
    next_of = _successors(code)
    # a node is a place, and how many of ``wanted`` lie behind it
    before: dict[tuple[int, int], tuple[int, int] | None] = {(0, 0): None}
    queue = deque(before)
    while queue:
        node = queue.popleft()
        place, done = node
        if place == END:
            if done == len(wanted):
                return _back(before, node)
            continue
        if done < len(wanted) and place in wanted[done]:
            done += 1
        for after in next_of[place]:
            if (after, done) not in before:
                before[after, done] = node
                queue.append((after, done))
    return None


def _accesses(code: Sequence[tuple[int, Instruction]], kind: str, bytes_: int | None) -> set[int]:
    """The places of the accesses of so many bytes, or of the widest ones."""
    widths = {i: width(step.name) for i, (_, step) in enumerate(code) if step.name.startswith(kind)}
    return {i for i in widths if widths[i] == (bytes_ or max(widths.values()))}


def _successors(code: Sequence[tuple[int, Instruction]]) -> list[list[int]]:
    places = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (_, step) in enumerate(code):
        after = [places[step.target]] if step.target is not None and step.target in places else []
        if step.name == "EXIT":
            after = [END]
        if (step.goes_on or not after) and i + 1 < len(code):
            after.append(i + 1)
        found.append(after)
    return found


def _back(before: dict[tuple[int, int], tuple[int, int] | None], last: tuple[int, int]) -> list[int]:
    """The places that lead to ``last``, without it."""
    found, node = [], before[last]
    while node is not None:
        found.append(node[0])
        node = before[node]
    return found[::-1]


def _flight(taken: Sequence[Instruction]) -> int:
    most = now = 0
    waiting: set[int] = set()
    for step in taken:
        load = step.name.startswith("LDG")
        used = step.registers[1:] if load else step.registers
        if waiting & set(used):
            now, waiting = 0, set()
        if load:
            now += width(step.name)
            waiting |= {step.registers[0] + k for k in range(-(-width(step.name) // 4))}
            most = max(most, now)
    return most
