"""Helpers of several reference families."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3rt.ops.types import GroupLayout


def at_least_fp32(x: Tensor) -> Tensor:
    """FP32 arithmetic for BF16 and FP32 tensors; FP64 stays, so that gradcheck sees the same code."""
    return x if x.dtype == torch.float64 else x.float()


def segments(layout: GroupLayout) -> list[tuple[int, int, int]]:
    """(start, end of rows, end of padding) of every group; reads the layout on the host."""
    offsets = layout.offsets.tolist()
    counts = layout.counts_X.tolist()
    return [(offsets[g], offsets[g] + count, offsets[g + 1]) for g, count in enumerate(counts)]


def rows_with_data(layout: GroupLayout, num_rows: int) -> Tensor:
    """(num_rows,) bool: which rows of an expert-major buffer hold data. Nothing is read on the host."""
    row = torch.arange(num_rows, device=layout.offsets.device, dtype=torch.int32)
    group = torch.searchsorted(layout.offsets, row, right=True) - 1  # X for the rows past the last group
    return row < (layout.offsets + pad(layout.counts_X, (0, 1)))[group]
