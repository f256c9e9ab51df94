"""Multi-token prediction: one more block a depth, over the main model's embedding and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3rt.config import ModelConfig
from dsv3rt.layers.ledger import Ledger
from dsv3rt.layers.linear import Linear
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.model.block import Block


class MTPBlock(Block):
    """Depth j's block (DeepSeek-V3 report sec. 2.2), layer `num_layers + j - 1` of the checkpoint.

    It owns no embedding and no head: the model passes the one in and applies the other, so both are shared and their
    gradients add up. Order: x = merge(embedded, hidden); the block's phases; `shared_head.norm` before the head.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, layer_idx, dtype=dtype, device=device)
        dim, eps = config.dim, config.norm_eps
        self.enorm = RMSNorm(dim, eps, dtype=dtype, device=device)
        self.hnorm = RMSNorm(dim, eps, dtype=dtype, device=device)
        self.eh_proj = Linear(2 * dim, dim, dtype=dtype, device=device)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(dim, eps, dtype=dtype, device=device)})

    def merge(self, embedded_TD: Tensor, hidden_TD: Tensor, ledger: Ledger | None = None) -> Tensor:
        """eh_proj(cat(enorm(embedding of the next token), hnorm(hidden))).

        hidden is the previous depth's output after its final norm: `norm` of the main model, `shared_head.norm` of an
        earlier MTP block.
        """
        both_TX = torch.cat([self.enorm(embedded_TD), self.hnorm(hidden_TD)], dim=-1)
        x_TD: Tensor = self.eh_proj(both_TX, ledger)
        return x_TD


def shifted_tokens(tokens_BT: Tensor, labels_BT: Tensor | None, depth: int) -> Tensor:
    """(B, T): the token `depth` places after each position.

    The last position's next token is known from labels alone; what no one knows (and an ignored label) becomes token 0.
    Such a position has no target and, attention being causal, touches no position that has one.
    """
    batch = tokens_BT.shape[0]
    last_B1 = tokens_BT.new_zeros(batch, 1) if labels_BT is None else labels_BT[:, -1:].clamp(min=0)
    tail = tokens_BT.new_zeros(batch, depth - 1)
    return torch.cat([tokens_BT[:, depth:], last_B1, tail], dim=1)[:, : tokens_BT.shape[1]]


def shifted_labels(labels_BT: Tensor, depth: int, ignore_index: int = -100) -> Tensor:
    """(B, T): the label `depth` places after each position, ignored where the sequence has ended."""
    tail = labels_BT.new_full((labels_BT.shape[0], depth), ignore_index)
    return torch.cat([labels_BT[:, depth:], tail], dim=1)[:, : labels_BT.shape[1]]
