"""FP8 GEMM kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.types import GroupLayout, QuantTensor


def fp8_gemm_nt(x: QuantTensor, w: QuantTensor, out: Tensor, *, accumulate: bool, num_sms: int) -> None:
    """Writes x @ w^T into `out`, or adds it to an FP32 `out`."""
    extension = load()
    if x.data.shape[1] == 0 and not accumulate:
        out.zero_()
        return
    extension.fp8_gemm_nt(*_bytes(x), *_bytes(w), out, accumulate=accumulate, num_sms=num_sms)


def m_grouped_fp8_gemm_nt(x: QuantTensor, w: QuantTensor, layout: GroupLayout, out: Tensor, *, num_sms: int) -> None:
    """Writes the true rows of every group; what padding rows of `out` hold afterwards is unspecified."""
    if x.data.shape[1] == 0:
        out.zero_()  # sums of nothing, for which no kernel is launched
        return
    load().m_grouped_fp8_gemm_nt(*_bytes(x), *_bytes(w), out, layout.counts_X, layout.offsets, num_sms=num_sms)


def k_grouped_fp8_gemm_nt(
    x: QuantTensor, y: QuantTensor, layout: GroupLayout, out: Tensor, *, accumulate: bool, num_sms: int
) -> None:
    """Writes every group's product to its slice of the FP32 `out`, or adds it."""
    load().k_grouped_fp8_gemm_nt(
        *_bytes(x), *_bytes(y), out, layout.counts_X, layout.offsets, accumulate=accumulate, num_sms=num_sms
    )


def _bytes(q: QuantTensor) -> tuple[Tensor, Tensor]:
    return q.data.view(torch.uint8), q.scale
