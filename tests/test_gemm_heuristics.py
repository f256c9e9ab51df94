"""The GEMM heuristics are a pure function: compiled here by a plain C++ compiler and asked about problems."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.shapes import GEMMS

ROOT = Path(__file__).resolve().parent.parent
NONE, ROWS, DEPTH = 0, 1, 2
SHARE_NONE, SHARE_B, SHARE_DEPTH = 0, 2, 3


@dataclass(frozen=True)
class Choice:
    tile: tuple[int, int]
    share: int
    band: int
    clocks: float
    alternatives: dict[tuple[int, int, int], float]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("heuristics") / "choose_gemm"
    sources = [ROOT / "tests/csrc/choose_gemm.cpp", ROOT / "csrc/gemm/heuristics.cpp"]
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Werror", f"-I{ROOT}/csrc", *sources, "-o", target], check=True)
    return target


def ask(program: Path, m: int, n: int, k: int, **options: int) -> Choice:
    values = {"groups": 1, "num_sms": 132, "row_scaled": 0, "grouping": NONE} | options
    arguments = [str(value) for value in (m, n, k, *values.values())]
    lines = subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()
    block_m, block_n, share, band, clocks = lines[0].split()
    alternatives = {}
    for line in lines[1:]:
        *key, cost = line.split()
        alternatives[int(key[0]), int(key[1]), int(key[2])] = float(cost)
    return Choice((int(block_m), int(block_n)), int(share), int(band), float(clocks), alternatives)


@pytest.mark.parametrize("shape", GEMMS, ids=str)
def test_choose_gemm_takes_the_cheapest_compiled_tile(program: Path, shape) -> None:  # type: ignore[no-untyped-def]
    choice = ask(program, shape.m, shape.n, shape.k)
    assert (*choice.tile, choice.share) in choice.alternatives
    assert choice.clocks == min(choice.alternatives.values())
    assert choice.band >= 1


def test_choose_gemm_never_shares_b_between_groups(program: Path) -> None:
    for groups in (1, 8, 256):
        assert ask(program, 4096, 4096, 7168, groups=groups, grouping=ROWS).share != SHARE_B


def test_choose_gemm_takes_the_measured_tile_of_a_weight_gradient(program: Path) -> None:
    """Also for 4096x7168, though the last of its 10 waves of 192x128 is a third full (docs/notes/gemm.md)."""
    for m, n in ((7168, 16384), (4096, 7168), (24576, 1536), (2112, 7168), (36864, 7168)):
        assert ask(program, m, n, 4096, row_scaled=1).tile == (192, 128)


def test_choose_gemm_makes_no_cluster_on_one_multiprocessor(program: Path) -> None:
    assert ask(program, 4096, 4096, 7168, num_sms=1).share == SHARE_NONE


def test_choose_gemm_fills_waves(program: Path) -> None:
    """512 columns of 4096 rows are 64 tiles of 256x128, half a wave: smaller tiles take all multiprocessors."""
    block_m, block_n = ask(program, 4096, 512, 32768).tile
    assert 66 < (4096 // block_m) * -(-512 // block_n) <= 132


def test_choose_gemm_splits_a_depth_only_where_every_tile_has_two_blocks(program: Path) -> None:
    for m, n, num_sms in ((4096, 512, 132), (4096, 512, 127), (64, 7168, 132), (64, 7168, 100), (4096, 4096, 132)):
        alternatives = ask(program, m, n, 16384, num_sms=num_sms).alternatives
        for block_m, block_n, share in alternatives:
            if share == SHARE_DEPTH:
                assert 2 * -(-m // block_m) * -(-n // block_n) <= num_sms
    assert ask(program, 64, 7168, 16384).share == SHARE_DEPTH  # as in decoding: 56 tiles alone
    assert ask(program, 64, 7168, 16384, num_sms=111).share != SHARE_DEPTH


def test_predicted_clocks_grow_with_the_problem(program: Path) -> None:
    base = ask(program, 4096, 4096, 4096).alternatives
    for larger in (ask(program, 8192, 4096, 4096), ask(program, 4096, 8192, 4096), ask(program, 4096, 4096, 8192)):
        assert all(larger.alternatives[key] > cost for key, cost in base.items())


def test_predicted_clocks_count_every_group(program: Path) -> None:
    one = ask(program, 4096, 4096, 4096, groups=1, grouping=DEPTH, row_scaled=1).alternatives
    four = ask(program, 4096, 4096, 4 * 4096, groups=4, grouping=DEPTH, row_scaled=1).alternatives
    assert all(3 < four[key] / one[key] < 5 for key in one)
