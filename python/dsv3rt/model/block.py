"""One transformer block as the five phases that schedules call by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3rt.config import ModelConfig
from dsv3rt.layers.feed_forward import FeedForward
from dsv3rt.layers.ledger import Ledger, recomputed
from dsv3rt.layers.mla import MLA, DecodeStep, Sequences
from dsv3rt.layers.moe import Dispatched, MoE
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.ops.types import Routing


@dataclass(frozen=True)
class Routed:
    """After the route phase: the residual x_TD, the normed h_TD, and where its tokens go (None in a dense block)."""

    x_TD: Tensor
    h_TD: Tensor
    routing: Routing | None


@dataclass(frozen=True)
class ExpertOutput:
    """After the experts phase: routed rows_PD (None in a dense block), and local_TD, what needs no exchange:
    the shared experts or the dense feed-forward (None where there are no shared experts)."""

    rows_PD: Tensor | None
    local_TD: Tensor | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); MoE from layer `num_dense_layers` on.

    The phases are attention, route, dispatch, experts, combine. Each takes what earlier ones returned; the block keeps
    no state. `dispatch` and `combine` are where tokens cross ranks. The ledger, where one is given, belongs to the
    block and the micro-batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.input_layernorm = RMSNorm(dim, eps, dtype=dtype, device=device)
        self.self_attn = MLA(config, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(dim, eps, dtype=dtype, device=device)
        self.mlp: FeedForward | MoE
        if layer_idx < config.num_dense_layers:
            self.mlp = FeedForward(dim, config.ffn_dim, dtype=dtype, device=device)
        else:
            self.mlp = MoE(config, dtype=dtype, device=device)

    def attention(self, x_TD: Tensor, sequences: Sequences, ledger: Ledger | None = None) -> Tensor:
        """x_TD plus its attention."""
        x_TD, h_TD = _residual_and_norm(self.input_layernorm, x_TD, ledger)
        y_TD: Tensor = x_TD + self.self_attn(h_TD, sequences, ledger)
        return y_TD

    def route(self, x_TD: Tensor, ledger: Ledger | None = None) -> Routed:
        x_TD, h_TD = _residual_and_norm(self.post_attention_layernorm, x_TD, ledger)
        return Routed(x_TD, h_TD, self.mlp.route(h_TD) if isinstance(self.mlp, MoE) else None)

    def dispatch(self, routed: Routed) -> Dispatched | None:
        if not isinstance(self.mlp, MoE):
            return None
        assert routed.routing is not None
        return self.mlp.dispatch(routed.h_TD, routed.routing)

    def experts(self, routed: Routed, dispatched: Dispatched | None, ledger: Ledger | None = None) -> ExpertOutput:
        if not isinstance(self.mlp, MoE):
            return ExpertOutput(None, self.mlp(routed.h_TD, ledger))
        assert dispatched is not None
        return ExpertOutput(self.mlp.run_experts(dispatched, ledger), self.mlp.run_shared(routed.h_TD, ledger))

    def combine(self, routed: Routed, dispatched: Dispatched | None, output: ExpertOutput) -> Tensor:
        """The block's result (T, D): residual, plus local part, plus routed part."""
        if not isinstance(self.mlp, MoE):
            return self.add_up(routed, output.local_TD, None)
        assert dispatched is not None
        assert output.rows_PD is not None
        assert routed.routing is not None
        return self.add_up(routed, output.local_TD, self.mlp.combine(output.rows_PD, dispatched, routed.routing))

    @staticmethod
    def add_up(routed: Routed, local_TD: Tensor | None, experts_TD: Tensor | None) -> Tensor:
        y_TD = routed.x_TD if local_TD is None else routed.x_TD + local_TD
        return y_TD if experts_TD is None else y_TD + experts_TD

    def _feed_forward(self, x_TD: Tensor) -> tuple[Tensor, Routing | None]:
        routed = self.route(x_TD)
        dispatched = self.dispatch(routed)
        return self.combine(routed, dispatched, self.experts(routed, dispatched)), routed.routing

    def forward(self, x_TD: Tensor, sequences: Sequences) -> tuple[Tensor, Routing | None]:
        """All phases in order; (T, D) -> (T, D) and the routing (None in a dense block)."""
        return self._feed_forward(self.attention(x_TD, sequences))

    def decode(self, x_TD: Tensor, step: DecodeStep, cache: Tensor) -> Tensor:
        """The block over a latent cache (pages, 64, C + R), which it extends; see MLA.decode."""
        x_TD = x_TD + self.self_attn.decode(self.input_layernorm(x_TD), step, cache)
        return self._feed_forward(x_TD)[0]


def _residual_and_norm(norm: RMSNorm, x_TD: Tensor, ledger: Ledger | None) -> tuple[Tensor, Tensor]:
    """x for the residual stream and its norm, from one op unless the norm alone is to be computed again."""
    if ledger is not None and ledger.recomputes("norm"):
        return x_TD, recomputed(ledger, "norm", norm, x_TD)
    return norm.beside(x_TD)
