"""The registered ops under `balance_loss`, and its gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.registry import register


def _forward_on_cpu(scores: Tensor, idx: Tensor, cu_seqlens: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    loss = reference.balance_loss(scores, idx, cu_seqlens, alpha)
    return loss, reference.balance_slope(scores, idx, cu_seqlens, alpha)


def _forward_on_cuda(scores: Tensor, idx: Tensor, cu_seqlens: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.balance_loss(scores, idx, cu_seqlens, alpha)


def _forward_fake(scores: Tensor, idx: Tensor, cu_seqlens: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(()), scores.new_empty(cu_seqlens.shape[0] - 1, scores.shape[1])


_balance_loss = register(
    "balance_loss(Tensor scores, Tensor idx, Tensor cu_seqlens, float alpha) -> (Tensor, Tensor)",
    cpu=_forward_on_cpu,
    cuda=_forward_on_cuda,
    fake=_forward_fake,
)


def _backward_on_cuda(grad: Tensor, scores: Tensor, slope: Tensor, cu_seqlens: Tensor) -> Tensor:
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.balance_loss_backward(grad, scores, slope, cu_seqlens)


def _backward_fake(grad: Tensor, scores: Tensor, slope: Tensor, cu_seqlens: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


_balance_loss_backward = register(
    "balance_loss_backward(Tensor grad, Tensor scores, Tensor slope, Tensor cu_seqlens) -> Tensor",
    cpu=reference.balance_loss_backward,
    cuda=_backward_on_cuda,
    fake=_backward_fake,
)


class BalanceByKernel(torch.autograd.Function):
    """The loss, differentiable to fp32 scores."""

    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, idx_TK: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
        loss, slope_BE = _balance_loss(scores_TE, idx_TK, cu_seqlens, alpha)
        ctx.save_for_backward(scores_TE, slope_BE, cu_seqlens)
        return cast(Tensor, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _balance_loss_backward(grad, *ctx.saved_tensors), None, None, None
