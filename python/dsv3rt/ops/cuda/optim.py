"""Optimizer kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.cuda.quant import as_bytes
from dsv3rt.ops.types import ceil_div

NORM_BLOCK = 32768  # elements whose squares make one partial sum


def adamw_step(
    states: list[list[Tensor]],
    params: list[Tensor],
    grad_scale: Tensor | None,
    numbers: list[float],
    keys: list[tuple[int, int]],
) -> None:
    """states: masters, gradients, first and second moments, all lists of one dtype each."""
    masters, grads, m, v = states
    grads = [grad.contiguous() for grad in grads]
    load().adamw_step(masters, grads, m, v, params, keys=keys, numbers=numbers, grad_scale=grad_scale)


def adamw_step_fp8(
    states: list[list[Tensor]],
    casts: list[list[Tensor]],
    grad_scale: Tensor | None,
    numbers: list[float],
    keys: list[tuple[int, int]],
) -> None:
    """states: as for adamw_step, matrices or batches of them. casts: data and scales of w, or those of w^T as well."""
    masters, grads, m, v = states
    grads = [grad.contiguous() for grad in grads]
    batches = [as_bytes([part if part.dim() == 3 else part.unsqueeze(0) for part in kind]) for kind in casts]
    data, scale, *transposed = batches
    data_t, scale_t = transposed or ([], [])
    load().adamw_step_fp8(
        masters, grads, m, v, data, scale, data_t, scale_t, keys=keys, numbers=numbers, grad_scale=grad_scale
    )


def grad_norms(grads: list[Tensor]) -> Tensor:
    """(n,) FP64, which the extension takes as pairs of words."""
    grads = [grad.contiguous() for grad in grads]
    norms = grads[0].new_empty((len(grads), 2), dtype=torch.int32)
    rows = sum(ceil_div(grad.numel(), NORM_BLOCK) for grad in grads)
    partial = grads[0].new_empty((rows, 2), dtype=torch.int32)
    load().grad_norms(grads, norms, partial)
    return norms.view(torch.float64).squeeze(1)
