"""Which loads from shared memory may be under way where a kernel hands that memory back.

    python scripts/late_loads.py build/*/CMakeFiles/dsv3rt_*.dir/csrc/gemm/instances/*.o [--kernel PART] [--all]

An mbarrier arrival does not wait for them, and who writes next may come first (docs/architecture.md, Handing shared
memory back). Reads machine code for sm_90 by cuobjdump and nvdisasm, of the CUDA toolkit or of the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm; both on PATH. For each arrival, and for each load by the copy engine or
cp.async, which may write over what is still read, it names the loads that on some path nothing has waited for. Whether
that is an error depends on who writes there next: docs/notes/late_loads.md says it for each kernel.

An instruction's upper word says which of six scoreboards it sets and which it waits for. A load without one returns
before a later load of its warp does, so the later one's scoreboard tells of both.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"^\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
UPPER_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
LOAD = re.compile(r"^LDSM?\b")
HANDS_BACK = re.compile(r"^(SYNCS\.ARRIVE|UTMALDG|UBLKCP|LDGSTS)")
WAITS_FOR_ALL = re.compile(r"^DEPBAR\.LE SB(\d), 0x0\b")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """operation: without its predicate. sets: a scoreboard's number, or NO_SCOREBOARD. waits_for: a bit for each."""

    address: int
    operation: str
    is_predicated: bool
    sets: int
    waits_for: int

    @property
    def name(self) -> str:
        return self.operation.split()[0]


@dataclass(frozen=True)
class UnderWay:
    """A load, by its place in the code, and the scoreboard that will tell of it."""

    place: int
    scoreboard: int


State = frozenset[UnderWay]


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Functions of what `cuobjdump -sass` prints."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    begun: tuple[int, str] | None = None
    for line in listing.splitlines():
        if found := FUNCTION.match(line):
            code = functions.setdefault(found[1], [])
        elif found := INSTRUCTION.match(line):
            begun = int(found[1], 16), found[2]
        elif (found := UPPER_WORD.match(line)) and begun is not None:
            code.append(_decoded(*begun, int(found[1], 16)))
            begun = None
    return functions


def _decoded(address: int, text: str, upper_word: int) -> Instruction:
    control = upper_word >> 41
    predicate, operation = re.match(r"^(@\S+\s+)?(.*)$", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if (predicate or "").startswith("@!PT"):
        operation = text
    return Instruction(address, operation, predicate is not None, control >> 5 & 7, control >> 11 & 63)


def successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Of each instruction, the places that may follow it."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    found = []
    for place, instruction in enumerate(code):
        name, following = instruction.name, [place + 1]
        jumps = name.startswith(("BRA", "CALL", "JMP", "WARPSYNC.COLLECTIVE"))
        target = TARGET.search(instruction.operation) if jumps else None
        # "BRA.U.ANY 0x..." and "BRA P0, 0x..." may fall through as well.
        always = name in ("BRA", "JMP") and re.match(r"^\w+ 0x", instruction.operation) is not None
        leaves = name.startswith(("EXIT", "RET", "BRX", "KILL"))
        if not instruction.is_predicated and (always or leaves):
            following = []
        if target is not None and int(target[1], 16) in places:
            following.append(places[int(target[1], 16)])
        found.append([following_place for following_place in following if following_place < len(code)])
    return found


def _waited(state: State, instruction: Instruction) -> State:
    """What is still under way when the instruction is issued."""
    awaited = instruction.waits_for
    if found := WAITS_FOR_ALL.match(instruction.operation):
        awaited |= 1 << int(found[1])
    return frozenset(load for load in state if load.scoreboard == NO_SCOREBOARD or not awaited >> load.scoreboard & 1)


def _issued(state: State, place: int, instruction: Instruction) -> State:
    if not LOAD.match(instruction.operation):
        return state
    if instruction.sets != NO_SCOREBOARD:
        state = frozenset(
            UnderWay(load.place, instruction.sets) if load.scoreboard == NO_SCOREBOARD else load for load in state
        )
    return state | {UnderWay(place, instruction.sets)}


def under_way(code: Sequence[Instruction]) -> list[State | None]:
    """The loads that some path has under way at each instruction; None where no path comes."""
    following = successors(code)
    before: list[State | None] = [None] * len(code)
    if code:
        before[0] = frozenset()
    open_places = [0] if code else []
    while open_places:
        place = open_places.pop()
        reached = before[place]
        assert reached is not None
        after = _issued(_waited(reached, code[place]), place, code[place])
        for successor in following[place]:
            known = before[successor]
            merged = after if known is None else known | after
            if merged != known:
                before[successor] = merged
                open_places.append(successor)
    pairs = zip(before, code, strict=True)
    return [None if state is None else _waited(state, instruction) for state, instruction in pairs]


def hand_backs(code: Sequence[Instruction]) -> Iterator[tuple[Instruction, list[Instruction]]]:
    """Each with the loads that it may overtake."""
    for instruction, state in zip(code, under_way(code), strict=True):
        if HANDS_BACK.match(instruction.operation) and state is not None:
            yield instruction, [code[place] for place in sorted({load.place for load in state})]


def listing_of(path: Path) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None or shutil.which("nvdisasm") is None:
        raise SystemExit("late_loads: needs cuobjdump and nvdisasm on PATH")
    ran = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"late_loads: {path}: {ran.stderr.strip() or 'cuobjdump failed'}")
    return ran.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="objects, libraries or cubins")
    parser.add_argument("--kernel", default="", help="only those with this in their mangled name")
    parser.add_argument("--all", action="store_true", help="name hand-backs with nothing under way as well")
    options = parser.parse_args(argv)
    for path in options.files:
        for function, code in parse(listing_of(path)).items():
            if options.kernel not in function:
                continue
            found = list(hand_backs(code))
            late = [pair for pair in found if pair[1]]
            print(f"{function}: {len(found)} hand-backs, {len(late)} with loads under way")
            for instruction, loads in found if options.all else late:
                print(f"  {instruction.address:05x} {instruction.operation}")
                for load in loads:
                    print(f"      {load.address:05x} {load.operation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
