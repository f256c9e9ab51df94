"""FP8 GEMMs against cuBLASLt's block scaling and torch's grouped GEMM."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import (
    GEMMS,
    K_GROUPED_GEMMS,
    M_GROUPED_GEMMS,
    MASKED_GEMMS,
    SMALL_GEMMS,
    WEIGHT_GRADIENTS,
    Gemm,
    GroupedGemm,
)
from benchmarks.timing import Case, Peer
from dsv3rt import ops
from dsv3rt.ops.types import GroupLayout, QuantTensor, empty_row_scales

Versus = Callable[..., dict[str, Any]]
FP8 = torch.float8_e4m3fn
KERNEL = "sm90_fp8_gemm_kernel"


def random_fp8(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 60).clamp(-448, 448).to(FP8)


def row_scaled(rows: int, columns: int) -> QuantTensor:
    scale = empty_row_scales(rows, columns // 128, torch.device("cuda"))
    scale.copy_(torch.rand(scale.shape, device="cuda") + 0.5)
    return QuantTensor(random_fp8(rows, columns), scale, (1, 128))


def block_scaled(*shape: int) -> QuantTensor:
    *groups, rows, columns = shape
    scale = torch.rand((*groups, -(-rows // 128), columns // 128), device="cuda") + 0.5
    return QuantTensor(random_fp8(*shape), scale, (128, 128))


def cublas_block(x: QuantTensor, w: QuantTensor) -> Peer:
    return Peer(
        "cublas_block",
        lambda: torch._scaled_mm(x.data, w.data.t(), x.scale, w.scale.t(), out_dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("shape", [*GEMMS, *SMALL_GEMMS], ids=str)
def test_bench_fp8_gemm_nt(versus: Versus, shape: Gemm) -> None:
    x, w = row_scaled(shape.m, shape.k), block_scaled(shape.n, shape.k)
    case = Case("fp8_gemm_nt", str(shape), "tflops", shape.flops)
    versus(case, lambda: ops.fp8_gemm_nt(x, w), cublas_block(x, w), kernel=KERNEL)


@pytest.mark.parametrize("shape", WEIGHT_GRADIENTS, ids=str)
def test_bench_weight_gradient(versus: Versus, shape: Gemm) -> None:
    """Ours adds into FP32 in place; the peer writes BF16 and does not accumulate."""
    x, y = row_scaled(shape.m, shape.k), row_scaled(shape.n, shape.k)
    out = torch.zeros((shape.m, shape.n), device="cuda")
    case = Case("fp8_gemm_nt, weight gradient", str(shape), "tflops", shape.flops)
    versus(case, lambda: ops.fp8_gemm_nt(x, y, accumulate_into=out), cublas_block(x, y), kernel=KERNEL)


def layout_of(shape: GroupedGemm) -> tuple[GroupLayout, Tensor, int]:
    """Segments of about `rows` rows, padded to 128: the layout, the padded ends, and all rows together."""
    spread = torch.linspace(0.9, 1.1, shape.groups)
    counts = (shape.rows * spread).round().int()
    ends = (counts + 127).div(128, rounding_mode="floor").mul(128).cumsum(0).int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), ends])
    return GroupLayout(counts.cuda(), offsets.cuda()), ends.cuda(), int(ends[-1])


@pytest.mark.parametrize("shape", M_GROUPED_GEMMS, ids=str)
def test_bench_m_grouped_fp8_gemm_nt(versus: Versus, shape: GroupedGemm) -> None:
    layout, ends, rows = layout_of(shape)
    x, w = row_scaled(rows, shape.k), block_scaled(shape.groups, shape.n, shape.k)
    scale_x, scale_w = torch.rand(rows, device="cuda"), torch.rand((shape.groups, shape.n), device="cuda")
    peer = Peer(
        "scaled_grouped_mm",
        lambda: torch._scaled_grouped_mm(
            x.data, w.data.transpose(1, 2), scale_x, scale_w, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    )
    work = 2.0 * rows * shape.n * shape.k
    versus(
        Case("m_grouped_fp8_gemm_nt", str(shape), "tflops", work),
        lambda: ops.m_grouped_fp8_gemm_nt(x, w, layout),
        peer,
        kernel=KERNEL,
    )


@pytest.mark.parametrize("shape", MASKED_GEMMS, ids=str)
def test_bench_masked_fp8_gemm_nt(versus: Versus, shape: GroupedGemm) -> None:
    """Decoding: each expert has room for 256 rows and fills some. The peer gets the rows packed without gaps."""
    capacity, generator = 256, torch.Generator().manual_seed(0)
    counts = torch.randint(shape.rows - 32, shape.rows + 33, (shape.groups,), dtype=torch.int32, generator=generator)
    layout = GroupLayout.of_capacity(counts.cuda(), capacity)
    x, w = row_scaled(shape.groups * capacity, shape.k), block_scaled(shape.groups, shape.n, shape.k)
    packed = random_fp8(int(counts.sum()), shape.k)
    ends = counts.cumsum(0).int().cuda()
    scale_x, scale_w = torch.rand(len(packed), device="cuda"), torch.rand((shape.groups, shape.n), device="cuda")
    peer = Peer(
        "scaled_grouped_mm",
        lambda: torch._scaled_grouped_mm(
            packed, w.data.transpose(1, 2), scale_x, scale_w, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    )
    case = Case("m_grouped_fp8_gemm_nt, masked", str(shape), "tflops", 2.0 * len(packed) * shape.n * shape.k)
    versus(case, lambda: ops.m_grouped_fp8_gemm_nt(x, w, layout), peer, kernel=KERNEL)


@pytest.mark.parametrize("shape", K_GROUPED_GEMMS, ids=str)
def test_bench_k_grouped_fp8_gemm_nt(versus: Versus, shape: GroupedGemm) -> None:
    """The peer is one cuBLASLt product a group, in BF16, without accumulation."""
    layout, _, depth = layout_of(shape)
    x, y = row_scaled(shape.n, depth), row_scaled(shape.k, depth)
    out = torch.zeros((shape.groups, shape.n, shape.k), device="cuda")
    offsets = layout.offsets.tolist()
    parts = [
        tuple(
            (q.data[:, start:end].contiguous(), q.scale[:, start // 128 : end // 128].t().contiguous().t())
            for q in (x, y)
        )
        for start, end in pairwise(offsets)
    ]

    def peer() -> None:
        for (a, scale_a), (b, scale_b) in parts:
            torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16)

    work = 2.0 * depth * shape.n * shape.k
    versus(
        Case("k_grouped_fp8_gemm_nt", str(shape), "tflops", work),
        lambda: ops.k_grouped_fp8_gemm_nt(x, y, layout, accumulate_into=out),
        Peer("cublas_block", peer),
        kernel=KERNEL,
    )
