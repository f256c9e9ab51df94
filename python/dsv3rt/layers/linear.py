"""Linear and Embedding without bias and without their own initialisation: `Transformer.init_weights` fills them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsv3rt import ops
from dsv3rt.layers import fp8
from dsv3rt.layers.ledger import Ledger
from dsv3rt.layers.weights import Stack, WeightCast, readable


class Linear(nn.Module):
    """y = x @ weight.T; weight (out_dim, in_dim), in the dtype of x.

    is_fp8: multiply in FP8, see `layers/precision.py`. keep_input: as `fp8.linear` says.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        keep_input: bool = False,
    ) -> None:
        super().__init__()
        self.is_fp8 = False
        self._keep_input = keep_input
        self._cast = WeightCast()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=dtype, device=device))

    def forward(self, x: Tensor, ledger: Ledger | None = None) -> Tensor:
        if self.is_fp8:
            return fp8.linear(x, (self._cast, (self.weight,)), ledger, keep_input=self._keep_input)
        weight = readable(self.weight)
        if ledger is None or not ledger.defers:
            return functional.linear(x, weight)
        kept = x.detach()
        y = functional.linear(x, weight.detach())
        return ledger.put_off(y, weight, lambda dy: dy.flatten(0, -2).t() @ kept.flatten(0, -2))

    def fp8_weights(self) -> list[Stack]:
        return [(self._cast, (self.weight,))] if self.is_fp8 else []


class Embedding(nn.Module):
    """weight (V, D); tokens (...) -> (..., D)."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.embedding(tokens, self.weight)
