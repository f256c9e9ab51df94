"""Dispatch and combine with replicas where our placement puts them, against one process without any; bitwise.

A replica is its expert again, so results are those of the experts, whichever replica serves a token.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt.ops.types import EpRoute, Routing
from dsv3rt.parallel.eplb import Placement, place_by_groups, place_globally
from dsv3rt.parallel.expert import ExpertExchange
from tests.gpu.ep_cases import ROUTERS, Batch, Shape, compute, draw, factor_of, full_batch
from tests.gpu.ep_ranks import Ranks, captured, equal
from tests.gpu.ep_weights import wanted


def placements(batch: Batch, shape: Shape) -> dict[str, Placement]:
    """Two slots a rank more than experts, by the loads of this batch."""
    loads = torch.bincount(batch.idx_TK.flatten(), minlength=shape.num_experts).tolist()
    slots, ranks = shape.num_experts + 2 * shape.num_ranks, shape.num_ranks
    return {
        "globally": place_globally(loads, slots, ranks),
        "by groups": place_by_groups(loads, slots, num_groups=ranks, num_nodes=ranks, num_gpus=ranks),
    }


class Served:
    """The experts that a placement gives a rank, and what they make of tokens: they multiply by a number of theirs, and
    by the gates if those come along."""

    def __init__(self, placement: Placement, shape: Shape, rank: int, like_TD: Tensor, *, with_gates: bool) -> None:
        """like_TD: as many rows as any rank may have."""
        self.placement = placement
        self.with_gates = with_gates
        self.shape = shape
        self.slots = replace(shape, num_experts=placement.num_slots)
        self._rank = rank
        self._device = like_TD.device
        self._factor_X = factor_of(torch.tensor(placement.experts_on(rank))).to(self._device)
        world = dist.group.WORLD
        self.exchange = ExpertExchange(world, shape.num_ranks, placement, num_sms=8, carries_gates=with_gates)
        self.exchange.open(like_TD, shape.num_experts, shape.top_k)

    @torch.no_grad()
    def serve(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, EpRoute]:
        """Rows, results and the route."""
        block, experts = self.shape.block, self.shape.num_experts
        sent = self.exchange.dispatch(x_TD, routing, num_experts=experts, block=block, with_gates=self.with_gates)
        assert isinstance(sent.route, EpRoute)
        row_P = torch.arange(sent.rows_PD.shape[0], device=self._device)
        slot_P = torch.searchsorted(sent.layout.offsets[1:].contiguous(), row_P, right=True)
        factor_P1 = self._factor_X[slot_P.clamp(max=len(self._factor_X) - 1)][:, None]
        if self.with_gates:
            assert sent.gates is not None
            out_PD = (sent.rows_PD.float() * factor_P1 * sent.gates.values[:, None]).to(x_TD.dtype)
        else:
            out_PD = sent.rows_PD * factor_P1
        return sent.rows_PD, self.exchange.combine(out_PD, sent, routing.weight_TK), sent.route

    def check(self, batch: Batch) -> None:
        """Rows as one process lays them out with slots as experts, results as it has them without replicas."""
        starts, tokens = zip(batch.starts, batch.starts[1:], strict=False), batch.mine(self._rank)
        slot_TK = torch.cat([self.placement.assign(batch.idx_TK[start:stop]) for start, stop in starts])
        want_PD, counts_X, offsets = compute(self.slots, replace(batch, idx_TK=slot_TK)).local(self.slots, self._rank)
        idx_TK, weight_TK = batch.idx_TK[tokens].to(self._device), batch.weight_TK[tokens].to(self._device)
        routing = Routing(idx_TK, weight_TK, weight_TK, weight_TK)
        rows_PD, y_TD, route = self.serve(batch.x_TD[tokens].to(self._device), routing)
        equal("counts of replicas", route.layout.counts_X, counts_X)
        equal("offsets of replicas", route.layout.offsets, offsets)
        equal("rows of replicas", rows_PD[: want_PD.shape[0]], want_PD)
        equal("results of replicas", y_TD, self.wanted(batch))

    def wanted(self, batch: Batch) -> Tensor:
        tokens = batch.mine(self._rank)
        return wanted(batch, tokens)[0] if self.with_gates else compute(self.shape, batch).y_TD[tokens]

    def check_graph(self, seeds: range) -> None:
        """A graph of dispatch and combine, replayed with other tokens and choices."""
        batch = full_batch(self.shape, 0)
        tokens = batch.mine(self._rank)
        x_TD, idx_TK, weight_TK = (x[tokens].to(self._device) for x in (batch.x_TD, batch.idx_TK, batch.weight_TK))
        routing = Routing(idx_TK, weight_TK, weight_TK, weight_TK)
        graph, (_, y_TD, _) = captured(lambda: self.serve(x_TD, routing))
        for seed in seeds:
            batch = full_batch(self.shape, seed)
            for target, source in ((x_TD, batch.x_TD), (idx_TK, batch.idx_TK), (weight_TK, batch.weight_TK)):
                target.copy_(source[tokens])
            graph.replay()
            torch.cuda.synchronize()
            equal("replayed results of replicas", y_TD, self.wanted(batch))

    def destroy(self) -> None:
        group = self.exchange._experts
        assert group is not None
        assert group.kernels is not None
        group.kernels.check()
        dist.barrier()
        group.destroy()


def check_placement(ranks: Ranks, args: argparse.Namespace) -> None:
    shape = Shape(ranks.size, 4 * ranks.size, 200, min(4, 4 * ranks.size), 256)
    like_TD = torch.empty(shape.max_tokens, shape.num_columns, dtype=torch.bfloat16, device=ranks.device)
    rounds = max(len(ROUTERS), args.rounds // 10)
    for name, placement in placements(draw(shape, 9000, "skewed"), shape).items():
        replicas = [len(slots) for slots in placement.slots_of_experts()]
        assert min(replicas) == 1 < max(replicas)
        for with_gates in (False, True)[: 2 if ranks.num_nodes == 1 else 1]:
            served = Served(placement, shape, ranks.rank, like_TD, with_gates=with_gates)
            ranks.kernels_of(served.exchange._experts)
            for seed in range(rounds):
                served.check(draw(shape, 9001 + seed, ROUTERS[seed % len(ROUTERS)]))
            served.check_graph(range(args.replays))
            served.destroy()
            how = "fetched" if with_gates else "pushed"
            ranks.say(f"placed {name}, up to {max(replicas)} replicas, {how}: {rounds} rounds, {args.replays} replays")
