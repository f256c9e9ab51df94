"""RMSNorm, rotary positions and SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import FLOATS, check_dtype, check_same_device, check_shape, check_tensor, require
from dsv3rt.ops.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. Differentiable.

    Args:
        x: (..., D) bf16, fp32 or fp64.
        weight: (D,), any of these dtypes.
        eps: positive.
    Returns:
        of x's shape and dtype; fp32 arithmetic inside, one rounding at the end.
    Raises:
        ValueError: shape or eps.
        TypeError: dtype outside the above.
    """
    op = "rms_norm"
    check_dtype(op, "x", x, FLOATS)
    require(x.dim() >= 1, op, "x", "have at least one dimension", tuple(x.shape))
    check_tensor(op, "weight", weight, (x.shape[-1],), FLOATS)
    check_same_device(op, x=x, weight=weight)
    require(eps > 0, op, "eps", "be positive", eps)
    return reference.rms_norm(x, weight, eps)


def rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turns each interleaved pair (x[2i], x[2i + 1]) of a token by its angle. Differentiable to x.

    Args:
        x: (T, H, R) or (T, R), bf16, fp32 or fp64, R even.
        cos_TR: (T, R / 2) fp32 (or fp64): cosines of the angles, times any attention factor.
        sin_TR: as cos_TR.
    Returns:
        of x's shape and dtype, pairs still interleaved; fp32 arithmetic inside.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
    Source: arXiv 2104.09864; DeepSeek-V3 inference/model.py apply_rotary_emb.
    """
    op = "rope"
    check_dtype(op, "x", x, FLOATS)
    require(x.dim() in (2, 3), op, "x", "have shape (T, H, R) or (T, R)", tuple(x.shape))
    require(x.shape[-1] % 2 == 0, op, "x", "have an even last dimension", x.shape[-1])
    pairs = (x.shape[0], x.shape[-1] // 2)
    check_tensor(op, "cos_TR", cos_TR, pairs, (torch.float32, torch.float64))
    check_tensor(op, "sin_TR", sin_TR, pairs, (cos_TR.dtype,))
    check_same_device(op, x=x, cos_TR=cos_TR, sin_TR=sin_TR)
    return reference.rope(x, cos_TR, sin_TR)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Differentiable.

    Args:
        gate: any shape, bf16, fp32 or fp64.
        up: of gate's shape and dtype.
    Returns:
        of gate's shape and dtype; fp32 arithmetic inside, one rounding at the end.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
    """
    op = "swiglu"
    check_dtype(op, "gate", gate, FLOATS)
    check_dtype(op, "up", up, (gate.dtype,))
    check_shape(op, "up", up, tuple(gate.shape))
    check_same_device(op, gate=gate, up=up)
    return reference.swiglu(gate, up)
