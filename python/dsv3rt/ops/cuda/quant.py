"""Quantisation kernels on torch tensors; arguments were checked by `dsv3rt.ops`.

Results are lists of tensors as the registered ops return them; layouts are those that `dsv3rt.ops` documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.reference.quant import empty_1x128, empty_128x128
from dsv3rt.ops.types import TILE

Groups = tuple[Tensor | None, Tensor | None]  # counts and offsets of a GroupLayout


def quantize_1x128(
    x_TD: Tensor, groups: Groups, rows_P: Tensor | None, *, pow2_scales: bool, with_transpose: bool
) -> list[Tensor]:
    """[data, scale] or [data, scale, data_t, scale_t]."""
    num_rows = (x_TD if rows_P is None else rows_P).shape[0]
    results = empty_1x128(x_TD, (num_rows, x_TD.shape[1]), by_rows=True, by_columns=with_transpose)
    data, scale, *transposed = as_bytes(results)
    data_t, scale_t = transposed or (None, None)
    load().quantize_1x128(
        x_TD,
        data,
        scale,
        data_t=data_t,
        scale_t=scale_t,
        counts=groups[0],
        offsets=groups[1],
        rows=rows_P,
        pow2_scales=pow2_scales,
    )
    return results


def quantize_128x128(w: Tensor, *, pow2_scales: bool, with_transpose: bool) -> list[Tensor]:
    """[data, scale] or [data, scale, data_t, scale_t]."""
    results = empty_128x128(w, with_transpose)
    batched = results if w.dim() == 3 else [result.unsqueeze(0) for result in results]
    data, scale, *transposed = as_bytes(batched)
    data_t, scale_t = transposed or (None, None)
    load().quantize_128x128(
        w if w.dim() == 3 else w.unsqueeze(0), data, scale, data_t=data_t, scale_t=scale_t, pow2_scales=pow2_scales
    )
    return results


def transpose_128x128(data: Tensor, scale: Tensor) -> list[Tensor]:
    """[data, scale] of the transposed matrices."""
    results = [part.new_empty(part.mT.shape) for part in (data, scale)]
    batched = [part if part.dim() == 3 else part.unsqueeze(0) for part in (data, scale, *results)]
    load().transpose_128x128(*as_bytes(batched))
    return results


def swiglu_quantize_1x128(
    x: Tensor,
    x_scale: Tensor | None,
    weight_T: Tensor | None,
    groups: Groups,
    *,
    pow2_scales: bool,
    with_transpose: bool,
) -> list[Tensor]:
    """[data, scale] or [data, scale, data_t, scale_t] of the product."""
    results = empty_1x128(x, (x.shape[0], x.shape[1] // 2), by_rows=True, by_columns=with_transpose)
    data, scale, *transposed = as_bytes(results)
    data_t, scale_t = transposed or (None, None)
    load().swiglu_quantize_1x128(
        _bytes(x),
        data,
        scale,
        x_scale=x_scale,
        weight=weight_T,
        data_t=data_t,
        scale_t=scale_t,
        counts=groups[0],
        offsets=groups[1],
        pow2_scales=pow2_scales,
    )
    return results


def swiglu_backward_quantize_1x128(
    x: Tensor,
    x_scale: Tensor | None,
    grad_TF: Tensor,
    weight_T: Tensor | None,
    groups: Groups,
    *,
    pow2_scales: bool,
    with_product: bool,
) -> list[Tensor]:
    """[data, scale, data_t, scale_t] of the gradient, [data_t, scale_t] of the product, the gradient of the weights."""
    num_rows, hidden = grad_TF.shape
    results = empty_1x128(x, (num_rows, 2 * hidden), by_rows=True, by_columns=True)
    products = empty_1x128(x, (num_rows, hidden), by_rows=False, by_columns=with_product)
    product_data_t, product_scale_t = as_bytes(products) or (None, None)
    partial = None
    if weight_T is not None:
        partial = torch.empty((hidden // TILE, num_rows), dtype=torch.float32, device=x.device)
    load().swiglu_backward_quantize_1x128(
        _bytes(x),
        grad_TF,
        *as_bytes(results),
        x_scale=x_scale,
        weight=weight_T,
        output_data_t=product_data_t,
        output_scale_t=product_scale_t,
        weight_grad=partial,
        counts=groups[0],
        offsets=groups[1],
        pow2_scales=pow2_scales,
    )
    return [*results, *products, *([] if partial is None else [partial.sum(dim=0)])]


def _bytes(x: Tensor) -> Tensor:
    """Not every version of DLPack carries FP8."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def as_bytes(tensors: list[Tensor]) -> list[Tensor]:
    return [_bytes(tensor) for tensor in tensors]
