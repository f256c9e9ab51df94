"""What several processes find of the exchange over gloo: `torchrun -m tests.parallel.ep_worker OUT.json`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.errors import ExchangeError
from dsv3rt.layers.moe import MoE
from dsv3rt.parallel.eplb import place_globally
from dsv3rt.parallel.expert import ExpertExchange
from tests.gpu.ep_cases import (
    ROUTERS,
    Batch,
    Shape,
    Whole,
    compact,
    compact_of_whole,
    compute,
    draw,
    low_latency,
    rounded,
    row_factors,
)
from tests.gpu.ep_placement import Served, placements
from tests.gpu.ep_weights import check_gradient_of_weights, forward_with_weights, wanted, weights_by_row


def findings(group: ops.EpGroup, shape: Shape, batch: Batch, whole: Whole) -> dict[str, bool]:
    rank = dist.get_rank()
    tokens = batch.mine(rank)
    x_TD = batch.x_TD[tokens].clone().requires_grad_()
    routing = batch.routing(tokens)
    routing.weight_TK.requires_grad_()
    want_PD, counts_X, offsets = whole.local(shape, rank)
    capacity = group.worst_case(shape.max_tokens, shape.top_k, shape.block)
    rows_PD, route = ops.ep_dispatch(x_TD, routing, group, block=shape.block, capacity=capacity)
    factor = row_factors(route.layout.counts_X, route.layout.offsets, rank * shape.num_local, capacity)
    y_TD = ops.ep_combine(rows_PD * factor, route, group, weight_TK=routing.weight_TK)
    y_TD.backward(batch.dy_TD[tokens])
    assert x_TD.grad is not None
    assert routing.weight_TK.grad is not None
    return {
        "counts": torch.equal(route.layout.counts_X, counts_X),
        "offsets": torch.equal(route.layout.offsets, offsets),
        "rows": torch.equal(rows_PD[: len(want_PD)], want_PD) and not bool(rows_PD[len(want_PD) :].any()),
        "result": torch.equal(y_TD, whole.y_TD[tokens]),
        "gradient": torch.equal(x_TD.grad, whole.dx_TD[tokens]),
        "weight gradient": torch.equal(routing.weight_TK.grad, whole.dweight_TK[tokens]),
        "quantised": quantised(group, shape, batch, whole),
        **with_weights(group, shape, batch, whole),
        **in_halves(group, shape, batch),
    }


def with_weights(group: ops.EpGroup, shape: Shape, batch: Batch, whole: Whole) -> dict[str, bool]:
    """Rows get their weights along, for experts that multiply by them."""
    rank = dist.get_rank()
    tokens = batch.mine(rank)
    x_TD, routing = batch.x_TD[tokens].clone().requires_grad_(), batch.routing(tokens)
    routing = replace(routing, weight_TK=routing.weight_TK.clone().requires_grad_())
    rows_PD, weight_P, y_TD, route = forward_with_weights(x_TD, routing, group, shape, rank, in_rooms=False)
    y_TD.backward(batch.dy_TD[tokens])
    assert x_TD.grad is not None
    assert routing.weight_TK.grad is not None
    want_PD, _, _ = whole.local(shape, rank)
    first = int(whole.offsets[rank * shape.num_local])
    want_TD, want_dx_TD = wanted(batch, tokens)
    check_gradient_of_weights(routing.weight_TK.grad, batch, tokens)
    return {
        "rows with weights": torch.equal(rows_PD[: len(want_PD)], want_PD),
        "weights": torch.equal(weight_P, weights_by_row(batch, len(want_PD), first, whole.permutation)),
        "result with weights": torch.equal(y_TD, want_TD),
        "gradient with weights": torch.equal(x_TD.grad, want_dx_TD),
        "no room": ops.ep_room(route, group) is None,
    }


def quantised(group: ops.EpGroup, shape: Shape, batch: Batch, whole: Whole) -> bool:
    rank = dist.get_rank()
    tokens = batch.mine(rank)
    rows, _ = ops.ep_dispatch(ops.quantize_1x128(batch.x_TD[tokens]), batch.routing(tokens), group, block=shape.block)
    want, _, _ = ops.permute(
        ops.quantize_1x128(batch.x_TD), batch.routing(), num_experts=shape.num_experts, block=shape.block
    )
    first, last = whole.offsets[[rank * shape.num_local, (rank + 1) * shape.num_local]].tolist()

    def same(got: Tensor, of_all: Tensor) -> bool:
        return torch.equal(got, of_all[first:last])

    return same(rows.data.view(torch.uint8), want.data.view(torch.uint8)) and same(rows.scale, want.scale)


def in_halves(group: ops.EpGroup, shape: Shape, batch: Batch) -> dict[str, bool]:
    rank = dist.get_rank()
    tokens = batch.mine(rank)
    rows, route, y_TD = low_latency(batch.x_TD[tokens], batch.routing(tokens), group, rank * shape.num_local)
    data, scale = compact(rows, route.layout.counts_X)
    want_data, want_scale = compact_of_whole(shape, batch, rank)
    return {
        "low-latency rows": torch.equal(data, want_data) and torch.equal(scale, want_scale),
        "low-latency result": torch.equal(y_TD, compute(shape, rounded(batch)).y_TD[tokens]),
    }


def overflow(group: ops.EpGroup, shape: Shape) -> str:
    """What a rank hears when the rows of rank 0 do not fit: all choices are of its experts."""
    x_TD = torch.ones(shape.max_tokens, shape.num_columns)
    idx_TK = torch.arange(shape.top_k).repeat(shape.max_tokens, 1)
    weight_TK = torch.ones(idx_TK.shape)
    try:
        ops.ep_dispatch(x_TD, ops.Routing(idx_TK, weight_TK, weight_TK, weight_TK), group, block=1, capacity=95)
    except ExchangeError as error:
        return str(error)
    return "nothing"


@torch.no_grad()
def replicated() -> dict[str, bool]:
    """A layer whose most loaded experts have replicas on other ranks, against the layer in one process.

    Rows of an expert come in another number on each replica, and a product of another height may add in another order:
    hence the tolerance, of some roundings of FP32.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    config = ModelConfig(
        dim=32, expert_dim=16, num_experts=2 * size, top_k=2, num_expert_groups=1, num_groups_kept=1, ffn_dim=32
    )
    alone, spread = MoE(config), MoE(config)
    for parameter in alone.parameters():
        parameter.normal_(std=0.3)
    alone.gate.e_score_correction_bias.zero_()
    spread.load_state_dict(alone.state_dict())
    x_TD = torch.randn(40, config.dim)[: 40 - 8 * (rank == 0)]
    load_E = torch.bincount(alone.route(x_TD).idx_TK.flatten(), minlength=config.num_experts)
    dist.all_reduce(load_E)
    placement = place_globally(load_E.tolist(), 3 * size, size)
    here = torch.tensor(placement.experts_on(rank))
    for name in ("gate_up_proj", "down_proj"):
        setattr(spread.experts, name, torch.nn.Parameter(getattr(alone.experts, name)[here]))
    spread.exchange = ExpertExchange(dist.group.WORLD, size, placement)
    (want_TD, _), (got_TD, _) = alone(x_TD), spread(x_TD)
    replicas = [len(slots) for slots in placement.slots_of_experts()]
    return {
        "result of replicas": torch.allclose(got_TD, want_TD, rtol=1e-5, atol=1e-6),
        "some experts have replicas, some not": min(replicas) == 1 < max(replicas),
    }


def placed(shape: Shape) -> dict[str, bool]:
    """The same to the bit, with experts whose rows do not depend on one another."""
    like_TD = torch.empty(shape.max_tokens, shape.num_columns)
    for placement in placements(draw(shape, 9, "skewed"), shape).values():
        for with_gates in (False, True):
            served = Served(placement, shape, dist.get_rank(), like_TD, with_gates=with_gates)
            for seed, router in enumerate(ROUTERS):
                served.check(draw(shape, seed, router))  # raises what differs
    return {"placed": True}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    shape = Shape(size, 4 * size, 24, 4, 256, block=16)
    limits = ops.EpLimits(shape.max_tokens, shape.top_k, shape.num_columns, low_latency=True)
    group = ops.EpGroup(dist.group.WORLD, shape.num_experts, limits=limits)
    found: dict[str, object] = {}
    for seed, router in enumerate(ROUTERS):
        batch = draw(shape, seed, router)
        found[router] = findings(group, shape, batch, compute(shape, batch))
    found["replicated"] = {**replicated(), **placed(shape)}
    found["overflow"] = overflow(group, shape)
    everyone: list[object] = [None] * size
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
