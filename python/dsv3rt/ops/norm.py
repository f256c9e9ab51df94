"""RMSNorm, its backward, and SwiGLU."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.checks import FLOATS, check_dtype, check_same_device, check_shape, check_tensor, require
from dsv3rt.ops.reference import norm as reference
from dsv3rt.ops.registry import register

KERNEL_WIDTHS = range(64, 16384 + 1, 8)


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are for this dtype and width."""
    weights = (torch.bfloat16, torch.float32)
    return x.dtype == torch.bfloat16 and weight.dtype in weights and x.shape[1] in KERNEL_WIDTHS


def _forward_on_cuda(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not has_kernel(x, weight):
        return reference.rms_norm(x, weight, eps)
    from dsv3rt.ops.cuda import norm as cuda

    return cuda.rms_norm(x, weight, eps)


def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=reference.wide_dtype(x))


_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    cpu=reference.rms_norm,
    cuda=_forward_on_cuda,
    fake=_forward_fake,
)


def _backward_on_cuda(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not has_kernel(x, weight):
        return reference.rms_norm_backward(dy, x, weight, rstd, grad_residual)
    from dsv3rt.ops.cuda import norm as cuda

    return cuda.rms_norm_backward(dy, x, weight, rstd, grad_residual)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=reference.wide_dtype(x))


_rms_norm_backward = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_residual) -> (Tensor, Tensor)",
    cpu=reference.rms_norm_backward,
    cuda=_backward_on_cuda,
    fake=_backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    """x and its norm, so that the gradient of both is one pass. Saves the reciprocal root of each row beside them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y_TD, rstd_T = cast(tuple[Tensor, Tensor], _rms_norm(x_TD, weight_D, eps))
        ctx.save_for_backward(x_TD, weight_D, rstd_T)
        ctx.set_materialize_grads(False)
        return x_TD.view_as(x_TD), y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual_TD: Tensor | None, dy_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy_TD is None:
            return grad_residual_TD, None, None
        x_TD, weight_D, rstd_T = ctx.saved_tensors
        dx_TD, dweight_D = _rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T, grad_residual_TD)
        return dx_TD, dweight_D.to(weight_D.dtype), None


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
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: both passes are bitwise repeatable. The kernels run on CUDA for bf16 x and bf16 or fp32 weight,
        D % 8 == 0, D from 64 to 16384; rows may be slices of wider ones. Everything else is the reference.
    """
    return _normed("rms_norm", x, weight, eps)[1]


def rms_norm_beside(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x itself, for a residual stream, and rms_norm(x). Differentiable: the gradients of both are added as
    `rms_norm_backward` does it.

    Args:
        x: as for `rms_norm`.
        weight: as for `rms_norm`.
        eps: positive.
    Returns:
        a view of x, not to be changed in place, and the normed rows.
    Raises:
        ValueError: shape or eps.
        TypeError: dtype outside those of `rms_norm`.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: those of `rms_norm`; the sum of the gradients is rounded once.
    """
    return _normed("rms_norm_beside", x, weight, eps)


def _normed(op: str, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_dtype(op, "x", x, FLOATS)
    require(x.dim() >= 1, op, "x", "have at least one dimension", tuple(x.shape))
    check_tensor(op, "weight", weight, (x.shape[-1],), FLOATS)
    check_same_device(op, x=x, weight=weight)
    require(eps > 0, op, "eps", "be positive", eps)
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    same_TD, y_TD = cast(tuple[Tensor, Tensor], _RmsNorm.apply(x_TD, weight, eps))
    return same_TD.view(x.shape), y_TD.view(x.shape)


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, *, grad_residual_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight of an RMSNorm, and the residual stream's gradient added to the former.

    Args:
        dy_TD: gradient of the normed output, of x's dtype.
        x_TD: what was normed: bf16, fp32 or fp64.
        weight_D: any of these dtypes.
        rstd_T: fp32 (fp64 for fp64 x): 1 / sqrt(mean(x^2) + eps) of each row, as `rms_norm_quantize_1x128` returns it.
        grad_residual_TD: of x's dtype: added to dx before it is rounded; None: zeros.
    Returns:
        dx_TD of x's dtype, and dweight_D fp32 (fp64 for fp64 x).
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: fp32 inside; dweight is summed over the rows in a fixed order, so that it is bitwise repeatable. The
        kernel is for what `rms_norm`'s is for.
    """
    op = "rms_norm_backward"
    check_tensor(op, "x_TD", x_TD, (None, None), FLOATS)
    shape = tuple(x_TD.shape)
    check_tensor(op, "dy_TD", dy_TD, shape, (x_TD.dtype,))
    check_tensor(op, "weight_D", weight_D, (shape[1],), FLOATS)
    check_tensor(op, "rstd_T", rstd_T, (shape[0],), (reference.wide_dtype(x_TD),))
    if grad_residual_TD is not None:
        check_tensor(op, "grad_residual_TD", grad_residual_TD, shape, (x_TD.dtype,))
    check_same_device(op, x_TD=x_TD, dy_TD=dy_TD, weight_D=weight_D, rstd_T=rstd_T, grad_residual_TD=grad_residual_TD)
    inputs = (tensor.detach() for tensor in (dy_TD, x_TD, weight_D, rstd_T))
    residual = None if grad_residual_TD is None else grad_residual_TD.detach()
    return cast(tuple[Tensor, Tensor], _rms_norm_backward(*inputs, residual))


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
