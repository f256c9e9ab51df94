"""Rotation of queries where they lie: a token's 128 heads are 48 KB, too much to copy for a third of them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt import ops


class _RotateInPlace(torch.autograd.Function):
    """Autograd is shown a new tensor over the old memory: the projection before saves its inputs, not this output, and
    told of the change it would forbid it (behind a deferred weight gradient) or copy the gradient (behind a view)."""

    @staticmethod
    def forward(ctx: Any, q_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        turned = q_THC.data
        ops.rope_(_rope_columns(turned, cos_TR), cos_TR, sin_TR)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_THC: Tensor) -> tuple[Tensor, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        dq_THC = dq_THC.contiguous()
        ops.rope_(_rope_columns(dq_THC, cos_TR), cos_TR, sin_TR, inverse=True)
        return dq_THC, None, None


def rotate_queries(q_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """q (T, H, N + R) with its last R columns turned, in the memory of q; N columns stay.

    q must be nobody else's: no leaf, not what an earlier operation saved for its backward, not the input of a
    recomputed call. The gradient is turned back in its own memory too, so the result must have one user, whose
    gradient nobody else reads; `ops.mla_prefill` is such a one.
    """
    return cast(Tensor, _RotateInPlace.apply(q_THC, cos_TR, sin_TR))


def _rope_columns(q_THC: Tensor, cos_TR: Tensor) -> Tensor:
    return q_THC[..., q_THC.shape[-1] - 2 * cos_TR.shape[1] :]
