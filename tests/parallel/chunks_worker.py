"""A MoE block on several processes, chunk by chunk and at once: `torchrun -m tests.parallel.chunks_worker OUT.json`."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3rt.layers import fp8, main_grad
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.ops.types import GroupLayout
from dsv3rt.parallel.expert import ExpertExchange
from dsv3rt.parallel.pipeline.lanes import Lanes
from tests.gpu.ep_layer import DIM, LOCAL, Passed, alike, block_of, forward_and_backward, moe_of

KINDS = ("stand-in", "stand-in with gates", "fp32", "fp8")
LANES = Lanes(torch.device("cpu"))


def token_counts(size: int) -> dict[str, list[int]]:
    """Of each rank. Three chunks of two tokens leave one without any."""
    return {
        "many": [40 + 3 * rank for rank in range(size)],
        "few": [2] * size,
        "none at one": [0, *[7] * (size - 1)],
        "none": [0] * size,
    }


class StandIn(nn.Module):
    """Experts whose rows cannot depend on one another, nor on how many there are: times a number of their expert."""

    def __init__(self, numbers_X: Tensor, *, is_fp8: bool) -> None:
        super().__init__()
        self.numbers = nn.Parameter(numbers_X)
        self.is_fp8 = is_fp8  # gates come along then

    def forward(self, rows_PD: Tensor, layout: GroupLayout, ledger: Ledger | None, gates: fp8.Weighed | None) -> Tensor:
        assert (gates is not None) == self.is_fp8
        row_P = torch.arange(rows_PD.shape[0])
        expert_P = torch.searchsorted(layout.offsets[1:].contiguous(), row_P, right=True)
        number_P = self.numbers[expert_P.clamp(max=layout.counts_X.numel() - 1)]
        return rows_PD * (number_P if gates is None else number_P * gates.gate_P)[:, None]


def add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def run(kind: str, tokens: int, chunks: int, *, puts_off: bool) -> tuple[Passed, dict[str, Tensor]]:
    """And the weights' gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    block = block_of(rank, size, "fp8" if kind == "fp8" else "bf16")
    moe = moe_of(block)
    if kind.startswith("stand-in"):
        moe.experts = StandIn(torch.randn(LOCAL * size)[LOCAL * rank :][:LOCAL], is_fp8="gates" in kind)  # type: ignore[assignment]
    moe.exchange = ExpertExchange(dist.group.WORLD, size, carries_gates=moe.experts.is_fp8, num_chunks=chunks)
    random = torch.Generator().manual_seed(rank)
    x_TD, dy_TD = (torch.randn(tokens, DIM, generator=random).to(moe.gate.weight.dtype) for _ in range(2))
    passed = forward_and_backward(block, LANES, x_TD, dy_TD, WeightGrads(add) if puts_off else None)
    weights = {name: p.grad if p.grad is not None else main_grad.of(p).grad for name, p in moe.named_parameters()}
    return passed, {name: dw for name, dw in weights.items() if dw is not None}


def findings(kind: str, tokens: int, chunks: int, *, puts_off: bool) -> dict[str, bool]:
    one, one_weights = run(kind, tokens, 1, puts_off=puts_off)
    got, weights = run(kind, tokens, chunks, puts_off=puts_off)
    again, again_weights = run(kind, tokens, chunks, puts_off=puts_off)
    same = {"fp32": near, "fp8": with_few_flips}.get(kind, torch.equal)
    found = {"weights": weights.keys() == one_weights.keys() and len(weights) > 3}
    for name in [field.name for field in fields(Passed)]:
        ours, theirs = getattr(got, name), getattr(one, name)
        found[name] = same(ours, theirs)
        found[f"{name} again"] = torch.equal(ours, getattr(again, name))
    for name, theirs in one_weights.items():
        is_cast = kind == "fp8" and name.startswith("experts.")
        found[name] = (alike if is_cast else near)(weights[name], theirs)
        found[f"{name} again"] = torch.equal(weights[name], again_weights[name])
    return found


def near(ours: Tensor, theirs: Tensor) -> bool:
    """But for sums of some hundred terms in another order: FP32 rounds to 6e-8 of the largest."""
    largest = float(theirs.abs().amax()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=1e-5 * largest)


def with_few_flips(ours: Tensor, theirs: Tensor) -> bool:
    """Products in FP32 differ by some 1e-7. That moves few numbers to the next one in BF16, or in FP8, by 2^-4 of one
    of the 128 that make up a row: 2^-4 / sqrt(128) = 0.0055 of the row, if it happened in each."""
    return float((ours - theirs).norm()) <= 0.006 * float(theirs.norm())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for kind in KINDS:
        for name, counts in token_counts(size).items():
            for chunks in (2, 3):
                for puts_off in (False, True)[: 1 if kind.startswith("stand-in") else 2]:
                    case = f"{kind}, {name}, {chunks} chunks{', put off' * puts_off}"
                    found[case] = findings(kind, counts[rank], chunks, puts_off=puts_off)
    everyone: list[object] = [None] * size
    dist.all_gather_object(everyone, found)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
