"""Reference quantisation: the exact numbers that every kernel must produce (docs/architecture.md, Numbers)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3rt.ops.reference.common import rows_with_data
from dsv3rt.ops.types import TILE, GroupLayout, QuantTensor, ceil_div, empty_row_scales, round_up

E4M3_MAX = 448.0
AMAX_FLOOR = 2.0**-100


def quantize_1x128(
    x_TD: Tensor,
    pow2_scales: bool,
    with_transpose: bool,
    layout: GroupLayout | None = None,
    rows_P: Tensor | None = None,
) -> tuple[QuantTensor, ...]:
    """By rows and, if asked for, by columns. Rows outside the layout's counts are taken as zeros."""
    x = x_TD.float()
    if rows_P is not None:
        T, D = x.shape
        x = x[rows_P.clamp(0, T - 1)] if T > 0 else x.new_zeros(rows_P.shape[0], D)
    valid_T = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    if layout is not None:
        valid_T = rows_with_data(layout, x.shape[0])
        x = x.where(valid_T.unsqueeze(1), torch.zeros_like(x))
    q = _rowwise(x, pow2_scales)
    return (q, _columnwise(x, valid_T, pow2_scales)) if with_transpose else (q,)


def _rowwise(x: Tensor, pow2_scales: bool) -> QuantTensor:
    T, D = x.shape
    d = ceil_div(D, TILE)
    tiles = pad(x, (0, d * TILE - D)).view(T, d, TILE)
    scale_Td, inverse_Td = _scales(tiles.abs().amax(dim=2), pow2_scales)
    data = _cast(tiles * inverse_Td.unsqueeze(2)).view(T, d * TILE)
    scale = empty_row_scales(T, d, x.device)
    scale.copy_(scale_Td)
    return QuantTensor(data[:, :D].contiguous(), scale, (1, TILE))


def _columnwise(x: Tensor, valid_T: Tensor, pow2_scales: bool) -> QuantTensor:
    T, D = x.shape
    t = ceil_div(T, TILE)
    tiles = pad(x, (0, 0, 0, t * TILE - T)).view(t, TILE, D)
    scale_tD, inverse_tD = _scales(tiles.abs().amax(dim=1), pow2_scales)
    q = (tiles * inverse_tD.unsqueeze(1)).view(t * TILE, D)
    # Zero times a poisoned tile's scale would be NaN; padding stays zero whatever its neighbours are.
    q = q.where(pad(valid_T, (0, t * TILE - T)).unsqueeze(1), torch.zeros_like(q))
    scale = empty_row_scales(D, t, x.device)
    scale.copy_(scale_tD.t())
    return QuantTensor(_cast(q.t().contiguous()), scale, (1, TILE))


def quantize_128x128(w: Tensor, pow2_scales: bool, with_transpose: bool) -> tuple[QuantTensor, ...]:
    *leading, F, D = w.shape
    f, d = ceil_div(F, TILE), ceil_div(D, TILE)
    tiles = pad(w.float(), (0, d * TILE - D, 0, f * TILE - F)).view(*leading, f, TILE, d, TILE)
    scale, inverse = _scales(tiles.abs().amax(dim=(-3, -1)), pow2_scales)
    q = _cast(tiles * inverse[..., :, None, :, None])
    data = q.view(*leading, f * TILE, d * TILE)[..., :F, :D]
    parts = [(data, scale), (data.mT, scale.mT)] if with_transpose else [(data, scale)]
    return tuple(QuantTensor(_compact(codes), _compact(scales), (TILE, TILE)) for codes, scales in parts)


def transpose_128x128(data: Tensor, scale: Tensor) -> list[Tensor]:
    return [_compact(data.mT), _compact(scale.mT)]


def dequantize(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    rows, columns = q.data.shape[-2:]
    scale = q.scale.repeat_interleave(q.tile[1], dim=-1)[..., :columns]
    if q.tile[0] > 1:
        scale = scale.repeat_interleave(q.tile[0], dim=-2)[..., :rows, :]
    return (q.data.float() * scale).to(dtype)


def empty_1x128(x: Tensor, shape: tuple[int, int], *, by_rows: bool, by_columns: bool) -> list[Tensor]:
    """[data, scale] and [data_t, scale_t] of a (T, D) result, on the device of x, without values."""
    T, D = shape
    result = []
    if by_rows:
        result += [x.new_empty(T, D, dtype=torch.float8_e4m3fn), empty_row_scales(T, ceil_div(D, TILE), x.device)]
    if by_columns:
        padded = round_up(T, TILE)
        result += [x.new_empty(D, padded, dtype=torch.float8_e4m3fn), empty_row_scales(D, padded // TILE, x.device)]
    return result


def empty_128x128(w: Tensor, with_transpose: bool) -> list[Tensor]:
    """[data, scale] or [data, scale, data_t, scale_t] of quantize_128x128 without their values."""
    *leading, F, D = w.shape
    f, d = ceil_div(F, TILE), ceil_div(D, TILE)
    result = []
    for rows, columns, row_tiles, column_tiles in [(F, D, f, d), (D, F, d, f)][: 1 + with_transpose]:
        result.append(w.new_empty(*leading, rows, columns, dtype=torch.float8_e4m3fn))
        result.append(w.new_empty(*leading, row_tiles, column_tiles, dtype=torch.float32))
    return result


def _compact(x: Tensor) -> Tensor:
    """A copy with the strides of a new tensor, also along dimensions of size 1."""
    return x.clone(memory_format=torch.contiguous_format)


def _scales(amax: Tensor, pow2_scales: bool) -> tuple[Tensor, Tensor]:
    """Scale and its reciprocal. NaN and infinity pass through both floors, so that a poisoned tile stays poisoned."""
    # A tensor divisor: torch divides CUDA tensors by a Python number as a product with its rounded reciprocal.
    scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, E4M3_MAX)
    if pow2_scales:
        scale = _round_up_to_power_of_two(scale)
    return scale, torch.ones_like(scale) / scale


def _round_up_to_power_of_two(scale: Tensor) -> Tensor:
    bits = scale.view(torch.int32)
    rounded = ((((bits - 1) >> 23) + 1) << 23).view(torch.float32)
    return torch.where(scale.isfinite(), rounded, scale)


def _cast(q: Tensor) -> Tensor:
    return q.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
