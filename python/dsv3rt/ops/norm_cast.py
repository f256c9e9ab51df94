"""RMSNorm fused with the residual sum before it and the casts after it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import check_same_device, check_tensor, require
from dsv3rt.ops.norm import KERNEL_WIDTHS
from dsv3rt.ops.quant import ROW_TILE, flatten
from dsv3rt.ops.reference import norm, quant
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import NormQuant, QuantTensor


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    pow2_scales: bool,
    with_transpose: bool,
    with_output: bool,
) -> list[Tensor]:
    total = x if residual is None else x + residual
    y, rstd = norm.rms_norm(total, weight, eps)
    parts = flatten(quant.quantize_1x128(y, pow2_scales, with_transpose))
    return [*parts, rstd, *([y] if with_output else []), *([] if residual is None else [total])]


def _on_cuda(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    pow2_scales: bool,
    with_transpose: bool,
    with_output: bool,
) -> list[Tensor]:
    from dsv3rt.ops.cuda import norm as cuda

    choices = {"pow2_scales": pow2_scales, "with_transpose": with_transpose, "with_output": with_output}
    return cuda.rms_norm_quantize_1x128(x, weight, eps, residual, **choices)


def _fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    pow2_scales: bool,
    with_transpose: bool,
    with_output: bool,
) -> list[Tensor]:
    return norm.empty_norm_quant(x, residual is not None, with_transpose=with_transpose, with_output=with_output)


_rms_norm_quantize = register(
    "rms_norm_quantize_1x128(Tensor x, Tensor weight, float eps, Tensor? residual, bool pow2_scales,"
    " bool with_transpose, bool with_output) -> Tensor[]",
    cpu=_on_cpu,
    cuda=_on_cuda,
    fake=_fake,
)


def rms_norm_quantize_1x128(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    residual_TD: Tensor | None = None,
    pow2_scales: bool = False,
    with_transpose: bool = False,
    with_output: bool = False,
) -> NormQuant:
    """quantize_1x128 of rms_norm of x, or of x + residual, in one op.

    Args:
        x_TD: bf16, rows contiguous, D % 16 == 0. No gradient flows through: layers use `rms_norm_backward`.
        weight_D: bf16 or fp32.
        eps: positive.
        residual_TD: like x; their sum, rounded to bf16, is what is normed, and is returned.
        pow2_scales: round every scale up to a power of two.
        with_transpose: also quantise down the columns, for the weight gradient.
        with_output: also return the normed rows in bf16.
    Returns:
        NormQuant: sum_TD and y_TD where asked for; q and q_t laid out as quantize_1x128's; rstd_T for the backward.
    Raises:
        ValueError: shape, stride or eps; on CUDA also D outside 64 .. 16384, and rows that do not start on 16 bytes.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Numerics: to the bit `rms_norm` of the sum, rounded to bf16, followed by `quantize_1x128`.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.2 and 3.3.3.
    """
    op = "rms_norm_quantize_1x128"
    _check_rows(op, "x_TD", x_TD, (None, None))
    D = x_TD.shape[1]
    require(D % 16 == 0, op, "x_TD", "have D % 16 == 0", f"D = {D}")
    good = not x_TD.is_cuda or D in KERNEL_WIDTHS
    require(good, op, "x_TD", f"have D in {KERNEL_WIDTHS.start}..{KERNEL_WIDTHS.stop - 1} on CUDA", f"D = {D}")
    check_tensor(op, "weight_D", weight_D, (D,), (torch.bfloat16, torch.float32))
    if residual_TD is not None:
        _check_rows(op, "residual_TD", residual_TD, tuple(x_TD.shape))
    check_same_device(op, x_TD=x_TD, weight_D=weight_D, residual_TD=residual_TD)
    require(eps > 0, op, "eps", "be positive", eps)
    residual = None if residual_TD is None else residual_TD.detach()
    choices = (pow2_scales, with_transpose, with_output)
    parts = _rms_norm_quantize(x_TD.detach(), weight_D.detach(), eps, residual, *choices)
    return _named(parts, with_transpose, with_output)


def _named(parts: list[Tensor], with_transpose: bool, with_output: bool) -> NormQuant:
    data, scale = parts[:2]
    q_t = QuantTensor(parts[2], parts[3], ROW_TILE) if with_transpose else None
    rstd_at = 4 if with_transpose else 2
    y_TD = parts[rstd_at + 1] if with_output else None
    sum_at = rstd_at + (2 if with_output else 1)
    sum_TD = parts[sum_at] if len(parts) > sum_at else None
    return NormQuant(sum_TD, y_TD, QuantTensor(data, scale, ROW_TILE), q_t, parts[rstd_at])


def _check_rows(op: str, argument: str, rows: Tensor, shape: tuple[int | None, ...]) -> None:
    check_tensor(op, argument, rows, shape, (torch.bfloat16,))
    good = rows.shape[1] == 0 or rows.stride(1) == 1
    require(good, op, argument, "have contiguous rows", f"stride {rows.stride()}")
