"""The tiny cases that scripts/sanitize.sh looks at: near the references, and every kernel is among them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dsv3rt import ops
from tests.gpu.small_cases import cast_cases, gemm_cases, other_cases
from tests.gpu.small_cases_mla import mla_cases

ROOT = Path(__file__).resolve().parents[2]
CASES = {**gemm_cases(), **cast_cases(), **other_cases(), **mla_cases()}
KERNEL = re.compile(r"__global__[^;{]*?\b(\w+_kernel)\s*\(")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_small_case_is_near_its_reference(name: str) -> None:
    case = CASES[name]
    got, want = case.run("cuda"), case.run("cpu")
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.shape == other.shape, index
        assert one.dtype == other.dtype, index
        if case.near == 0 or not other.is_floating_point():
            assert torch.equal(one, other), index
        else:
            diff = ops.calc_diff(one, other)
            assert diff <= case.near, (index, diff)


def kernels_in_sources() -> set[str]:
    """All but the exchange's, which tests/gpu/run_ranks.py starts."""
    files = [file for file in (ROOT / "csrc").rglob("*.cuh") if file.parent.name != "comm"]
    return {name for file in files for name in KERNEL.findall(file.read_text())}


def rooms_of_the_script() -> set[str]:
    (line,) = re.findall(r"^rooms=\((.*?)\)", (ROOT / "scripts" / "sanitize.sh").read_text(), re.MULTILINE | re.DOTALL)
    return set(line.split())


def test_small_cases_are_each_in_a_room_of_the_script() -> None:
    """The script names rooms, of which no name may be a part of another case's."""
    rooms = rooms_of_the_script()
    assert {name.split("-")[0] for name in CASES} == rooms
    for room in rooms:
        assert all(name.startswith(f"{room}-") for name in CASES if room in name), room


@pytest.mark.gpu
def test_small_cases_launch_every_kernel() -> None:
    torch.ones(1, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for case in CASES.values():
            case.run("cuda")
        torch.cuda.synchronize()
    launched = " ".join({event.name for event in recorded.events()})
    missing = {name for name in kernels_in_sources() if not re.search(rf"\b{name}\b", launched)}
    assert not missing, missing


@pytest.mark.parametrize("name", CASES)
def test_small_case_repeats_itself_on_the_references(name: str) -> None:
    """So that a difference on a GPU is the GPU's; and nothing is compared that says nothing."""
    first, again = CASES[name].run("cpu"), CASES[name].run("cpu")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(not one.is_floating_point() or one.isfinite().all() for one in first)
    assert name.endswith("nothing") or all(one.any() for one in first)
