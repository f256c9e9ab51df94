"""Quantisation kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.types import empty_row_scales


def quantize_1x128(x_TD: Tensor, *, pow2_scales: bool, with_transpose: bool) -> list[Tensor]:
    """[data, scale] or [data, scale, data_t, scale_t], laid out as `dsv3rt.ops.quantize_1x128` says."""
    extension = load()
    num_rows, num_columns = x_TD.shape
    data = torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale = empty_row_scales(num_rows, -(-num_columns // 128), x_TD.device)
    if not with_transpose:
        extension.quantize_1x128(x_TD, data.view(torch.uint8), scale, pow2_scales=pow2_scales)
        return [data, scale]
    padded_rows = -(-num_rows // 128) * 128
    data_t = torch.empty((num_columns, padded_rows), dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_t = empty_row_scales(num_columns, padded_rows // 128, x_TD.device)
    extension.quantize_1x128(
        x_TD,
        data.view(torch.uint8),
        scale,
        data_t=data_t.view(torch.uint8),
        scale_t=scale_t,
        pow2_scales=pow2_scales,
    )
    return [data, scale, data_t, scale_t]
