"""What lies where in a window of the expert exchange, and that ranks of several nodes agree on it: compiled here by a
plain C++ compiler."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(8, 8, 32, 48, 4, 512, 3000), (2, 1, 8, 700, 8, 256, 0), (8, 4, 8, 33, 2, 144, 0),
          (64, 8, 256, 100, 8, 7168, 0), (6, 2, 12, 1, 3, 16, 0), (4, 4, 12, 1, 3, 16, 1)]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("layout") / "ep_layout"
    source = ROOT / "tests/csrc/ep_layout.cpp"
    subprocess.run([compiler, "-std=c++20", "-Wall", "-Werror", f"-I{ROOT}/csrc", source, "-o", target], check=True)
    return target


def ask(program: Path, shape: tuple[int, ...]) -> dict[str, list[list[str]]]:
    printed = subprocess.run([program, *map(str, shape)], check=True, capture_output=True, text=True).stdout
    found: dict[str, list[list[str]]] = defaultdict(list)
    for kind, *fields in map(str.split, printed.splitlines()):
        found[kind].append(fields)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_ep_layout_keeps_areas_apart(program: Path, shape: tuple[int, ...]) -> None:
    areas = {name: (int(start), int(size)) for name, start, size in ask(program, shape)["area"]}
    _, window_bytes = areas.pop("window")
    assert window_bytes % 4096 == 0
    end = 0
    for start, size, name in sorted((*area, name) for name, area in areas.items()):
        assert start >= end
        assert start % 128 == 0
        assert size > 0 or (name.startswith("ro") and shape[6] == 0)
        end = start + size
    assert end <= window_bytes
    assert ("inbox" in areas) == (shape[0] > shape[1])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > shape[1]])
@pytest.mark.parametrize("kind", ["inbox", "outbox"])
def test_ep_layout_has_one_area_for_every_other_node(program: Path, shape: tuple[int, ...], kind: str) -> None:
    found = ask(program, shape)
    start, size = next((int(s), int(n)) for name, s, n in found["area"] if name == kind)
    others = shape[0] // shape[1] - 1
    taken = defaultdict(set)
    for rank, _, at in found[kind]:
        taken[rank].add(int(at))
    assert len(taken) == shape[0]
    for starts in taken.values():
        assert starts == {start + i * (size // others) for i in range(others)}


@pytest.mark.parametrize("shape", SHAPES)
def test_ep_layout_has_a_bit_for_every_choice(program: Path, shape: tuple[int, ...]) -> None:
    (words,) = ask(program, shape)["words"][0]
    max_tokens, top_k = shape[3], shape[4]
    assert int(words) * 32 >= max_tokens * top_k
    assert int(words) % top_k == 0  # 32 tokens fill whole words
