"""The model: embedding, blocks, norm, head, the MTP blocks, and the assembly of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.layers.linear import Embedding, Linear
from dsv3rt.layers.mla import DecodeStep, Sequences
from dsv3rt.layers.moe import MoE
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.rope import rope_tables
from dsv3rt.model.block import Block
from dsv3rt.model.mtp import MTPBlock, shifted_labels, shifted_tokens
from dsv3rt.ops.types import Routing


@dataclass(frozen=True)
class Output:
    """What a forward gives.

    logits_BTV: FP32, or None when not asked for. mtp_logits: one (B, T, V) per depth, empty when not asked for; depth j
    (from 1) at position t is about token t + j + 1, and means nothing in the last j positions when there were no labels
    (the last j - 1 otherwise).
    loss = main_loss + mtp_weight * mtp_loss + balance_loss; all four FP32 scalars, None without labels. mtp_loss is the
    mean over depths, 0 when MTP did not run; balance_loss is the sum over MoE layers, alpha included (the MTP blocks'
    only where mtp_weight is above 0, so that asking for logits changes no loss).
    expert_counts_LE: int64, tokens per expert of every MoE layer, MTP blocks last (0 when MTP did not run).
    """

    logits_BTV: Tensor | None
    mtp_logits: tuple[Tensor, ...]
    loss: Tensor | None
    main_loss: Tensor | None
    mtp_loss: Tensor | None
    balance_loss: Tensor | None
    expert_counts_LE: Tensor


class Transformer(nn.Module):
    """A DeepSeek-V3-style language model.

    `layers` holds the main blocks and after them the MTP blocks, numbered as in the Hugging Face checkpoint; parameter
    names are its names without the leading "model." (routed experts fused). Parameters are in `dtype`, router biases
    FP32. `device="meta"` allocates nothing; after `to_empty`, load a checkpoint or call `init_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            [Block(config, i, dtype=dtype, device=device) for i in range(config.num_layers)]
            + [MTPBlock(config, config.num_layers + j, dtype=dtype, device=device) for j in range(config.mtp_depth)]
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype, device=device)
        self.lm_head = Linear(config.dim, config.vocab_size, dtype=dtype, device=device)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Norms 1, router biases 0, everything else normal with std `config.init_std` (report sec. 4.2)."""
        if self.embed_tokens.weight.is_meta:
            return
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=self.config.init_std, generator=generator)
        for moe in self.moe_layers:
            moe.gate.e_score_correction_bias.zero_()

    @property
    def main_blocks(self) -> list[Block]:
        return [cast(Block, layer) for layer in self.layers[: self.config.num_layers]]

    @property
    def mtp_blocks(self) -> list[MTPBlock]:
        return [cast(MTPBlock, layer) for layer in self.layers[self.config.num_layers :]]

    @property
    def moe_layers(self) -> list[MoE]:
        """The rows of expert_counts_LE: MoE layers in order, MTP blocks last."""
        mlps = [layer.mlp for layer in self.layers if isinstance(layer, Block)]
        return [mlp for mlp in mlps if isinstance(mlp, MoE)]

    def update_router_bias(self, counts_LE: Tensor, gamma: float) -> None:
        """Move every router bias by gamma towards balance; counts_LE the whole batch's `expert_counts_LE`, summed."""
        shape = (len(self.moe_layers), self.config.num_experts)
        if tuple(counts_LE.shape) != shape:
            raise ValueError(f"update_router_bias: counts_LE must have shape {shape}, got {tuple(counts_LE.shape)}")
        for moe, counts_E in zip(self.moe_layers, counts_LE, strict=True):
            moe.gate.update_bias(counts_E, gamma)

    def head(self, h_TD: Tensor) -> Tensor:
        """FP32 logits of normed hidden states, (..., D) -> (..., V)."""
        return functional.linear(h_TD.float(), self.lm_head.weight.float())

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        alpha: float = 0.0,
        mtp_weight: float = 0.0,
        return_logits: bool | None = None,
    ) -> Output:
        """Run a batch.

        Args:
            tokens_BT: int64 (B, T), T at most config.max_position.
            labels_BT: int64 (B, T), the token after each of tokens_BT; -100 is ignored.
            alpha: weight of the sequence-wise balance loss.
            mtp_weight: the paper's lambda. MTP runs when this is above 0 or logits are returned.
            return_logits: default: only without labels.
        """
        self._check(tokens_BT, labels_BT)
        with_logits = labels_BT is None if return_logits is None else return_logits
        sequences = self.sequences(tokens_BT)
        h_TD, routings = self._main(tokens_BT, sequences)
        mtp_hidden: list[Tensor] = []
        mtp_routings: list[Routing] = []
        if with_logits or (labels_BT is not None and mtp_weight > 0):
            mtp_hidden, mtp_routings = self._mtp(tokens_BT, labels_BT, h_TD, sequences)
        loss = main_loss = mtp_loss = balance = None
        if labels_BT is not None:
            main_loss = self._cross_entropy(h_TD, labels_BT)
            mtp_loss = self._mtp_loss(mtp_hidden, labels_BT)
            balance = self._balance_loss(routings + (mtp_routings if mtp_weight > 0 else []), sequences, alpha)
            loss = main_loss + mtp_weight * mtp_loss + balance
        shape = tokens_BT.shape
        return Output(
            logits_BTV=self.head(h_TD.unflatten(0, shape)) if with_logits else None,
            mtp_logits=tuple(self.head(h.unflatten(0, shape)) for h in mtp_hidden) if with_logits else (),
            loss=loss,
            main_loss=main_loss,
            mtp_loss=mtp_loss,
            balance_loss=balance,
            expert_counts_LE=self._counts(routings + mtp_routings, tokens_BT.device),
        )

    def sequences(self, tokens_BT: Tensor) -> Sequences:
        """B sequences of T tokens each, positions from 0."""
        batch, length = tokens_BT.shape
        positions_T = torch.arange(length, device=tokens_BT.device).repeat(batch)
        cu_seqlens = torch.arange(batch + 1, device=tokens_BT.device, dtype=torch.int32) * length
        return Sequences(*rope_tables(self.config, positions_T), cu_seqlens)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor, step: DecodeStep, caches: list[Tensor]) -> Tensor:
        """Normed hidden states (B, L, D) of new tokens over the main blocks' latent caches, which it extends.

        caches: of all blocks, main ones first; those of MTP blocks may be left out.
        """
        x_TD = self.embed_tokens(tokens_BL.flatten())
        for block, cache in zip(self.main_blocks, caches, strict=False):
            x_TD = block.decode(x_TD, step, cache)
        h_TD: Tensor = self.norm(x_TD)
        return h_TD.unflatten(0, tokens_BL.shape)

    @torch.no_grad()
    def decode_mtp(self, next_BL: Tensor, hidden_BLD: Tensor, step: DecodeStep, cache: Tensor) -> Tensor:
        """Normed hidden states (B, L, D) of the first MTP block, whose head tells the token after `next_BL`.

        hidden_BLD: of the tokens before next_BL, from `decode` or from an earlier call of this. step: that of those.
        """
        block = self.mtp_blocks[0]
        x_TD = block.merge(self.embed_tokens(next_BL.flatten()), hidden_BLD.flatten(0, 1))
        h_TD: Tensor = block.shared_head["norm"](block.decode(x_TD, step, cache))
        return h_TD.unflatten(0, next_BL.shape)

    def _check(self, tokens_BT: Tensor, labels_BT: Tensor | None) -> None:
        if tokens_BT.dim() != 2 or not 0 < tokens_BT.shape[1] <= self.config.max_position:
            limit = self.config.max_position
            raise ValueError(
                f"Transformer: tokens_BT must have shape (B, 1..{limit} (max_position)), got {tuple(tokens_BT.shape)}"
            )
        if labels_BT is not None and labels_BT.shape != tokens_BT.shape:
            raise ValueError(
                f"Transformer: labels_BT must have shape {tuple(tokens_BT.shape)}, got {tuple(labels_BT.shape)}"
            )

    def _main(self, tokens_BT: Tensor, sequences: Sequences) -> tuple[Tensor, list[Routing]]:
        """Hidden states after the final norm, (B * T, D), and the routings of the MoE layers."""
        x_TD = self.embed_tokens(tokens_BT.flatten())
        routings: list[Routing] = []
        for block in self.main_blocks:
            x_TD, routing = block(x_TD, sequences)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_TD), routings

    def _mtp(
        self, tokens_BT: Tensor, labels_BT: Tensor | None, h_TD: Tensor, sequences: Sequences
    ) -> tuple[list[Tensor], list[Routing]]:
        """Normed hidden states of each depth, each fed by the one before, and their routings."""
        hidden: list[Tensor] = []
        routings: list[Routing] = []
        for depth, block in enumerate(self.mtp_blocks, start=1):
            next_TD = self.embed_tokens(shifted_tokens(tokens_BT, labels_BT, depth).flatten())
            x_TD, routing = block(block.merge(next_TD, h_TD), sequences)
            h_TD = block.shared_head["norm"](x_TD)
            hidden.append(h_TD)
            routings.append(routing)
        return hidden, routings

    def _cross_entropy(self, h_TD: Tensor, labels_BT: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h_TD, self.lm_head.weight, labels_BT.flatten())

    def _mtp_loss(self, hidden: list[Tensor], labels_BT: Tensor) -> Tensor:
        losses = [self._cross_entropy(h, shifted_labels(labels_BT, depth)) for depth, h in enumerate(hidden, start=1)]
        return torch.stack(losses).mean() if losses else self._zero(labels_BT.device)

    def _balance_loss(self, routings: list[Routing], sequences: Sequences, alpha: float) -> Tensor:
        if alpha == 0 or not routings:
            return self._zero(sequences.cu_seqlens.device)
        losses = [ops.balance_loss(r.scores_TE, r.idx_TK, sequences.cu_seqlens, alpha=alpha) for r in routings]
        return torch.stack(losses).sum()

    def _counts(self, routings: list[Routing], device: torch.device) -> Tensor:
        """(L, E) int64; layers that did not run count 0."""
        rows = [routing.counts_E for routing in routings]
        missing = len(self.moe_layers) - len(rows)
        idle = torch.zeros(missing, self.config.num_experts, dtype=torch.int64, device=device)
        return torch.cat([torch.stack(rows), idle]) if rows else idle

    @staticmethod
    def _zero(device: torch.device) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=device)
