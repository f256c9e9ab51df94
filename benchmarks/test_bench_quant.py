"""Quantisation against the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.shapes import ACTIVATIONS, Matrix
from benchmarks.timing import Case, Peer
from dsv3rt import ops

Versus = Callable[..., dict[str, Any]]
LARGE = [shape for shape in ACTIVATIONS if shape.rows * shape.columns >= 2**22] + [Matrix(16384, 7168)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("with_transpose", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_bench_quantize_1x128(
    versus: Versus, copy_peer: Peer, shape: Matrix, with_transpose: bool, dtype: torch.dtype
) -> None:
    x = torch.randn((shape.rows, shape.columns), device="cuda").to(dtype)
    name = f"quantize_1x128 {'and transpose ' if with_transpose else ''}from {str(dtype).removeprefix('torch.')}"
    work = shape.quantize_bytes(element_bytes=dtype.itemsize, with_transpose=with_transpose)
    versus(
        Case(name, str(shape), "gbps", work), lambda: ops.quantize_1x128(x, with_transpose=with_transpose), copy_peer
    )


def test_bench_quantize_1x128_on_cupy_arrays(versus: Versus, copy_peer: Peer) -> None:
    """The kernel alone, on arrays of another framework."""
    cupy = pytest.importorskip("cupy")
    extension = pytest.importorskip("dsv3rt._C")
    shape = Matrix(4096, 7168)
    x = cupy.random.default_rng(0).standard_normal((shape.rows, shape.columns), dtype=cupy.float32)
    data = cupy.empty(x.shape, dtype=cupy.uint8)
    scale = cupy.empty((shape.columns // 128, shape.rows), dtype=cupy.float32).T
    stream = torch.cuda.current_stream().cuda_stream
    case = Case("quantize_1x128 from float32, CuPy", str(shape), "gbps", shape.quantize_bytes(element_bytes=4))
    versus(case, lambda: extension.quantize_1x128(x, data, scale, stream=stream), copy_peer)
