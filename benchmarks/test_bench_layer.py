"""What a pipeline's plan needs of one MoE layer: the times of F, I and W on one of 64 expert-parallel ranks."""

from __future__ import annotations

from functools import cache
from statistics import median
from typing import Any

import pytest

from benchmarks.conftest import record
from benchmarks.layer import PARTS, Part, SplitLayer
from benchmarks.slice_models import Slice, free
from benchmarks.timing import Case, Peer, figures
from dsv3rt.layers.precision import Precision

SHAPE = Slice(layers=1, experts=256, one_rank=True)


@cache
def measure(precision: Precision) -> dict[Part, list[float]]:
    found = SplitLayer(SHAPE, precision).sample()
    free()
    return found


@pytest.mark.parametrize("part", PARTS)
def test_bench_layer(request: pytest.FixtureRequest, benchmark: Any, part: Part) -> None:
    samples, peer_samples = measure("fp8")[part], measure("bf16")[part]
    case = Case(f"one MoE layer in FP8, {part}", str(SHAPE), "us")
    peer = Peer("dsv3rt_bf16", lambda: None)
    record(request, benchmark, samples, figures(case, median(samples), peer, median(peer_samples)))
