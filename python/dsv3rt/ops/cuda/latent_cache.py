"""Kernel that extends a latent cache, on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.cuda.rows import aligned


def append_latents(
    cache: Tensor, rows: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *, eps: float
) -> None:
    load().append_latents(
        cache, aligned(rows), aligned(weight), cos.contiguous(), sin.contiguous(), slots.contiguous(), eps=eps
    )  # fmt: skip
