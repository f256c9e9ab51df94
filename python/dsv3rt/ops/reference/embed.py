"""Reference embedding gradient and rotary positions: at least FP32 inside, the caller's dtype outside."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.reference.common import at_least_fp32


def rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
    if inverse:
        sin_TR = -sin_TR
    if x.dim() == 3:
        cos_TR, sin_TR = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    even, odd = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_TR - odd * sin_TR, even * sin_TR + odd * cos_TR), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def embedding_backward(grad_TD: Tensor, tokens_T: Tensor, num_rows: int) -> Tensor:
    summed = torch.ops.aten.embedding_dense_backward(at_least_fp32(grad_TD), tokens_T, num_rows, -1, False)
    return summed.to(grad_TD.dtype)
