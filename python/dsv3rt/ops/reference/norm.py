"""Reference elementwise layers: at least FP32 inside, the caller's dtype outside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from dsv3rt.ops.reference.common import at_least_fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = at_least_fp32(x)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    if x.dim() == 3:
        cos_TR, sin_TR = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    even, odd = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_TR - odd * sin_TR, even * sin_TR + odd * cos_TR), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (silu(at_least_fp32(gate)) * at_least_fp32(up)).to(gate.dtype)
