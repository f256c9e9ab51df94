"""SwiGLU fused with the casts that follow it, forward and backward."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dsv3rt.ops.checks import check_optional_layout, check_quant, check_same_device, check_tensor, require
from dsv3rt.ops.quant import ROW_TILE, flatten, layout_of
from dsv3rt.ops.reference import quant
from dsv3rt.ops.reference import swiglu_cast as reference
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import TILE, GroupLayout, QuantTensor, SwigluGradients


def _wide(x: Tensor, x_scale: Tensor | None) -> Tensor:
    return x if x_scale is None else quant.dequantize(QuantTensor(x, x_scale, ROW_TILE), torch.float32)


def _forward_on_cpu(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor | None,
    counts: Tensor | None,
    offsets: Tensor | None,
    pow2_scales: bool,
    with_transpose: bool,
) -> list[Tensor]:
    layout = layout_of(counts, offsets)
    return flatten(reference.swiglu_quantize_1x128(_wide(x, x_scale), weight, layout, pow2_scales, with_transpose))


def _forward_on_cuda(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor | None,
    counts: Tensor | None,
    offsets: Tensor | None,
    pow2_scales: bool,
    with_transpose: bool,
) -> list[Tensor]:
    from dsv3rt.ops.cuda import quant as cuda

    groups = (counts, offsets)
    return cuda.swiglu_quantize_1x128(
        x, x_scale, weight, groups, pow2_scales=pow2_scales, with_transpose=with_transpose
    )


def _forward_fake(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor | None,
    counts: Tensor | None,
    offsets: Tensor | None,
    pow2_scales: bool,
    with_transpose: bool,
) -> list[Tensor]:
    return quant.empty_1x128(x, (x.shape[0], x.shape[1] // 2), by_rows=True, by_columns=with_transpose)


_swiglu_quantize = register(
    "swiglu_quantize_1x128(Tensor x, Tensor? x_scale, Tensor? weight, Tensor? counts, Tensor? offsets,"
    " bool pow2_scales, bool with_transpose) -> Tensor[]",
    cpu=_forward_on_cpu,
    cuda=_forward_on_cuda,
    fake=_forward_fake,
)


@overload
def swiglu_quantize_1x128(
    gate_up: Tensor | QuantTensor,
    *,
    weight_T: Tensor | None = None,
    layout: GroupLayout | None = None,
    pow2_scales: bool = False,
    with_transpose: Literal[False] = False,
) -> QuantTensor: ...
@overload
def swiglu_quantize_1x128(
    gate_up: Tensor | QuantTensor,
    *,
    weight_T: Tensor | None = None,
    layout: GroupLayout | None = None,
    pow2_scales: bool = False,
    with_transpose: Literal[True],
) -> tuple[QuantTensor, QuantTensor]: ...
def swiglu_quantize_1x128(
    gate_up: Tensor | QuantTensor,
    *,
    weight_T: Tensor | None = None,
    layout: GroupLayout | None = None,
    pow2_scales: bool = False,
    with_transpose: bool = False,
) -> QuantTensor | tuple[QuantTensor, QuantTensor]:
    """quantize_1x128 of silu(gate) * up in bf16, in one pass over gate and up.

    Args:
        gate_up: (T, 2F), gate first, F % 16 == 0: bf16 with contiguous rows, or FP8 of tile (1, 128).
        weight_T: fp32, multiplies each row of the product before it is rounded; None: ones.
        layout: as in quantize_1x128.
        pow2_scales: round every scale up to a power of two.
        with_transpose: also quantise down the columns, for the weight gradient.
    Returns:
        QuantTensor: data (T, F), scale (T, f), laid out as quantize_1x128's; with the transpose a pair, as there.
    Raises:
        ValueError: shape or stride. On CUDA offsets must be multiples of 128, which is not checked.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Numerics: silu(g) = g * (1 / (1 + 2^(-g * log2 e))), zero times g below -80; every operation is rounded to FP32,
        the product to bf16. Kernel and reference differ where their powers of two do, and of FP8 with F % 128 == 0
        where the kernel multiplies both scales and the row's weight once a row: by one bf16 step at most, and by what
        follows from it. The backward pass yields the very product of this one.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.3.
    """
    op = "swiglu_quantize_1x128"
    x, x_scale = _check_gate_up(op, gate_up)
    counts, offsets = _check_rows(op, x, weight_T, layout)
    parts = _swiglu_quantize(x, x_scale, _detached(weight_T), counts, offsets, pow2_scales, with_transpose)
    q = QuantTensor(parts[0], parts[1], ROW_TILE)
    return (q, QuantTensor(parts[2], parts[3], ROW_TILE)) if with_transpose else q


def _backward_on_cpu(
    x: Tensor,
    x_scale: Tensor | None,
    grad: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    offsets: Tensor | None,
    pow2_scales: bool,
    with_product: bool,
) -> list[Tensor]:
    result = reference.swiglu_backward_quantize_1x128(
        _wide(x, x_scale), grad, weight, layout_of(counts, offsets), pow2_scales, with_product
    )
    quants = [result.gate_up, result.gate_up_t] + ([] if result.product_t is None else [result.product_t])
    return flatten(quants) + ([] if result.weight_T is None else [result.weight_T])


def _backward_on_cuda(
    x: Tensor,
    x_scale: Tensor | None,
    grad: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    offsets: Tensor | None,
    pow2_scales: bool,
    with_product: bool,
) -> list[Tensor]:
    from dsv3rt.ops.cuda import quant as cuda

    groups = (counts, offsets)
    return cuda.swiglu_backward_quantize_1x128(
        x, x_scale, grad, weight, groups, pow2_scales=pow2_scales, with_product=with_product
    )


def _backward_fake(
    x: Tensor,
    x_scale: Tensor | None,
    grad: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    offsets: Tensor | None,
    pow2_scales: bool,
    with_product: bool,
) -> list[Tensor]:
    T, F = grad.shape
    gradients = quant.empty_1x128(x, (T, 2 * F), by_rows=True, by_columns=True)
    product_t = quant.empty_1x128(x, (T, F), by_rows=False, by_columns=with_product)
    return gradients + product_t + ([] if weight is None else [torch.empty_like(weight)])


_swiglu_backward_quantize = register(
    "swiglu_backward_quantize_1x128(Tensor x, Tensor? x_scale, Tensor grad, Tensor? weight, Tensor? counts,"
    " Tensor? offsets, bool pow2_scales, bool with_product) -> Tensor[]",
    cpu=_backward_on_cpu,
    cuda=_backward_on_cuda,
    fake=_backward_fake,
)


def swiglu_backward_quantize_1x128(
    gate_up: Tensor | QuantTensor,
    grad_TF: Tensor,
    *,
    weight_T: Tensor | None = None,
    layout: GroupLayout | None = None,
    pow2_scales: bool = False,
    with_product: bool = False,
) -> SwigluGradients:
    """The gradient of gate and up in bf16, quantised by rows and by columns, in one pass over inputs and gradient.

    Args:
        gate_up: as in swiglu_quantize_1x128.
        grad_TF: bf16, rows contiguous: gradient of the (weighted) product.
        weight_T: as in swiglu_quantize_1x128; its gradient is returned too.
        layout: as in quantize_1x128.
        pow2_scales: round every scale up to a power of two.
        with_product: also return the product of the forward pass again, quantised down its columns.
    Returns:
        SwigluGradients: gate_up (T, 2F) and gate_up_t (2F, Tp), laid out as quantize_1x128's pair; product_t (F, Tp),
        as the second of swiglu_quantize_1x128's pair, or None; weight_T fp32 (T,), or None.
    Raises:
        ValueError: shape or stride; on CUDA also F % 128 != 0. On CUDA offsets must be multiples of 128,
            which is not checked.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Numerics: silu'(g) = s * (1 + g * (1 - s)), s as in swiglu_quantize_1x128, every operation rounded to FP32, results
        to bf16. Kernel and reference differ as there; weight_T is summed in another order.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.3.
    """
    op = "swiglu_backward_quantize_1x128"
    x, x_scale = _check_gate_up(op, gate_up)
    hidden = x.shape[1] // 2
    check_tensor(op, "grad_TF", grad_TF, (x.shape[0], hidden), (torch.bfloat16,))
    _check_contiguous_rows(op, "grad_TF", grad_TF)
    require(not x.is_cuda or hidden % TILE == 0, op, "gate_up", "have F % 128 == 0 on CUDA", f"F = {hidden}")
    counts, offsets = _check_rows(op, x, weight_T, layout, grad_TF=grad_TF)
    parts = _swiglu_backward_quantize(
        x, x_scale, grad_TF.detach(), _detached(weight_T), counts, offsets, pow2_scales, with_product
    )
    quants = [QuantTensor(parts[i], parts[i + 1], ROW_TILE) for i in range(0, len(parts) - 1, 2)]
    weight_grad = None if weight_T is None else parts[-1]
    return SwigluGradients(quants[0], quants[1], quants[2] if with_product else None, weight_grad)


def _check_gate_up(op: str, gate_up: Tensor | QuantTensor) -> tuple[Tensor, Tensor | None]:
    """Data and, of FP8, scale."""
    if isinstance(gate_up, QuantTensor):
        check_quant(op, "gate_up", gate_up, (None, None), (ROW_TILE,))
        x, scale = gate_up.data, gate_up.scale
    else:
        check_tensor(op, "gate_up", gate_up, (None, None), (torch.bfloat16,))
        _check_contiguous_rows(op, "gate_up", gate_up)
        x, scale = gate_up.detach(), None
    require(x.shape[1] % 32 == 0, op, "gate_up", "have shape (T, 2F) with F % 16 == 0", tuple(x.shape))
    return x, scale


def _check_rows(
    op: str, x: Tensor, weight_T: Tensor | None, layout: GroupLayout | None, **others: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if weight_T is not None:
        check_tensor(op, "weight_T", weight_T, (x.shape[0],), (torch.float32,))
        require(weight_T.is_contiguous(), op, "weight_T", "be contiguous", f"stride {weight_T.stride()}")
    check_same_device(op, gate_up=x, weight_T=weight_T, **others)
    return check_optional_layout(op, layout, gate_up=x)


def _check_contiguous_rows(op: str, argument: str, rows: Tensor) -> None:
    good = rows.shape[1] == 0 or rows.stride(1) == 1
    require(good, op, argument, "have contiguous rows", f"stride {rows.stride()}")


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
