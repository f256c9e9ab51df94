"""The exchange between nodes without a GPU: its kernels on the host against a network that delays and reorders, and the
test network that stands in for one on a GPU, driven as NCCL would."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parents[1])]
    return next(
        (Path(home) / "include" for home in homes if home and (Path(home) / "include/cuda_bf16.h").exists()), None
    )


def compiled(source: str, target: Path, *options: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    subprocess.run([compiler, "-O1", *options, ROOT / "tests/csrc" / source, "-o", target, "-lpthread"], check=True)
    return target


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = cuda_headers()
    if headers is None:
        pytest.skip("no headers of CUDA")
    target = tmp_path_factory.mktemp("emulate") / "emulate_ep"
    # The kernels' pragmas are nvcc's, and their `extern __shared__` arrays have no initialisers.
    options = ("-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-fno-extern-tls-init")
    includes = (f"-I{ROOT}/tests/csrc/emulated", f"-I{ROOT}/csrc", f"-isystem{headers}")
    return compiled("emulate_ep.cpp", target, *options, *includes)


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("drive") / "drive_loopback"
    return compiled("drive_loopback.cpp", target, "-std=c++17", "-Wall", "-Wextra", f"-I{ROOT}/tests",
                    f"-I{ROOT}/tests/csrc/no_cuda")  # fmt: skip


@pytest.mark.parametrize(
    "arguments",  # nodes, ranks of a node, experts, tokens, top k, columns, rounds, microseconds of delay, seed
    [(2, 1, 8, 60, 4, 32, 3, 20000, 3), (3, 2, 12, 70, 5, 32, 2, 20000, 3), (2, 4, 16, 20, 4, 256, 2, 200, 5),
     (4, 1, 8, 33, 3, 16, 2, 1000, 6), (1, 4, 8, 150, 7, 16, 2, 0, 6), (1, 2, 32, 60, 12, 272, 2, 0, 3),
     (1, 9, 18, 30, 4, 64, 1, 100, 8), (1, 3, 12, 300, 4, 16, 3, 0, 9)],
    ids=str,
)  # fmt: skip
def test_ep_kernels_give_everybodys_rows_and_sums(emulate: Path, arguments: tuple[int, ...]) -> None:
    ran = subprocess.run([emulate, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("delay_us", [0, 3000])
def test_loopback_delivers_all_and_lets_no_strong_signal_overtake(drive: Path, delay_us: int) -> None:
    environment = {**os.environ, "GIN_LOOPBACK_DELAY_US": str(delay_us), "GIN_LOOPBACK_SEED": "3"}
    ran = subprocess.run([drive, "12"], env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert any(map(int, ran.stdout.split())) == (delay_us > 0)
