"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3rt import ops


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, FP32 inside, result in x's dtype; weight (dim,)."""

    def __init__(
        self, dim: int, eps: float, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the residual stream and its norm; their gradients are added inside the norm's."""
        return ops.rms_norm_beside(x, self.weight, self.eps)
