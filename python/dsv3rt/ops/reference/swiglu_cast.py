"""Reference SwiGLU with casts. Every operation rounds to FP32; results are rounded to BF16 and then quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.reference.common import rows_with_data
from dsv3rt.ops.reference.quant import quantize_1x128
from dsv3rt.ops.types import GroupLayout, QuantTensor, SwigluGradients

# Under this gate the sigmoid, 1.8e-35, is taken as zero: kernels then need no subnormal reciprocals, and silu is far
# under the casts' floor of 2^-100.
LOWEST_GATE = -80.0
LOG2_E = 1.4426950408889634


def swiglu_quantize_1x128(
    gate_up: Tensor, weight_T: Tensor | None, layout: GroupLayout | None, pow2_scales: bool, with_transpose: bool
) -> tuple[QuantTensor, ...]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = _weighted(gate * _sigmoid(gate) * up, weight_T)
    return quantize_1x128(product.bfloat16(), pow2_scales, with_transpose, layout)


def swiglu_backward_quantize_1x128(
    gate_up: Tensor,
    grad_TF: Tensor,
    weight_T: Tensor | None,
    layout: GroupLayout | None,
    pow2_scales: bool,
    with_product: bool,
) -> SwigluGradients:
    gate, up = gate_up.float().chunk(2, dim=-1)
    grad = grad_TF.float()
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    weighted = _weighted(grad, weight_T)
    both = torch.cat([weighted * up * slope, weighted * silu], dim=-1).bfloat16()
    by_rows, by_columns = quantize_1x128(both, pow2_scales, True, layout)
    product_t = weight_grad = None
    if with_product:
        product_t = quantize_1x128(_weighted(silu * up, weight_T).bfloat16(), pow2_scales, True, layout)[1]
    if weight_T is not None:
        weight_grad = (grad * (silu * up)).sum(dim=-1)
        if layout is not None:
            weight_grad = weight_grad.where(rows_with_data(layout, len(weight_grad)), torch.zeros_like(weight_grad))
    return SwigluGradients(by_rows, by_columns, product_t, weight_grad)


def _sigmoid(gate: Tensor) -> Tensor:
    return (1 / (1 + torch.exp2(gate * -LOG2_E))).masked_fill(gate < LOWEST_GATE, 0.0)


def _weighted(rows: Tensor, weight_T: Tensor | None) -> Tensor:
    return rows if weight_T is None else rows * weight_T.unsqueeze(1)
