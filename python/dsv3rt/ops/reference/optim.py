"""Reference AdamW step, in the order of operations of torch.optim.AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.types import AdamWHyper


@torch.no_grad()
def adamw_step(
    master: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    hyper: AdamWHyper,
    step: int,
    grad_scale: Tensor | float,
) -> None:
    m, v = moments
    g = grad.float() * grad_scale
    m32, v32 = m.float(), v.float()  # the tensors themselves where they are FP32 already
    m32.lerp_(g, 1 - hyper.beta1)
    v32.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    denominator = v32.sqrt().div_((1 - hyper.beta2**step) ** 0.5).add_(hyper.eps)
    master.mul_(1 - hyper.lr * hyper.weight_decay)
    master.addcdiv_(m32, denominator, value=-hyper.lr / (1 - hyper.beta1**step))
    if m32 is not m:
        m.copy_(m32)
    if v32 is not v:
        v.copy_(v32)
