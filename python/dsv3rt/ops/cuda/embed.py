"""Kernels for rotary positions and the embedding's gradient; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.cuda.rows import aligned


def rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, inverse: bool) -> Tensor:
    """The turned x, contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _turn(aligned(x), y, cos_TR, sin_TR, inverse)
    return y


def rope_(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, inverse: bool) -> None:
    """x turned in place; its rows must start on 16 bytes."""
    _turn(x, x, cos_TR, sin_TR, inverse)


def _turn(x: Tensor, y: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> None:
    x_THR, y_THR = (t if t.dim() == 3 else t.unsqueeze(1) for t in (x, y))
    tables = (aligned(table.contiguous()) for table in (cos_TR, sin_TR))
    load().rope(x_THR, y_THR, *tables, inverse=inverse)


def embedding_backward(grad_TD: Tensor, tokens_T: Tensor, num_rows: int) -> Tensor:
    """The gradient of the whole table: every row is written, those without a token with zeros."""
    in_order_T, order_T = torch.sort(tokens_T.int(), stable=True)  # half as long as of 64 bits
    rows = torch.arange(num_rows + 1, dtype=torch.int32, device=tokens_T.device)
    offsets = torch.searchsorted(in_order_T, rows, out_int32=True)
    weight_grad = torch.empty((num_rows, grad_TD.shape[1]), dtype=grad_TD.dtype, device=grad_TD.device)
    load().embedding_backward(aligned(grad_TD), order_T, in_order_T, offsets, weight_grad)
    return weight_grad
