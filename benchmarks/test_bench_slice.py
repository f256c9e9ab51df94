"""A slice of the model, forward and backward, in FP8 against Hugging Face transformers in BF16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.conftest import record
from benchmarks.slice import CASES, measure, peers_of, print_line
from benchmarks.slice_models import free


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    free()
    yield
    free()


@pytest.mark.parametrize(
    ("case", "peer"), [(name, peer) for name, shape in CASES.items() for peer in peers_of(shape)], ids=str
)
def test_bench_slice(request: pytest.FixtureRequest, benchmark: Any, case: str, peer: str) -> None:
    line, samples = measure(CASES[case], peer)
    with request.getfixturevalue("capsys").disabled():
        print_line(line)
    record(request, benchmark, samples, line)
