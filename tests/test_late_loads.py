"""Which loads scripts/late_loads.py holds for being under way, in machine code that is made up here."""

from __future__ import annotations

from types import ModuleType

import pytest

import loose_modules

ARRIVE, LOAD = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8], RZ", "LDS.128 R4, [R2]"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loose_modules.load("scripts/late_loads.py")


def listing(*lines: tuple[str, int | None, tuple[int, ...]]) -> str:
    """lines: an instruction, the scoreboard that it sets, and those that it waits for; as `cuobjdump -sass` prints."""
    printed = ["\t\tFunction : kernel"]
    for i, (text, sets, waits) in enumerate(lines):
        control = (7 if sets is None else sets) << 5 | 7 << 8 | sum(1 << board for board in waits) << 11
        printed += [f"        /*{16 * i:04x}*/    {text} ;    /* 0x{i:016x} */", f"    /* 0x{control << 41:016x} */"]
    return "\n".join(printed)


def late(tool: ModuleType, *lines: tuple[str, int | None, tuple[int, ...]]) -> list[list[int]]:
    """Of each hand-back, the places of the loads that it may overtake."""
    (code,) = tool.parse(listing(*lines)).values()
    assert len(code) == len(lines)
    return [[load.address // 16 for load in loads] for _, loads in tool.hand_backs(code)]


def test_load_that_nobody_waited_for(tool: ModuleType) -> None:
    assert late(tool, (LOAD, 2, ()), ("FADD R1, R2, R3", None, (1,)), (ARRIVE, None, ())) == [[0]]


@pytest.mark.parametrize("user", ["FADD R1, R4, R5", "@P1 FADD R1, R4, R5", ARRIVE])
def test_load_that_is_waited_for(tool: ModuleType, user: str) -> None:
    *_, last = late(tool, (LOAD, 2, ()), (user, None, (2,)), ("@!P0 " + ARRIVE, None, ()))
    assert last == []


def test_load_without_a_scoreboard_returns_before_a_later_one(tool: ModuleType) -> None:
    loads = (LOAD, None, ()), ("LDS R9, [R3]", 0, ())
    assert late(tool, *loads, (ARRIVE, None, ())) == [[0, 1]]
    assert late(tool, *loads, ("FADD R1, R4, R9", None, (0,)), (ARRIVE, None, ())) == [[]]


def test_one_path_is_enough(tool: ModuleType) -> None:
    """A branch past the use; and a loop, whose first load is awaited and whose later ones are not."""
    skipping = (LOAD, 1, ()), ("@P0 BRA 0x30", None, ()), ("FADD R1, R4, R5", None, (1,)), (ARRIVE, None, ())
    assert late(tool, *skipping) == [[0]]
    loop = ((ARRIVE, None, ()), (LOAD, 1, ()), ("@P0 BRA 0x0", None, ()), ("EXIT", None, ()))
    assert late(tool, *loop) == [[1]]


def test_code_behind_a_jump_is_not_reached(tool: ModuleType) -> None:
    assert late(tool, (LOAD, 1, ()), ("BRA 0x30", None, ()), (ARRIVE, None, ()), ("EXIT", None, (1,))) == []


def test_depbar_waits_for_its_scoreboard(tool: ModuleType) -> None:
    assert late(tool, (LOAD, 3, ()), ("DEPBAR.LE SB3, 0x0", None, ()), (ARRIVE, None, ())) == [[]]
    assert late(tool, (LOAD, 3, ()), ("DEPBAR.LE SB2, 0x0", None, ()), (ARRIVE, None, ())) == [[0]]


def test_copies_into_shared_memory_are_hand_backs_too(tool: ModuleType) -> None:
    assert late(tool, ("LDSM.16.M88.4 R4, [R2]", 0, ()), ("UTMALDG.2D [UR8], [UR4]", None, ())) == [[0]]
