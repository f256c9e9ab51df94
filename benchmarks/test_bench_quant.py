"""Quantisation against the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.peers import beside_copies, copy_beside
from benchmarks.shapes import ACTIVATIONS, EXPERTS, PRODUCTS, WEIGHTS, Batch, Matrix
from benchmarks.timing import Case, Peer
from dsv3rt import ops
from dsv3rt.ops.types import GroupLayout

Versus = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("with_transpose", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize(("shape", "peer"), beside_copies(ACTIVATIONS), ids=str)
def test_bench_quantize_1x128(
    versus: Versus, copy_peer: Peer, shape: Matrix, peer: str, with_transpose: bool, dtype: torch.dtype
) -> None:
    x = torch.randn((shape.rows, shape.columns), device="cuda").to(dtype)
    name = f"quantize_1x128 {'and transpose ' if with_transpose else ''}from {str(dtype).removeprefix('torch.')}"
    work = shape.quantize_bytes(element_bytes=dtype.itemsize, with_transpose=with_transpose)
    versus(
        Case(name, str(shape), "gbps", work),
        lambda: ops.quantize_1x128(x, with_transpose=with_transpose),
        copy_beside(peer, copy_peer, work),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("with_transpose", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize(("shape", "peer"), beside_copies(WEIGHTS), ids=str)
def test_bench_quantize_128x128(
    versus: Versus, copy_peer: Peer, shape: Matrix, peer: str, with_transpose: bool, dtype: torch.dtype
) -> None:
    w = torch.randn((shape.rows, shape.columns), device="cuda").to(dtype)
    name = f"quantize_128x128 {'and transpose ' if with_transpose else ''}from {str(dtype).removeprefix('torch.')}"
    work = shape.quantize_blocks_bytes(element_bytes=dtype.itemsize, with_transpose=with_transpose)
    versus(
        Case(name, str(shape), "gbps", work),
        lambda: ops.quantize_128x128(w, with_transpose=with_transpose),
        copy_beside(peer, copy_peer, work),
    )


@pytest.mark.parametrize(("shape", "peer"), beside_copies([*WEIGHTS, EXPERTS]), ids=str)
def test_bench_transpose_128x128(versus: Versus, copy_peer: Peer, shape: Matrix | Batch, peer: str) -> None:
    q = ops.quantize_128x128(torch.randn(shape.sizes, device="cuda").bfloat16())
    case = Case("transpose_128x128", str(shape), "gbps", 2 * q.data.numel())
    versus(case, lambda: ops.transpose_128x128(q), copy_beside(peer, copy_peer, case.work))


@pytest.mark.parametrize("shape", [*WEIGHTS, EXPERTS], ids=str)
def test_bench_transpose_128x128_beside_torch(versus: Versus, shape: Matrix | Batch) -> None:
    q = ops.quantize_128x128(torch.randn(shape.sizes, device="cuda").bfloat16())
    theirs = Peer("torch_eager", lambda: (q.data.mT.contiguous(), q.scale.mT.contiguous()))
    versus(Case("transpose_128x128", str(shape), "us"), lambda: ops.transpose_128x128(q), theirs)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("with_transpose", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize(("shape", "peer"), beside_copies(PRODUCTS), ids=str)
def test_bench_swiglu_quantize_1x128(
    versus: Versus, copy_peer: Peer, shape: Matrix, peer: str, with_transpose: bool, fp8: bool
) -> None:
    gate_up = torch.randn((shape.rows, 2 * shape.columns), device="cuda").bfloat16()
    x = ops.quantize_1x128(gate_up) if fp8 else gate_up
    name = f"swiglu_quantize_1x128 {'and transpose ' if with_transpose else ''}from {'fp8' if fp8 else 'bfloat16'}"
    work = shape.swiglu_bytes(fp8=fp8, with_transpose=with_transpose)
    versus(
        Case(name, str(shape), "gbps", work),
        lambda: ops.swiglu_quantize_1x128(x, with_transpose=with_transpose),
        copy_beside(peer, copy_peer, work),
    )


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("with_product", [False, True], ids=["gradients", "product"])
@pytest.mark.parametrize(("shape", "peer"), beside_copies(PRODUCTS), ids=str)
def test_bench_swiglu_backward_quantize_1x128(
    versus: Versus, copy_peer: Peer, shape: Matrix, peer: str, with_product: bool, fp8: bool
) -> None:
    gate_up = torch.randn((shape.rows, 2 * shape.columns), device="cuda").bfloat16()
    x = ops.quantize_1x128(gate_up) if fp8 else gate_up
    grad = torch.randn((shape.rows, shape.columns), device="cuda").bfloat16()
    name = f"swiglu_backward_quantize_1x128 {'and product ' if with_product else ''}from {'fp8' if fp8 else 'bfloat16'}"
    work = shape.swiglu_backward_bytes(fp8=fp8, with_product=with_product)
    versus(
        Case(name, str(shape), "gbps", work),
        lambda: ops.swiglu_backward_quantize_1x128(x, grad, with_product=with_product),
        copy_beside(peer, copy_peer, work),
    )


@pytest.mark.parametrize("op", ["quantize_1x128", "swiglu_quantize_1x128", "swiglu_backward_quantize_1x128"])
def test_bench_casts_of_grouped_rows(versus: Versus, copy_peer: Peer, op: str) -> None:
    """Thirty-two experts of about a thousand rows (no padding, which would not be read), every output there is."""
    counts = 128 * (7 + torch.arange(32, dtype=torch.int32) % 3)
    ends = counts.cumsum(0).int()
    layout = GroupLayout(counts.cuda(), torch.cat([torch.zeros(1, dtype=torch.int32), ends]).cuda())
    shape = Matrix(int(ends[-1]), 7168 if op == "quantize_1x128" else 2048)
    if op == "quantize_1x128":
        x = torch.randn((shape.rows, shape.columns), device="cuda").bfloat16()
        work = shape.quantize_bytes(with_transpose=True)
        versus(
            Case(f"{op} of groups", str(shape), "gbps", work),
            lambda: ops.quantize_1x128(x, layout=layout, with_transpose=True),
            copy_peer,
        )
        return
    x = torch.randn((shape.rows, 2 * shape.columns), device="cuda").bfloat16()
    if op == "swiglu_quantize_1x128":
        work = shape.swiglu_bytes(fp8=False, with_transpose=True)
        versus(
            Case(f"{op} of groups", str(shape), "gbps", work),
            lambda: ops.swiglu_quantize_1x128(x, layout=layout, with_transpose=True),
            copy_peer,
        )
        return
    grad = torch.randn((shape.rows, shape.columns), device="cuda").bfloat16()
    q = ops.quantize_1x128(x)
    work = shape.swiglu_backward_bytes(fp8=True, with_product=True)
    versus(
        Case(f"{op} of groups from fp8", str(shape), "gbps", work),
        lambda: ops.swiglu_backward_quantize_1x128(q, grad, layout=layout, with_product=True),
        copy_peer,
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
