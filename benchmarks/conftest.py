"""Fixtures of the benchmarks, and the slim JSON that pytest-benchmark leaves behind.

A benchmark is a test with one call:

    def test_bench_quantize_1x128(versus, copy_peer, shape):
        x_TD = torch.randn(...)
        case = Case("quantize_1x128", str(shape), "gbps", shape.quantize_bytes())
        versus(case, lambda: ops.quantize_1x128(x_TD), copy_peer)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import provenance
from benchmarks.timing import Case, DeviceClock, Peer, Run, figures, kernel_seconds, sample_both
from benchmarks.timing import copy_peer as make_copy_peer

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-commit", default=None, help="commit to write into the results (default: asked of git)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a GPU and is timed by a device clock."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.benchmark(timer=DeviceClock()))
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def copy_peer() -> Peer:
    return make_copy_peer()


@pytest.fixture
def versus(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, Any]]:
    """`versus(case, ours, peer, reps=30)` measures both in turns and records the line of evidence.

    With `kernel`, a part of a kernel's name, the line also says what the profiler measures of it alone.
    """

    def measure(case: Case, ours: Run, peer: Peer, *, reps: int = 30, kernel: str = "") -> dict[str, Any]:
        samples, peer_samples = sample_both(ours, peer.run, reps=reps)
        line = figures(case, median(samples), peer, median(peer_samples))
        if kernel:
            line["kernel_value"] = round(case.value(kernel_seconds(ours, kernel)), 3)
        record(request, benchmark, samples, line)
        return line

    return measure


def record(request: pytest.FixtureRequest, benchmark: Any, samples: list[float], line: dict[str, Any]) -> None:
    """Hand the device times to pytest-benchmark by replaying them on its clock."""
    marker = request.node.get_closest_marker("benchmark")
    remaining = iter(samples)
    benchmark.pedantic(lambda: marker.kwargs["timer"].advance(next(remaining)), rounds=len(samples))
    benchmark.extra_info.update(line, commit=commit_of(request.config))


def commit_of(config: pytest.Config) -> str:
    return config.getoption("--bench-commit") or provenance.commit()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    arguments = [str(item) for item in config.invocation_params.args if not str(item).startswith("--benchmark-json")]
    machine_info.clear()
    machine_info.update(provenance.machine(), command=" ".join(["pytest", *arguments]))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info["id"] = commit_of(config)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep the statistics and the evidence; drop every single sample and the parameters, which the shape names."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        for key in ("options", "params", "param", "group"):
            entry.pop(key, None)
