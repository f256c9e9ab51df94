"""A MoE block whose experts are spread over ranks, forward and backward as a pipeline runs it, on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsv3rt.config import ModelConfig
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.moe import Experts, MoE
from dsv3rt.layers.precision import set_precision
from dsv3rt.model.block import Block
from dsv3rt.parallel.pipeline.experts import Phases, routed_experts
from dsv3rt.parallel.pipeline.lanes import Lanes, Walk
from dsv3rt.parallel.pipeline.tape import Tape

DIM, TOP_K, LOCAL = 128, 3, 2  # LOCAL: experts of a rank


def block_of(rank: int, size: int, precision: str) -> Block:
    """The same on all ranks but for the experts, of which each has its own."""
    config = ModelConfig(
        dim=DIM, expert_dim=128, num_experts=LOCAL * size, top_k=TOP_K, num_expert_groups=1, num_groups_kept=1,
        num_heads=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        num_dense_layers=0,
    )  # fmt: skip
    torch.manual_seed(7)
    block = Block(config, 0, dtype=torch.bfloat16 if precision == "fp8" else torch.float32)
    moe = moe_of(block)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    moe.gate.e_score_correction_bias.zero_()
    assert isinstance(moe.experts, Experts)
    for name, parameter in list(moe.experts.named_parameters()):
        here = parameter.detach()[LOCAL * rank : LOCAL * (rank + 1)]
        setattr(moe.experts, name, nn.Parameter(here.clone()))
    set_precision(block, precision, ())
    return block


def moe_of(block: Block) -> MoE:
    assert isinstance(block.mlp, MoE)
    return block.mlp


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Weight gradients of rows that are cast together in columns of 128, in other columns. E4M3 then rounds other
    numbers, by 2^-4 / sqrt(3) of their size in the mean: in both factors, and in either run, 0.072 of the gradient's
    own norm."""
    return float((ours - theirs).norm()) <= 0.08 * float(theirs.norm())


@dataclass
class Passed:
    """What a forward and a backward gave of a rank's tokens."""

    y_TD: Tensor
    dresidual_TD: Tensor
    dh_TD: Tensor
    dgate_TK: Tensor


def forward_and_backward(
    block: Block, lanes: Lanes, x_TD: Tensor, dy_TD: Tensor, queue: WeightGrads | None = None
) -> Passed:
    """From the residual stream, the normed tokens and the gates on. queue: weight gradients are put off."""
    with torch.no_grad():
        routed = block.route(x_TD)
    assert routed.routing is not None
    residual_TD, h_TD, gate_TK = (x.detach().requires_grad_() for x in (x_TD, routed.h_TD, routed.routing.weight_TK))
    routed = replace(routed, x_TD=residual_TD, h_TD=h_TD, routing=replace(routed.routing, weight_TK=gate_TK))
    tape, found = Tape(lanes), []

    def phases() -> Phases:
        found.append((yield from routed_experts(block, routed, Ledger(queue), lanes, tape)))
        return found[0]

    Walk(phases(), lanes).finish()
    (y_TD,) = found
    y_TD.grad = dy_TD
    Walk(tape.backward(), lanes).finish()
    if queue is not None:
        queue.run()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (residual_TD, h_TD, gate_TK)]
    return Passed(y_TD.detach(), *gradients)
