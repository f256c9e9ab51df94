"""Block quantisation to FP8 E4M3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from dsv3rt.ops.checks import (
    check_dtype,
    check_optional_layout,
    check_quant,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
    require,
)
from dsv3rt.ops.reference import quant as reference
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import TILE, GroupLayout, QuantTensor

ROW_TILE = (1, TILE)
BLOCK_TILE = (TILE, TILE)


def layout_of(counts: Tensor | None, offsets: Tensor | None) -> GroupLayout | None:
    """A layout from the tensors that a registered op takes for it."""
    return None if counts is None or offsets is None else GroupLayout(counts, offsets)


def flatten(quants: Sequence[QuantTensor]) -> list[Tensor]:
    """Quantised tensors as the tensors that a registered op returns for them."""
    return [tensor for q in quants for tensor in (q.data, q.scale)]


def _1x128_on_cpu(
    x: Tensor,
    pow2_scales: bool,
    with_transpose: bool,
    counts: Tensor | None = None,
    offsets: Tensor | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    return flatten(reference.quantize_1x128(x, pow2_scales, with_transpose, layout_of(counts, offsets), rows))


def _1x128_on_cuda(
    x: Tensor,
    pow2_scales: bool,
    with_transpose: bool,
    counts: Tensor | None = None,
    offsets: Tensor | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    from dsv3rt.ops.cuda import quant as cuda

    return cuda.quantize_1x128(x, (counts, offsets), rows, pow2_scales=pow2_scales, with_transpose=with_transpose)


def _1x128_fake(
    x: Tensor,
    pow2_scales: bool,
    with_transpose: bool,
    counts: Tensor | None = None,
    offsets: Tensor | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    return reference.empty_1x128(
        x, ((x if rows is None else rows).shape[0], x.shape[1]), by_rows=True, by_columns=with_transpose
    )


_quantize_1x128 = register(
    "quantize_1x128(Tensor x, bool pow2_scales, bool with_transpose, Tensor? counts=None, Tensor? offsets=None,"
    " Tensor? rows=None) -> Tensor[]",
    cpu=_1x128_on_cpu,
    cuda=_1x128_on_cuda,
    fake=_1x128_fake,
)


@overload
def quantize_1x128(
    x_TD: Tensor,
    *,
    layout: GroupLayout | None = None,
    rows_P: Tensor | None = None,
    pow2_scales: bool = False,
    with_transpose: Literal[False] = False,
) -> QuantTensor: ...
@overload
def quantize_1x128(
    x_TD: Tensor,
    *,
    layout: GroupLayout | None = None,
    rows_P: Tensor | None = None,
    pow2_scales: bool = False,
    with_transpose: Literal[True],
) -> tuple[QuantTensor, QuantTensor]: ...
def quantize_1x128(
    x_TD: Tensor,
    *,
    layout: GroupLayout | None = None,
    rows_P: Tensor | None = None,
    pow2_scales: bool = False,
    with_transpose: bool = False,
) -> QuantTensor | tuple[QuantTensor, QuantTensor]:
    """x_TD ~ data * scale with one scale per 1x128 tile; optionally x^T in the 128x1 tiles of x as well.

    Args:
        x_TD: bf16 or fp32, rows contiguous, D % 16 == 0. No gradient flows through.
        layout: rows outside the counts of its groups are not read and count as zeros; on the device, not read back.
        rows_P: int32, with a layout: what is quantised is x_TD[rows_P] (T is P below), which is never written out; each
            in 0 .. T where the layout has data, anything elsewhere.
        pow2_scales: round every scale up to a power of two.
        with_transpose: also quantise down the columns, for the weight gradient.
    Returns:
        QuantTensor: data (T, D) e4m3, scale (T, d) fp32 with stride (1, round_up(T, 4)), tile (1, 128).
        With the transpose a pair; the second has data (D, Tp), scale (D, Tp / 128) with stride (1, round_up(D, 4)) and
        tile (1, 128), where Tp = round_up(T, 128) and data columns T..Tp are zero. With a layout, padding is zero in
        both; what belongs to rows past the last group is zero on the CPU and unspecified on CUDA.
    Raises:
        ValueError: shape or stride; rows_P without a layout or, on CUDA, P % 128 != 0. On CUDA offsets must be
            multiples of 128, which is not checked.
        TypeError: dtype outside the above; on CUDA fp32 with rows_P.
        BackendUnavailableError: CUDA tensor, no extension.
    Numerics: scale = max(amax, 2^-100) / 448, data = e4m3(x * (1 / scale)), IEEE FP32; a NaN or infinity makes its tile
        dequantise to NaN. Kernel and reference agree bitwise.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.2; DeepGEMM per_token_cast_to_fp8.
    """
    op = "quantize_1x128"
    check_dtype(op, "x_TD", x_TD, (torch.bfloat16, torch.float32))
    check_shape(op, "x_TD", x_TD, (None, None))
    require(x_TD.shape[1] % 16 == 0, op, "x_TD", "have D % 16 == 0", f"D = {x_TD.shape[1]}")
    require(x_TD.shape[1] == 0 or x_TD.stride(1) == 1, op, "x_TD", "have contiguous rows", f"stride {x_TD.stride()}")
    counts, offsets = check_optional_layout(op, layout, x_TD=x_TD)
    if rows_P is not None:
        _check_gather(op, x_TD, rows_P, layout)
    parts = _quantize_1x128(x_TD.detach(), pow2_scales, with_transpose, counts, offsets, rows_P)
    q = QuantTensor(parts[0], parts[1], ROW_TILE)
    return (q, QuantTensor(parts[2], parts[3], ROW_TILE)) if with_transpose else q


def _check_gather(op: str, x_TD: Tensor, rows_P: Tensor, layout: GroupLayout | None) -> None:
    check_tensor(op, "rows_P", rows_P, (None,), (torch.int32,))
    require(layout is not None, op, "layout", "be given with rows_P", None)
    check_same_device(op, x_TD=x_TD, rows_P=rows_P)
    if x_TD.is_cuda:
        check_dtype(op, "x_TD", x_TD, (torch.bfloat16,))
        require(rows_P.shape[0] % TILE == 0, op, "rows_P", "have P % 128 == 0 on CUDA", f"P = {rows_P.shape[0]}")


def _128x128_on_cpu(w: Tensor, pow2_scales: bool, with_transpose: bool) -> list[Tensor]:
    return flatten(reference.quantize_128x128(w, pow2_scales, with_transpose))


def _128x128_on_cuda(w: Tensor, pow2_scales: bool, with_transpose: bool) -> list[Tensor]:
    from dsv3rt.ops.cuda import quant as cuda

    return cuda.quantize_128x128(w, pow2_scales=pow2_scales, with_transpose=with_transpose)


def _128x128_fake(w: Tensor, pow2_scales: bool, with_transpose: bool) -> list[Tensor]:
    return reference.empty_128x128(w, with_transpose)


_quantize_128x128 = register(
    "quantize_128x128(Tensor w, bool pow2_scales, bool with_transpose) -> Tensor[]",
    cpu=_128x128_on_cpu,
    cuda=_128x128_on_cuda,
    fake=_128x128_fake,
)


@overload
def quantize_128x128(
    w_FD: Tensor, *, pow2_scales: bool = False, with_transpose: Literal[False] = False
) -> QuantTensor: ...
@overload
def quantize_128x128(
    w_FD: Tensor, *, pow2_scales: bool = False, with_transpose: Literal[True]
) -> tuple[QuantTensor, QuantTensor]: ...
def quantize_128x128(
    w_FD: Tensor, *, pow2_scales: bool = False, with_transpose: bool = False
) -> QuantTensor | tuple[QuantTensor, QuantTensor]:
    """w_FD ~ data * scale with one scale per 128x128 block; a leading dimension (w_XFD) is a batch.

    Args:
        w_FD: bf16 or fp32, (F, D) or (X, F, D), any F and D. No gradient flows through.
        pow2_scales: round every scale up to a power of two.
        with_transpose: also return w^T, which has the same scales and the same bytes, transposed.
    Returns:
        QuantTensor: data of w's shape, e4m3, contiguous; scale (f, d) or (X, f, d) fp32, contiguous; tile (128, 128).
        With the transpose a pair; the second has data (D, F) or (X, D, F), scale (d, f) or (X, d, f), both contiguous.
    Raises:
        ValueError: shape; on CUDA also a last dimension that is not contiguous.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Numerics: as quantize_1x128, per block. Kernel and reference agree bitwise. The kernel is fast where D % 16 == 0
        and, with the transpose, F % 16 == 0.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.2; DeepGEMM per_block_cast_to_fp8.
    """
    op = "quantize_128x128"
    check_dtype(op, "w_FD", w_FD, (torch.bfloat16, torch.float32))
    require(w_FD.dim() in (2, 3), op, "w_FD", "have 2 or 3 dimensions", tuple(w_FD.shape))
    if w_FD.is_cuda and w_FD.shape[-1] > 1:
        require(w_FD.stride(-1) == 1, op, "w_FD", "have contiguous rows on CUDA", f"stride {w_FD.stride()}")
    parts = _quantize_128x128(w_FD.detach(), pow2_scales, with_transpose)
    q = QuantTensor(parts[0], parts[1], BLOCK_TILE)
    return (q, QuantTensor(parts[2], parts[3], BLOCK_TILE)) if with_transpose else q


def _transpose_on_cuda(data: Tensor, scale: Tensor) -> list[Tensor]:
    from dsv3rt.ops.cuda import quant as cuda

    return cuda.transpose_128x128(data, scale)


def _transpose_fake(data: Tensor, scale: Tensor) -> list[Tensor]:
    return [data.new_empty(data.mT.shape), scale.new_empty(scale.mT.shape)]


_transpose_128x128 = register(
    "transpose_128x128(Tensor data, Tensor scale) -> Tensor[]",
    cpu=reference.transpose_128x128,
    cuda=_transpose_on_cuda,
    fake=_transpose_fake,
)


def transpose_128x128(q: QuantTensor) -> QuantTensor:
    """The transposed matrix, or batch of matrices: the same bytes and scales, in other places.

    Args:
        q: tile (128, 128), data (F, D) or (X, F, D), any F and D.
    Returns:
        data (D, F) or (X, D, F), scale (d, f) or (X, d, f), both contiguous: what `quantize_128x128` gives as w^T.
    Raises:
        ValueError: shape, stride or tile of `q`.
        TypeError: dtype of `q`.
        BackendUnavailableError: CUDA tensors, no extension.
    Numerics: none. The kernel is fast where F and D are multiples of 16.
    """
    op = "transpose_128x128"
    require(q.data.dim() in (2, 3), op, "q", "have 2 or 3 dimensions", tuple(q.data.shape))
    check_quant(op, "q", q, tuple(q.data.shape), (BLOCK_TILE,))
    check_same_device(op, data=q.data, scale=q.scale)
    data, scale = _transpose_128x128(q.data, q.scale)
    return QuantTensor(data, scale, BLOCK_TILE)


def dequantize(q: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that `q` stands for.

    Args:
        q: tile (1, 128) or (128, 128), any leading dimensions.
        dtype: of the result: bf16, fp32 or fp64.
    Returns:
        data * scale, rounded to fp32, then cast; contiguous.
    Raises:
        ValueError: shape, stride or tile of `q`.
        TypeError: dtype outside the above.
    """
    op = "dequantize"
    check_quant(op, "q", q, tuple(q.data.shape), (ROW_TILE, BLOCK_TILE))
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{op}: dtype must be bfloat16 or float32 or float64, got {dtype_name(dtype)}")
    return reference.dequantize(q, dtype)
