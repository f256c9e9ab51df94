"""Mixture of experts in four phases: route, dispatch, experts, combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.layers.feed_forward import FeedForward
from dsv3rt.layers.router import Router
from dsv3rt.ops.types import GroupLayout, Permutation, Routing


@dataclass(frozen=True)
class Dispatched:
    """Tokens gathered by expert: rows_PD, where each expert's rows lie, and the way back."""

    rows_PD: Tensor
    layout: GroupLayout
    permutation: Permutation


class Experts(nn.Module):
    """All routed experts fused: gate_up_proj (E, 2F, D), gate rows first, and down_proj (E, D, F)."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        experts, dim, hidden = config.num_experts, config.dim, config.expert_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, hidden, dtype=dtype, device=device))

    def forward(self, rows_PD: Tensor, layout: GroupLayout) -> Tensor:
        gate_PF, up_PF = ops.grouped_gemm_nt(rows_PD, self.gate_up_proj, layout).chunk(2, dim=-1)
        return ops.grouped_gemm_nt(ops.swiglu(gate_PF, up_PF), self.down_proj, layout)


class MoE(nn.Module):
    """Routed experts beside shared ones (DeepSeek-V3 report sec. 2.1.2); no token is dropped.

    The phases pass their results on and keep nothing, so that a schedule may run them apart. The gates are applied
    where the rows are summed, in `combine`. Names are the Hugging Face checkpoint's, the routed experts fused.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = Router(config, dtype=dtype, device=device)
        self.experts = Experts(config, dtype=dtype, device=device)
        self.shared_experts: FeedForward | None = None
        if config.num_shared_experts:
            hidden = config.num_shared_experts * config.expert_dim
            self.shared_experts = FeedForward(config.dim, hidden, dtype=dtype, device=device)

    def route(self, x_TD: Tensor) -> Routing:
        routing: Routing = self.gate(x_TD)
        return routing

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Rows grouped by expert, each group padded to the GEMM's 128 rows on a GPU, to nothing on a CPU."""
        block = 128 if x_TD.is_cuda else 1
        return Dispatched(*ops.permute(x_TD, routing, num_experts=self.num_experts, block=block))

    def run_experts(self, dispatched: Dispatched) -> Tensor:
        rows_PD: Tensor = self.experts(dispatched.rows_PD, dispatched.layout)
        return rows_PD

    def run_shared(self, x_TD: Tensor) -> Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(x_TD)

    def combine(self, rows_PD: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """The routed part of the output, (T, D)."""
        return ops.unpermute(rows_PD, dispatched.permutation, routing.weight_TK)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.route(x_TD)
        dispatched = self.dispatch(x_TD, routing)
        y_TD = self.combine(self.run_experts(dispatched), dispatched, routing)
        shared_TD = self.run_shared(x_TD)
        return (y_TD if shared_TD is None else y_TD + shared_TD), routing
