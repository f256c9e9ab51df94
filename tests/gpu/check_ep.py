"""The expert exchange between real ranks, of one node or of several, against one process's permutation; run by
run_ranks.py.

Bitwise but for the gradients of the weights, whose sums over columns have an order of their own.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt import ops
from dsv3rt.errors import ExchangeError
from dsv3rt.ops.types import QuantTensor, Routing, ceil_div
from tests.gpu.ep_cases import (
    ROUTERS,
    Batch,
    Shape,
    Whole,
    compact,
    compact_of_whole,
    compute,
    draw,
    full_batch,
    low_latency,
    rounded,
    row_factors,
)
from tests.gpu.ep_chunks import check_chunks
from tests.gpu.ep_placement import check_placement
from tests.gpu.ep_ranks import Ranks, captured, equal, on
from tests.gpu.ep_weights import check_gradient_of_weights, forward_with_weights, wanted, weights_by_row


def check_layout(route: ops.EpRoute, whole: Whole, shape: Shape, rank: int) -> Tensor:
    want_PD, counts_X, offsets = whole.local(shape, rank)
    equal("counts", route.layout.counts_X, counts_X)
    equal("offsets", route.layout.offsets, offsets)
    return want_PD


def forward(
    x_TD: Tensor, routing: Routing, group: ops.EpGroup, shape: Shape, rank: int
) -> tuple[Tensor, Tensor, ops.EpRoute]:
    """Rows, results and the route."""
    rows_PD, route = ops.ep_dispatch(x_TD, routing, group, block=shape.block)
    factor = row_factors(route.layout.counts_X, route.layout.offsets, rank * shape.num_local, rows_PD.shape[0])
    return rows_PD, ops.ep_combine(rows_PD * factor, route, group, weight_TK=routing.weight_TK), route


def check_weight_grad(got: Tensor, want: Tensor, batch: Batch, whole: Whole, tokens: slice) -> None:
    """Against FP64; each addition in a row errs by 2^-24 of the sum of magnitudes, at most.

    There are eight in each of a lane's vectors of eight columns, one more to sum the vectors, five to sum the lanes.
    """
    dy, out = batch.dy_TD[tokens].double()[:, None], whole.out_TKD[tokens].double()
    magnitude = (dy * out).abs().sum(dim=2)
    steps = 9 * ceil_div(dy.shape[2], 256) + 5
    error = (got.detach().cpu().double() - (dy * out).sum(dim=2)).abs()
    if not bool((error <= steps * 2.0**-24 * magnitude + 1e-30).all()):
        raise AssertionError(f"weight gradient is off by up to {float(error.max())}, wanted {want.flatten()[:4]}")


def check_bf16(ranks: Ranks, group: ops.EpGroup, shape: Shape, batch: Batch, whole: Whole) -> None:
    tokens = batch.mine(ranks.rank)
    x_TD, routing, dy_TD = on(ranks.device, batch, tokens)
    rows_PD, y_TD, route = forward(x_TD, routing, group, shape, ranks.rank)
    y_TD.backward(dy_TD)
    torch.cuda.synchronize()
    assert group.kernels is not None
    group.kernels.check()
    want_PD = check_layout(route, whole, shape, ranks.rank)
    equal("rows", rows_PD[: want_PD.shape[0]], want_PD)
    equal("result", y_TD, whole.y_TD[tokens])
    assert x_TD.grad is not None
    assert routing.weight_TK.grad is not None
    equal("gradient", x_TD.grad, whole.dx_TD[tokens])
    check_weight_grad(routing.weight_TK.grad, whole.dweight_TK[tokens], batch, whole, tokens)
    again_PD, again_TD, _ = forward(x_TD, routing, group, shape, ranks.rank)
    equal("rows again", again_PD[: want_PD.shape[0]], want_PD)
    equal("result again", again_TD, y_TD.detach().cpu())


def check_with_weights(
    ranks: Ranks, group: ops.EpGroup, shape: Shape, batch: Batch, whole: Whole, *, in_rooms: bool
) -> None:
    """Twice, so that rooms are used again at once."""
    tokens = batch.mine(ranks.rank)
    want_TD, want_dx_TD = wanted(batch, tokens)
    for turn in ("", " again"):
        x_TD, routing, dy_TD = on(ranks.device, batch, tokens)
        rows_PD, weight_P, y_TD, route = forward_with_weights(
            x_TD, routing, group, shape, ranks.rank, in_rooms=in_rooms
        )
        y_TD.backward(dy_TD)
        torch.cuda.synchronize()
        assert group.kernels is not None
        group.kernels.check()
        want_PD = check_layout(route, whole, shape, ranks.rank)
        num_rows, first = want_PD.shape[0], int(whole.offsets[ranks.rank * shape.num_local])
        equal(f"rows with weights{turn}", rows_PD[:num_rows], want_PD)
        equal(f"weights{turn}", weight_P[:num_rows], weights_by_row(batch, num_rows, first, whole.permutation))
        equal(f"fetched result{turn}", y_TD, want_TD)
        assert x_TD.grad is not None
        assert routing.weight_TK.grad is not None
        equal(f"fetched gradient{turn}", x_TD.grad, want_dx_TD)
        check_gradient_of_weights(routing.weight_TK.grad, batch, tokens)


def check_fp8(ranks: Ranks, group: ops.EpGroup, shape: Shape, batch: Batch, whole: Whole) -> None:
    def moved(q: QuantTensor, tokens: slice) -> QuantTensor:
        """Rows of a CPU tensor as a tensor of their own, in the layout that scales have."""
        scale = ops.quantize_1x128(torch.zeros(q.data[tokens].shape)).scale
        scale.copy_(q.scale[tokens])
        strides = scale.stride()
        here = torch.empty_strided(scale.shape, strides, device=ranks.device).copy_(scale)
        return QuantTensor(q.data[tokens].to(ranks.device), here, q.tile)

    tokens = batch.mine(ranks.rank)
    q = ops.quantize_1x128(batch.x_TD)
    want, _, _ = ops.permute(q, batch.routing(), num_experts=shape.num_experts, block=shape.block)
    _, routing, _ = on(ranks.device, batch, tokens)
    rows, route = ops.ep_dispatch(moved(q, tokens), routing, group, block=shape.block)
    torch.cuda.synchronize()
    num_rows = check_layout(route, whole, shape, ranks.rank).shape[0]
    first = int(whole.offsets[ranks.rank * shape.num_local])
    equal("FP8 rows", rows.data[:num_rows], want.data[first : first + num_rows])
    equal("FP8 scales", rows.scale[:num_rows], want.scale[first : first + num_rows])


def check_graph(ranks: Ranks, group: ops.EpGroup, shape: Shape, seeds: range) -> None:
    """A graph of dispatch, combine and both backwards, replayed with other tokens and choices; where rows may have
    their weights along, of such an exchange too."""
    fetches = group.kernels is not None and group.kernels.carries_weights
    count = shape.max_tokens
    x_TD = torch.zeros(count, shape.num_columns, dtype=torch.bfloat16, device=ranks.device).requires_grad_()
    idx_TK = torch.arange(shape.top_k, device=ranks.device).repeat(count, 1)
    weight_TK = torch.ones(count, shape.top_k, device=ranks.device).requires_grad_()
    dy_TD = torch.zeros_like(x_TD)
    routing = Routing(idx_TK, weight_TK, weight_TK, weight_TK)

    def step() -> tuple[Tensor, ...]:
        _, y_TD, _ = forward(x_TD, routing, group, shape, ranks.rank)
        first = (y_TD, *torch.autograd.grad(y_TD, (x_TD, weight_TK), dy_TD))
        if not fetches:
            return first
        _, _, y_TD, _ = forward_with_weights(x_TD, routing, group, shape, ranks.rank, in_rooms=True)
        return (*first, y_TD, *torch.autograd.grad(y_TD, (x_TD, weight_TK), dy_TD))

    graph, replayed = captured(step)
    for seed in seeds:
        batch = full_batch(shape, seed)
        whole, tokens = compute(shape, batch), batch.mine(ranks.rank)
        for target, source in ((x_TD, batch.x_TD), (idx_TK, batch.idx_TK), (weight_TK, batch.weight_TK),
                               (dy_TD, batch.dy_TD)):  # fmt: skip
            target.detach().copy_(source[tokens])
        graph.replay()
        torch.cuda.synchronize()
        equal("replayed result", replayed[0], whole.y_TD[tokens])
        equal("replayed gradient", replayed[1], whole.dx_TD[tokens])
        check_weight_grad(replayed[2], whole.dweight_TK[tokens], batch, whole, tokens)
        if fetches:
            want_TD, want_dx_TD = wanted(batch, tokens)
            equal("replayed fetched result", replayed[3], want_TD)
            equal("replayed fetched gradient", replayed[4], want_dx_TD)
            check_gradient_of_weights(replayed[5], batch, tokens)


def fault_of(group: ops.EpGroup) -> str:
    assert group.kernels is not None
    try:
        group.kernels.check()
    except ExchangeError as error:
        return str(error)
    raise AssertionError("nobody noticed")


def check_overflow(ranks: Ranks, shape: Shape, *, with_weights: bool) -> None:
    """Too little room at rank 0: an error there and at the ranks it serves, NaN results, and no other rows touched."""
    group = ranks.group(shape, 4, 30.0)
    batch = full_batch(shape, 5)
    batch.idx_TK.copy_(torch.arange(shape.top_k).expand_as(batch.idx_TK))  # experts of rank 0, where it has enough
    x_TD, routing, _ = on(ranks.device, batch, batch.mine(ranks.rank))
    if with_weights:
        rows_PD, _, route = ops.ep_dispatch_with_weights(
            x_TD.detach(), routing, group, block=shape.block, capacity=shape.block
        )
    else:
        rows_PD, route = ops.ep_dispatch(x_TD.detach(), routing, group, block=shape.block, capacity=shape.block)
    assert int(route.layout.offsets.max()) <= shape.block
    with torch.no_grad():
        y_TD = ops.ep_combine(rows_PD, route, group)  # tells the others, although the error is known here by now
    torch.cuda.synchronize()
    assert bool(y_TD.isnan().all()), "a result was made of rows that did not fit"
    ranks.say(f"overflow: {fault_of(group)}")
    dist.barrier()
    group.destroy()


def check_lost_peer(ranks: Ranks, shape: Shape, timeout_s: float) -> None:
    """The last rank ends without a word; the others hear of it in time and can go on. Nothing can follow this."""
    group = ranks.group(shape, 4, timeout_s)
    batch = full_batch(shape, 6)
    x_TD, routing, _ = on(ranks.device, batch, batch.mine(ranks.rank))
    torch.cuda.synchronize()
    dist.barrier()
    if ranks.rank == ranks.size - 1:
        os._exit(0)
    began = time.monotonic()
    forward(x_TD.detach(), routing, group, shape, ranks.rank)
    torch.cuda.synchronize()
    took = time.monotonic() - began
    fault = fault_of(group)
    ranks.say(f"after {took:.2f} s: {fault}", everyone=True)
    assert f"for rank {ranks.size - 1} " in fault
    assert took < timeout_s + 5
    assert float(torch.ones(3, device=ranks.device).sum()) == 3  # the device still works
    group.destroy()
    ranks.say("destroyed", everyone=True)


def bring_up(ranks: Ranks) -> None:
    """The smallest exchange, step by step: if anything is wrong, this says where."""
    shape = Shape(ranks.size, 2 * ranks.size, 8, 2, 128)
    group = ranks.group(shape, 1, 20.0)
    assert group.kernels is not None
    ranks.say(f"window of {group.kernels.window_bytes} bytes registered, {group.kernels.num_nodes} nodes")
    assert group.kernels.num_nodes == ranks.num_nodes
    batch = full_batch(shape, 0)
    whole = compute(shape, batch)
    x_TD, routing, _ = on(ranks.device, batch, batch.mine(ranks.rank))
    rows_PD, route = ops.ep_dispatch(x_TD.detach(), routing, group)
    torch.cuda.synchronize()
    group.kernels.check()
    ranks.say("8 tokens a rank dispatched")
    want_PD = check_layout(route, whole, shape, ranks.rank)
    equal("rows", rows_PD[: want_PD.shape[0]], want_PD)
    ops.ep_combine(rows_PD, route, group)
    torch.cuda.synchronize()
    group.kernels.check()
    ranks.say("and combined")
    dist.barrier()
    group.destroy()


def check_rounds(ranks: Ranks, args: argparse.Namespace) -> None:
    shapes = [
        Shape(ranks.size, 4 * ranks.size, 48, min(4, 4 * ranks.size), 512),
        Shape(ranks.size, 32 * ranks.size, 700, 8, 256),  # several chunks of choices
        Shape(ranks.size, ranks.size, 33, min(2, ranks.size), 144, block=64),
    ]
    for number, shape in enumerate(shapes):
        group = ranks.group(shape, args.num_sms, args.timeout)
        rounds = max(1, args.rounds * (8 if number == 0 else 1) // 10)
        for seed in range(rounds):
            router = ROUTERS[seed % len(ROUTERS)]
            batch = draw(shape, 1000 * number + seed, router)
            ranks.say(f"{shape}, round {seed}, router {router}, first tokens {batch.starts}")
            whole = compute(shape, batch)
            try:
                check_bf16(ranks, group, shape, batch, whole)
                if ranks.num_nodes == 1:
                    check_with_weights(ranks, group, shape, batch, whole, in_rooms=seed % 3 != 2)
                check_fp8(ranks, group, shape, batch, whole)
            except AssertionError as error:
                raise AssertionError(f"{shape}, round {seed}, router {router}: {error}") from error
        ranks.say(f"{rounds} rounds agree: {shape}")
        check_graph(ranks, group, shape, range(args.replays))
        ranks.say(f"{args.replays} replays of a graph agree")
        dist.barrier()
        group.destroy()


def check_latency_round(ranks: Ranks, group: ops.EpGroup, shape: Shape, batch: Batch) -> None:
    tokens = batch.mine(ranks.rank)
    x_TD, routing, _ = on(ranks.device, batch, tokens)
    rows, route, y_TD = low_latency(x_TD.detach(), routing, group, ranks.rank * shape.num_local)
    torch.cuda.synchronize()
    assert group.kernels is not None
    group.kernels.check()
    data, scale = compact(rows, route.layout.counts_X)
    want_data, want_scale = compact_of_whole(shape, batch, ranks.rank)
    equal("rows", data, want_data)
    equal("scales", scale, want_scale)
    equal("result", y_TD, compute(shape, rounded(batch)).y_TD[tokens])


def check_latency_graph(ranks: Ranks, group: ops.EpGroup, shape: Shape, seeds: range) -> None:
    """A graph of two exchanges, the second sent before the first is received; replayed with other tokens."""
    batch = full_batch(shape, 0)
    x_TD, routing, _ = on(ranks.device, batch, batch.mine(ranks.rank))
    x_TD, idx_TK, weight_TK = x_TD.detach(), routing.idx_TK, routing.weight_TK.detach()

    def step() -> tuple[Tensor, Tensor]:
        sent = [ops.ep_send(x_TD, routing, group), ops.ep_send(-x_TD, routing, group)]
        arrived = [ops.ep_receive(one) for one in sent]
        returned = [ops.ep_send_back(ops.dequantize(rows, torch.bfloat16), way, group) for rows, way in arrived]
        first, second = (ops.ep_collect(one, weight_TK=weight_TK) for one in returned)
        return first, second

    graph, (first, second) = captured(step)
    for seed in seeds:
        batch = full_batch(shape, seed)
        tokens = batch.mine(ranks.rank)
        for target, source in ((x_TD, batch.x_TD), (idx_TK, batch.idx_TK), (weight_TK, batch.weight_TK)):
            target.copy_(source[tokens])
        graph.replay()
        torch.cuda.synchronize()
        x_TKD = rounded(batch).x_TD[tokens].float()[:, None].expand(-1, shape.top_k, -1)
        want = torch.zeros(x_TKD.shape[0], x_TKD.shape[2])
        for k in range(shape.top_k):
            want = torch.addcmul(want, x_TKD[:, k], batch.weight_TK[tokens, k, None])
        equal("replayed result", first, want.bfloat16())
        equal("replayed second result", second, -want.bfloat16())


def check_latency_refused(ranks: Ranks) -> None:
    try:
        ranks.group(Shape(ranks.size, ranks.size, 8, 1, 128), 1, 20.0, low_latency=True)
    except RuntimeError as error:
        if "low-latency form needs a group within one team" not in str(error):
            raise
        ranks.say(f"refused: {error}")
    else:
        raise AssertionError("the low-latency form took a group of several nodes")


def check_latency(ranks: Ranks, args: argparse.Namespace) -> None:
    if ranks.num_nodes > 1:
        check_latency_refused(ranks)
        return
    for number, shape in enumerate([
        Shape(ranks.size, 8 * ranks.size, 128, min(8, 8 * ranks.size), 512),
        Shape(ranks.size, 2 * ranks.size, 37, 3, 1152),  # a last warp with columns left over
    ]):  # fmt: skip
        group = ranks.group(shape, args.num_sms, args.timeout, low_latency=True)
        for seed in range(args.rounds):
            router = ROUTERS[seed % len(ROUTERS)]
            batch = draw(shape, 5000 + 1000 * number + seed, router)
            ranks.say(f"low latency, {shape}, round {seed}, router {router}, first tokens {batch.starts}")
            check_latency_round(ranks, group, shape, batch)
        check_latency_graph(ranks, group, shape, range(args.replays))
        ranks.say(f"{args.rounds} low-latency rounds and {args.replays} replays agree: {shape}")
        dist.barrier()
        group.destroy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--num-sms", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=20.0, help="of each wait, in seconds")
    parser.add_argument("--limit", type=float, help="seconds after which a rank ends itself, saying where it is")
    parser.add_argument("--only", choices=("bring-up", "rounds", "placement", "chunks", "latency", "faults"))
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.limit or 120 + args.rounds, exit=True)
    ranks = Ranks()
    ranks.say(f"{ranks.size} ranks on {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {nccl_info()}")
    parts: dict[str, Any] = {
        "bring-up": bring_up,
        "rounds": lambda r: check_rounds(r, args),
        "placement": lambda r: check_placement(r, args),
        "chunks": lambda r: check_chunks(r, args),
        "latency": lambda r: check_latency(r, args),
        "faults": faults,
    }
    for name, part in parts.items():
        if args.only in (None, name):
            part(ranks)
            ranks.say(f"{name}: passed")
    os._exit(0)  # the lost rank left a process group that cannot be taken down


def nccl_info() -> dict[str, Any]:
    from dsv3rt.ops.cuda.extension import load

    return dict(load().ep_nccl_info())


def faults(ranks: Ranks) -> None:
    shape = Shape(ranks.size, 8 * ranks.size, 64, 4, 256)
    for with_weights in (False, True)[: 2 if ranks.num_nodes == 1 else 1]:
        check_overflow(ranks, shape, with_weights=with_weights)
    check_lost_peer(ranks, shape, 3.0)


if __name__ == "__main__":
    main()
