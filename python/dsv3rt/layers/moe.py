"""Mixture of experts in four phases: route, dispatch, experts, combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.layers import fp8
from dsv3rt.layers.feed_forward import FeedForward
from dsv3rt.layers.ledger import Ledger, recomputed
from dsv3rt.layers.router import Router
from dsv3rt.layers.weights import Stack, WeightCast, readable
from dsv3rt.ops.types import GroupLayout, Permutation, Routing


@dataclass(frozen=True)
class Dispatched:
    """Tokens gathered by expert: rows_PD, where each expert's rows lie, and the way back.

    route: what an `Exchange` must remember to find the way back to other ranks.
    gates: where experts in FP8 apply them. With `fp8.Gather` rows_PD are the tokens themselves (T, D), which the
        experts gather while they cast them, and so is what they return.
    """

    rows_PD: Tensor
    layout: GroupLayout
    permutation: Permutation
    route: object = None
    gates: fp8.Gather | fp8.Weighed | None = None


class Exchange(Protocol):
    """Carries rows to the ranks that hold their experts, and back.

    num_chunks: into how many chunks of tokens a micro-batch is to be cut, the same on all ranks.
    """

    num_chunks: int

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int, block: int, with_gates: bool, chunk: int
    ) -> Dispatched:
        """As `ops.permute` lays them out, but the rows of all ranks for the experts of this one. Differentiable.

        with_gates: the experts can apply them, so they may come along; else `combine` applies them.
        chunk: which of `num_chunks` it is; different ones may be under way together.
        """
        ...

    def combine(self, rows_PD: Tensor, dispatched: Dispatched, weight_TK: Tensor) -> Tensor:
        """As `ops.unpermute` sums them: y_TD of this rank's tokens, from all experts' results. Differentiable."""
        ...


class Experts(nn.Module):
    """All routed experts fused: gate_up_proj (E, 2F, D), gate rows first, and down_proj (E, D, F).

    Where an `Exchange` spreads them over ranks, each holds its share of E. is_fp8: see `layers/precision.py`.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        experts, dim, hidden = config.num_experts, config.dim, config.expert_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, hidden, dtype=dtype, device=device))
        self.is_fp8 = False
        self._up_cast, self._down_cast = WeightCast(), WeightCast()

    def forward(
        self,
        rows_PD: Tensor,
        layout: GroupLayout,
        ledger: Ledger | None = None,
        gates: fp8.Gather | fp8.Weighed | None = None,
    ) -> Tensor:
        """gates: for FP8 alone, as `fp8.swiglu_mlp` says."""
        if self.is_fp8:
            up, down = self.fp8_weights()
            return fp8.swiglu_mlp(rows_PD, up, down, ledger, layout, gates)
        gate_PF, up_PF = _product(rows_PD, self.gate_up_proj, layout, ledger).chunk(2, dim=-1)
        hidden_PF = recomputed(ledger, "swiglu", ops.swiglu, gate_PF, up_PF)
        return _product(hidden_PF, self.down_proj, layout, ledger)

    def fp8_weights(self) -> list[Stack]:
        if not self.is_fp8:
            return []
        return [(self._up_cast, (self.gate_up_proj,)), (self._down_cast, (self.down_proj,))]


def _product(rows: Tensor, weight: nn.Parameter, layout: GroupLayout, ledger: Ledger | None) -> Tensor:
    weight = readable(weight)
    if ledger is None or not ledger.defers:
        return ops.grouped_gemm_nt(rows, weight, layout)
    kept = rows.detach()
    y = ops.grouped_gemm_nt(rows, weight.detach(), layout)
    return ledger.put_off(y, weight, lambda dy: ops.grouped_weight_grad(dy, kept, layout))


class MoE(nn.Module):
    """Routed experts beside shared ones (DeepSeek-V3 report sec. 2.1.2); no token is dropped.

    The phases pass their results on and keep nothing, so that a schedule may run them apart. The gates are applied
    where the rows are summed, in `combine`; by FP8 experts inside them, unless the exchange carries rows alone. Names
    are the Hugging Face checkpoint's, the routed experts fused.
    exchange: None where all experts are here.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.exchange: Exchange | None = None
        self.gate = Router(config, dtype=dtype, device=device)
        self.experts = Experts(config, dtype=dtype, device=device)
        self.shared_experts: FeedForward | None = None
        if config.num_shared_experts:
            hidden = config.num_shared_experts * config.expert_dim
            self.shared_experts = FeedForward(config.dim, hidden, dtype=dtype, device=device)

    def route(self, x_TD: Tensor) -> Routing:
        routing: Routing = self.gate(x_TD)
        return routing

    @property
    def num_chunks(self) -> int:
        return 1 if self.exchange is None else self.exchange.num_chunks

    def dispatch(self, x_TD: Tensor, routing: Routing, chunk: int = 0) -> Dispatched:
        """Rows grouped by expert, each group padded to the GEMM's 128 rows on a GPU or in FP8, else to nothing."""
        block = 128 if x_TD.is_cuda or self.experts.is_fp8 else 1
        if self.exchange is not None:
            with_gates = self.experts.is_fp8
            return self.exchange.dispatch(
                x_TD, routing, num_experts=self.num_experts, block=block, with_gates=with_gates, chunk=chunk
            )
        if self.experts.is_fp8:
            layout, permutation = ops.place(routing.idx_TK, num_experts=self.num_experts, block=block)
            return Dispatched(x_TD, layout, permutation, gates=fp8.Gather(permutation, routing.weight_TK))
        return Dispatched(*ops.permute(x_TD, routing, num_experts=self.num_experts, block=block))

    def run_experts(self, dispatched: Dispatched, ledger: Ledger | None = None) -> Tensor:
        rows_PD: Tensor = self.experts(dispatched.rows_PD, dispatched.layout, ledger, dispatched.gates)
        return rows_PD

    def run_shared(self, x_TD: Tensor, ledger: Ledger | None = None) -> Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(x_TD, ledger)

    def combine(self, rows_PD: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """The routed part of the output, (T, D)."""
        if self.exchange is not None:
            return self.exchange.combine(rows_PD, dispatched, routing.weight_TK)
        if dispatched.gates is not None:
            return rows_PD
        return ops.unpermute(rows_PD, dispatched.permutation, routing.weight_TK)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.route(x_TD)
        dispatched = self.dispatch(x_TD, routing)
        y_TD = self.combine(self.run_experts(dispatched), dispatched, routing)
        shared_TD = self.run_shared(x_TD)
        return (y_TD if shared_TD is None else y_TD + shared_TD), routing
