"""Batches for the expert exchange: what every rank holds, and what one process would make of all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.types import Permutation, QuantTensor, Routing, round_up

ROUTERS = ("even", "skewed", "one rank", "one expert", "no tokens here")


@dataclass(frozen=True)
class Shape:
    num_ranks: int
    num_experts: int
    max_tokens: int
    top_k: int
    num_columns: int
    block: int = 128

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def worst_case(self) -> int:
        """Rows of a rank whatever the router does."""
        rows = self.num_ranks * self.max_tokens * min(self.top_k, self.num_local)
        return round_up(rows, self.block) + self.num_local * self.block


@dataclass(frozen=True)
class Batch:
    """Of all ranks, on the CPU: rank r's tokens are starts[r] .. starts[r + 1]."""

    starts: list[int]
    x_TD: Tensor
    idx_TK: Tensor
    weight_TK: Tensor
    dy_TD: Tensor

    def mine(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank + 1])

    def routing(self, tokens: slice = slice(None)) -> Routing:
        return Routing(self.idx_TK[tokens], self.weight_TK[tokens], torch.empty(0), torch.empty(0))


def draw(shape: Shape, seed: int, router: str) -> Batch:
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, shape.max_tokens + 1, (shape.num_ranks,), generator=random)
    if router == "no tokens here":
        counts[seed % shape.num_ranks] = 0
        counts[(seed + 1) % shape.num_ranks] = shape.max_tokens
    starts = [0, *counts.cumsum(0).tolist()]
    num_tokens = starts[-1]
    scores = torch.rand(num_tokens, shape.num_experts, generator=random)
    if router == "skewed":
        scores += 2.0 / (1 + torch.randperm(shape.num_experts, generator=random))
    elif router == "one rank":
        first = seed % shape.num_ranks * shape.num_local
        scores[:, first : first + shape.num_local] += 1
    elif router == "one expert":
        scores[:, seed % shape.num_experts] += 1
    x_TD, dy_TD = torch.randn(2, num_tokens, shape.num_columns, generator=random).bfloat16()
    weight_TK = torch.rand(num_tokens, shape.top_k, generator=random)
    idx_TK = scores.argsort(dim=1, descending=True)[:, : shape.top_k].contiguous()
    return Batch(starts, x_TD, idx_TK, weight_TK, dy_TD)


def full_batch(shape: Shape, seed: int) -> Batch:
    """Every rank has as many tokens as it may have."""
    random = torch.Generator().manual_seed(seed)
    num_tokens = shape.num_ranks * shape.max_tokens
    x_TD, dy_TD = torch.randn(2, num_tokens, shape.num_columns, generator=random).bfloat16()
    weight_TK = torch.rand(num_tokens, shape.top_k, generator=random)
    idx_TK = torch.rand(num_tokens, shape.num_experts, generator=random).argsort(dim=1)[:, : shape.top_k].contiguous()
    return Batch([r * shape.max_tokens for r in range(shape.num_ranks + 1)], x_TD, idx_TK, weight_TK, dy_TD)


def factor_of(expert_E: Tensor) -> Tensor:
    """What stands for the experts: a row times a number of its expert, exact in BF16."""
    return (1 + expert_E.remainder(32) / 32).bfloat16()


def row_factors(counts_X: Tensor, offsets: Tensor, first: int, num_rows: int) -> Tensor:
    """(P, 1): the factor of each row's expert; ones where there is no row. Reads nothing on the host."""
    row_P = torch.arange(num_rows, device=counts_X.device)
    expert_P = torch.searchsorted(offsets[1:].contiguous(), row_P, right=True).clamp(max=counts_X.numel() - 1)
    return factor_of(expert_P + first)[:, None]


@dataclass(frozen=True)
class Whole:
    """One process's results on the CPU, with the permutation of all ranks' tokens."""

    rows_PD: Tensor
    counts_E: Tensor
    offsets: Tensor
    permutation: Permutation
    y_TD: Tensor
    dx_TD: Tensor
    dweight_TK: Tensor
    out_TKD: Tensor

    def local(self, shape: Shape, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, counts and offsets of a rank's experts."""
        here = slice(rank * shape.num_local, (rank + 1) * shape.num_local)
        first, last = self.offsets[here.start], self.offsets[here.stop]
        offsets = self.offsets[here.start : here.stop + 1] - first
        return self.rows_PD[first:last], self.counts_E[here], offsets


def rounded(batch: Batch) -> Batch:
    """With tokens that their cast to FP8 gives back."""
    return replace(batch, x_TD=ops.dequantize(ops.quantize_1x128(batch.x_TD), torch.bfloat16))


def low_latency(
    x_TD: Tensor, routing: Routing, group: ops.EpGroup, first_expert: int
) -> tuple[QuantTensor, ops.EpRoute, Tensor]:
    """Rows, their route and results of the low-latency form."""
    rows, route = ops.ep_receive(ops.ep_send(x_TD, routing, group))
    factor = row_factors(route.layout.counts_X, route.layout.offsets, first_expert, rows.shape[0])
    returned = ops.ep_send_back(ops.dequantize(rows, torch.bfloat16) * factor, route, group)
    return rows, route, ops.ep_collect(returned, weight_TK=routing.weight_TK)


def compact(rows: QuantTensor, counts_X: Tensor) -> tuple[Tensor, Tensor]:
    """Data (as bytes) and scales of the rows that a masked layout holds, close together, on the CPU."""
    data, scale, counts = rows.data.view(torch.uint8).cpu(), rows.scale.cpu(), counts_X.tolist()
    capacity = data.shape[0] // len(counts)
    kept = torch.cat([torch.arange(n) + x * capacity for x, n in enumerate(counts)])
    return data[kept], scale[kept]


def compact_of_whole(shape: Shape, batch: Batch, rank: int) -> tuple[Tensor, Tensor]:
    """What `compact` finds at a rank."""
    q = ops.quantize_1x128(batch.x_TD)
    want, layout, _ = ops.permute(q, batch.routing(), num_experts=shape.num_experts, block=1)
    first, last = layout.offsets[[rank * shape.num_local, (rank + 1) * shape.num_local]].tolist()
    return want.data.view(torch.uint8)[first:last], want.scale[first:last]


def compute(shape: Shape, batch: Batch) -> Whole:
    x_TD, weight_TK = batch.x_TD.clone().requires_grad_(), batch.weight_TK.clone().requires_grad_()
    rows_PD, layout, permutation = ops.permute(x_TD, batch.routing(), num_experts=shape.num_experts, block=shape.block)
    out_PD = rows_PD * row_factors(layout.counts_X, layout.offsets, 0, rows_PD.shape[0])
    y_TD = ops.unpermute(out_PD, permutation, weight_TK)
    y_TD.backward(batch.dy_TD)
    assert x_TD.grad is not None
    assert weight_TK.grad is not None
    return Whole(
        rows_PD.detach(),
        layout.counts_X,
        layout.offsets,
        permutation,
        y_TD.detach(),
        x_TD.grad,
        weight_TK.grad,
        out_PD.detach()[permutation.row_of_TK],
    )
