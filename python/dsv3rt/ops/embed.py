"""What turns token ids and positions into numbers: the embedding lookup and rotary positions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsv3rt.ops.checks import FLOATS, check_dtype, check_same_device, check_tensor, require
from dsv3rt.ops.reference import embed as reference
from dsv3rt.ops.registry import register


def _turns_by_kernel(x: Tensor, cos: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and cos.dtype == torch.float32 and x.shape[-1] % 8 == 0


def _rope_on_cuda(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if not _turns_by_kernel(x, cos):
        return reference.rope(x, cos, sin, inverse)
    from dsv3rt.ops.cuda import embed as cuda

    return cuda.rope(x, cos, sin, inverse=inverse)


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


_rope = register(
    "rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    cpu=reference.rope,
    cuda=_rope_on_cuda,
    fake=_rope_fake,
)


def _turn_by_reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    x.copy_(reference.rope(x, cos, sin, inverse))


def _turn_on_cuda(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    if not _turns_by_kernel(x, cos):
        return _turn_by_reference(x, cos, sin, inverse)
    from dsv3rt.ops.cuda import embed as cuda

    return cuda.rope_(x, cos, sin, inverse=inverse)


def _turn_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    return None


_turn = register(
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()",
    cpu=_turn_by_reference,
    cuda=_turn_on_cuda,
    fake=_turn_fake,
)


class _Rope(torch.autograd.Function):
    """The gradient turns back: the transpose of a turn by (cos, sin) is one by (cos, -sin), scaled or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return cast(Tensor, _rope(x, cos_TR, sin_TR, False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _rope(dy, *ctx.saved_tensors, True), None, None


def rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turns each interleaved pair (x[2i], x[2i + 1]) of a token by its angle. Differentiable to x.

    Args:
        x: (T, H, R) or (T, R), bf16, fp32 or fp64, R even.
        cos_TR: (T, R / 2) fp32 (or fp64): cosines of the angles, times any attention factor.
        sin_TR: as cos_TR.
    Returns:
        of x's shape and dtype, contiguous, pairs still interleaved; fp32 arithmetic inside.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: two products and their sum, each rounded to FP32, then one rounding: kernel and reference agree bitwise.
        The kernel runs on CUDA for bf16 x and fp32 tables, R % 8 == 0; everything else is the reference.
    Source: arXiv 2104.09864; DeepSeek-V3 inference/model.py apply_rotary_emb.
    """
    _check_turn("rope", x, cos_TR, sin_TR)
    return cast(Tensor, _Rope.apply(x, cos_TR, sin_TR))


def rope_(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, inverse: bool = False) -> Tensor:
    """`rope` in the place of x, which may be the last columns of wider rows. Autograd does not see it.

    Args:
        x: as in `rope`, in any strides.
        cos_TR: as in `rope`.
        sin_TR: as cos_TR.
        inverse: turn by (cos, -sin) instead, the transpose, which is what gradients take.
    Returns:
        x itself.
    Raises:
        ValueError: shape, or an x that requires a gradient while gradients are recorded.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: as `rope`.
    Source: as `rope`.
    """
    op = "rope_"
    _check_turn(op, x, cos_TR, sin_TR)
    recorded = torch.is_grad_enabled() and x.requires_grad
    require(not recorded, op, "x", "need no gradient", "one that is recorded")
    _turn(x, cos_TR, sin_TR, inverse)
    return x


def _check_turn(op: str, x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    check_dtype(op, "x", x, FLOATS)
    require(x.dim() in (2, 3), op, "x", "have shape (T, H, R) or (T, R)", tuple(x.shape))
    require(x.shape[-1] % 2 == 0, op, "x", "have an even last dimension", x.shape[-1])
    pairs = (x.shape[0], x.shape[-1] // 2)
    check_tensor(op, "cos_TR", cos_TR, pairs, (torch.float32, torch.float64))
    check_tensor(op, "sin_TR", sin_TR, pairs, (cos_TR.dtype,))
    check_same_device(op, x=x, cos_TR=cos_TR, sin_TR=sin_TR)


def _embedding_backward_on_cuda(grad: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    if grad.dtype != torch.bfloat16 or grad.shape[1] % 8 != 0:
        return reference.embedding_backward(grad, tokens, num_rows)
    from dsv3rt.ops.cuda import embed as cuda

    return cuda.embedding_backward(grad, tokens, num_rows)


def _embedding_backward_fake(grad: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[1])


_embedding_backward = register(
    "embedding_backward(Tensor grad, Tensor tokens, SymInt num_rows) -> Tensor",
    cpu=reference.embedding_backward,
    cuda=_embedding_backward_on_cuda,
    fake=_embedding_backward_fake,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.num_rows = weight_VD.shape[0]
        return functional.embedding(tokens_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[None, Tensor]:
        (tokens_T,) = ctx.saved_tensors
        return None, _embedding_backward(dy_TD, tokens_T, ctx.num_rows)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """The rows of `weight_VD` that `tokens` name. Differentiable to the weight.

    Args:
        tokens: int64 or int32, any shape, each in 0 .. V.
        weight_VD: bf16, fp32 or fp64.
    Returns:
        (..., D) of the weight's dtype.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
        IndexError: a token outside the table, on the CPU; on CUDA torch's lookup stops the device.
        BackendUnavailableError: what the kernel is for, no extension; in the backward.
    Numerics: the gradient of a row is the sum over its tokens in their order, in FP32 (FP64 for FP64), rounded once:
        bitwise repeatable. The kernel runs on CUDA for bf16, D % 8 == 0; everything else is the reference.
    """
    op = "embedding"
    check_dtype(op, "tokens", tokens, (torch.int64, torch.int32))
    check_tensor(op, "weight_VD", weight_VD, (None, None), FLOATS)
    check_same_device(op, tokens=tokens, weight_VD=weight_VD)
    rows_TD = cast(Tensor, _Embedding.apply(tokens.flatten(), weight_VD))
    return rows_TD.view(*tokens.shape, weight_VD.shape[1])
