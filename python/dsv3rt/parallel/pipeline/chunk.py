"""One micro-batch in one stage: forward and backward as phases, and what the losses get from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.mla import Sequences
from dsv3rt.model.block import Block, Routed
from dsv3rt.model.mtp import MTPBlock, shifted_labels, shifted_tokens
from dsv3rt.model.transformer import Transformer
from dsv3rt.parallel.pipeline.experts import Phases, routed_experts
from dsv3rt.parallel.pipeline.lanes import Lanes, OfChunk, Phase
from dsv3rt.parallel.pipeline.tape import Tape


@dataclass(frozen=True)
class Stage:
    """A stage of the model: main blocks by layer number, the embedding before them, norm, head and MTP after them."""

    model: Transformer
    layers: range
    is_first: bool
    is_last: bool

    @property
    def shared(self) -> list[nn.Parameter]:
        """The parameters that are used several times: their gradients are complete when the backward is."""
        embeds = self.is_first or (self.is_last and self.model.config.mtp_depth > 0)
        used = [self.model.embed_tokens] * embeds + [self.model.lm_head] * self.is_last
        return [module.weight for module in used]

    def block(self, layer: int) -> Block:
        block = self.model.layers[layer]
        assert isinstance(block, Block)
        return block


@dataclass(frozen=True)
class MicroBatch:
    """tokens_BT and labels_BT, int64 on the device."""

    tokens_BT: Tensor
    labels_BT: Tensor


@dataclass(frozen=True)
class Rule:
    """How a step's micro-batches are computed: the weights of the losses, this micro-batch's share of the batch (what
    its gradients are scaled by), and what the backward computes again."""

    alpha: float = 0.0
    mtp_weight: float = 0.0
    share: float = 1.0
    recompute: frozenset[str] = frozenset()


class Chunk:
    """A micro-batch on its way through a stage.

    Run `forward` and then `backward` to their ends, in the steps that they name. Between them `output` goes to the next
    stage; after the backward `input_grad` goes to the one before.
    """

    def __init__(
        self, stage: Stage, batch: MicroBatch, rule: Rule, lanes: Lanes, weight_grads: WeightGrads | None = None
    ) -> None:
        self._stage = stage
        self._batch = batch
        self._rule = rule
        self._weight_grads = weight_grads
        self._lanes = lanes
        self._tape = Tape(lanes)
        self._sequences: Sequences = stage.model.sequences(batch.tokens_BT)
        self._input: Tensor | None = None
        self._balance: list[Tensor] = []
        self._total: Tensor | None = None
        self.output: Tensor | None = None
        self.input_grad: Tensor | None = None
        self.counts: dict[int, Tensor] = {}
        self.losses = torch.zeros(3, dtype=torch.float32, device=batch.tokens_BT.device)  # main, MTP, balance

    def forward(self, x_TD: Tensor | None) -> Iterator[Phase | OfChunk]:
        """x_TD: from the stage before; None in the first stage."""
        if self._stage.is_first:
            yield "head"
            (x_TD,) = self._tape.cut("head", self._stage.model.embed_tokens(self._batch.tokens_BT.flatten()))
        else:
            assert x_TD is not None
            x_TD.requires_grad_(torch.is_grad_enabled())
            self._input = x_TD
        assert x_TD is not None
        for layer in self._stage.layers:
            x_TD = yield from self._block(layer, x_TD)
        if self._stage.is_last:
            yield from self._heads(x_TD)
        else:
            self.output = x_TD
        yield "head"
        self._sum_up()

    def backward(self, dy_TD: Tensor | None, take: Callable[[Tensor], None]) -> Iterator[Phase | OfChunk]:
        """dy_TD: from the stage after; None in the last. `take` gets the shared parameters once they have gradients."""
        if self._total is not None:  # a few scalars: no phase of its own, which would put the others out of step
            (self._total * self._rule.share).backward()
            self._total = None
        if self.output is not None:
            self.output.grad, self.output = dy_TD, None
        yield from self._tape.backward()
        for parameter in self._stage.shared:
            take(parameter)
        if self._input is not None:
            self.input_grad, self._input = self._input.grad, None

    def _block(self, layer: int, x_TD: Tensor) -> Phases:
        block, tape = self._stage.block(layer), self._tape
        ledger = self._ledger(self._rule.recompute)
        yield "attention"
        routed = block.route(block.attention(x_TD, self._sequences, ledger), ledger)
        if routed.routing is None:
            residual_TD, h_TD = tape.cut("attention", routed.x_TD, routed.h_TD)
            routed = dataclasses.replace(routed, x_TD=residual_TD, h_TD=h_TD)
            yield "experts"
            (y_TD,) = tape.cut("experts", block.combine(routed, None, block.experts(routed, None, ledger)))
        else:
            routing = routed.routing
            self.counts[layer] = routing.counts_E
            cuts = routed.x_TD, routed.h_TD, routing.weight_TK, *self._balance_of(layer, routing)
            residual_TD, h_TD, weight_TK, *balance = tape.cut("attention", *cuts)
            self._balance += balance
            routing = dataclasses.replace(routing, weight_TK=weight_TK)
            routed = dataclasses.replace(routed, x_TD=residual_TD, h_TD=h_TD, routing=routing)
            if "experts" in self._rule.recompute:
                y_TD = yield from self._experts_twice(block, routed)
            else:
                y_TD = yield from routed_experts(block, routed, ledger, self._lanes, tape)
        if ledger.discard():
            tape.add(lambda: _restore(ledger))
        return y_TD

    def _ledger(self, recompute: frozenset[str] = frozenset()) -> Ledger:
        return Ledger(self._weight_grads, recompute, self._lanes.product_sms)

    def _experts_twice(self, block: Block, routed: Routed) -> Phases:
        """Nothing is kept but what goes in: the backward does it again, all-to-alls included."""
        y_TD = yield from routed_experts(block, routed, Ledger(product_sms=self._lanes.product_sms), self._lanes, None)
        y_TD.requires_grad_(torch.is_grad_enabled())

        def again() -> Iterator[Phase | OfChunk]:
            tape = Tape(self._lanes)
            ledger = self._ledger()
            second_TD = yield from routed_experts(block, routed, ledger, self._lanes, tape)
            second_TD.grad = y_TD.grad
            yield from tape.backward()

        self._tape.add(again)
        return y_TD

    def _balance_of(self, layer: int, routing: ops.Routing) -> list[Tensor]:
        is_main = layer < self._stage.model.config.num_layers
        if self._rule.alpha == 0 or not (is_main or self._rule.mtp_weight > 0):
            return []
        cu_seqlens = self._sequences.cu_seqlens
        return [ops.balance_loss(routing.scores_TE, routing.idx_TK, cu_seqlens, alpha=self._rule.alpha)]

    def _heads(self, x_TD: Tensor) -> Iterator[Phase | OfChunk]:
        """Norm, MTP blocks, and the cross-entropies of both."""
        model, tape = self._stage.model, self._tape
        tokens_BT, labels_BT = self._batch.tokens_BT, self._batch.labels_BT
        yield "head"
        h_TD: Tensor = model.norm(x_TD)
        hidden: list[Tensor] = []
        for depth in range(1, 1 + (model.config.mtp_depth if self._rule.mtp_weight > 0 else 0)):
            layer = model.config.num_layers + depth - 1
            block = self._stage.block(layer)
            assert isinstance(block, MTPBlock)
            ledger = self._ledger()
            next_TD = model.embed_tokens(shifted_tokens(tokens_BT, labels_BT, depth).flatten())
            # In one piece with its input, whose gradient then sums up as it does in a backward that isn't cut.
            h_TD, x_TD = tape.cut("head", h_TD, block.merge(next_TD, h_TD, ledger))
            hidden.append(h_TD)
            x_TD = yield from self._block(layer, x_TD)
            yield "head"
            h_TD = block.shared_head["norm"](x_TD)
        hidden += tape.cut("head", h_TD)
        labels = [labels_BT, *(shifted_labels(labels_BT, depth) for depth in range(1, len(hidden)))]
        losses = []
        for h_TD, labels_BT in zip(hidden, labels, strict=True):
            loss = ops.linear_cross_entropy(h_TD, model.lm_head.weight, labels_BT.flatten())
            losses += tape.cut("head", loss)
        self._mix(losses[0], losses[1:])

    def _mix(self, main: Tensor, mtp: list[Tensor]) -> None:
        mtp_loss = torch.stack(mtp).mean() if mtp else torch.zeros_like(main)
        self._total = main + self._rule.mtp_weight * mtp_loss
        self.losses[:2] = torch.stack([main, mtp_loss]).detach()

    def _sum_up(self) -> None:
        """The part of the loss that this stage knows of, as `Transformer.forward` sums it."""
        if self._balance:
            balance = torch.stack(self._balance).sum()
            self._total = balance if self._total is None else self._total + balance
            self.losses[2] = balance.detach()
            self._balance = []


def _restore(ledger: Ledger) -> Iterator[Phase]:
    yield "attention"
    ledger.restore()
