"""The dense SwiGLU feed-forward: dense layers and shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.layers import fp8
from dsv3rt.layers.ledger import Ledger, recomputed
from dsv3rt.layers.linear import Linear
from dsv3rt.layers.weights import Stack, WeightCast


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); x (T, D) -> (T, D). Names are the Hugging Face checkpoint's."""

    def __init__(
        self, dim: int, hidden: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden, dtype=dtype, device=device)
        self.up_proj = Linear(dim, hidden, dtype=dtype, device=device)
        self.down_proj = Linear(hidden, dim, dtype=dtype, device=device)
        self._up_cast, self._down_cast = WeightCast(), WeightCast()

    def forward(self, x_TD: Tensor, ledger: Ledger | None = None) -> Tensor:
        if stacks := self.fp8_weights():
            up, down = stacks
            return fp8.swiglu_mlp(x_TD, up, down, ledger)
        hidden = recomputed(ledger, "swiglu", ops.swiglu, self.gate_proj(x_TD, ledger), self.up_proj(x_TD, ledger))
        y_TD: Tensor = self.down_proj(hidden, ledger)
        return y_TD

    def fp8_weights(self) -> list[Stack]:
        """Gate and up, one product, and down, if all three are in FP8."""
        if not (self.gate_proj.is_fp8 and self.up_proj.is_fp8 and self.down_proj.is_fp8):
            return []
        up = self._up_cast, (self.gate_proj.weight, self.up_proj.weight)
        return [up, (self._down_cast, (self.down_proj.weight,))]
