"""Dispatch and combine over gloo are one process's permutation of all ranks' tokens, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv3rt import ops
from dsv3rt.parallel.eplb import Placement
from dsv3rt.parallel.expert import ExpertExchange
from tests.gpu.ep_cases import ROUTERS
from tests.parallel.fleet import output_of, torchrun


@pytest.mark.parametrize("size", [2, 4, 8])
def test_exchange_matches_one_process(tmp_path: Path, size: int) -> None:
    out = tmp_path / "out.json"
    output_of(torchrun(size, "-m", "tests.parallel.ep_worker", str(out)), timeout=300)
    for rank, found in enumerate(json.loads(out.read_text())):
        needed = size * 24 * 4  # tokens of each rank, their choices
        assert found.pop("overflow") == f"expert exchange: rank 0 found {needed} rows for 95: raise capacity"
        wrong = [
            (router, name) for router in (*ROUTERS, "replicated") for name, same in found[router].items() if not same
        ]
        assert not wrong, f"rank {rank} of {size}"


def test_group_rejects_what_it_has_no_room_for(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="EpGroup: num_experts must be a positive multiple of the 1 ranks, got 0"):
            ops.EpGroup(torch.distributed.group.WORLD, 0)
        limits = ops.EpLimits(257, 1, 128, low_latency=True)
        with pytest.raises(ValueError, match=r"limits\.max_tokens must be in 1\.\.256 with low_latency, got 257"):
            ops.EpGroup(torch.distributed.group.WORLD, 1, limits=limits)
        plain = ops.EpGroup(torch.distributed.group.WORLD, 1)
        x_TD, idx_TK = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
        with pytest.raises(ValueError, match="ep_send: group must have limits with low_latency, got None"):
            ops.ep_send(x_TD, ops.Routing(idx_TK, x_TD, x_TD, x_TD), plain)
        routing = ops.Routing(idx_TK, torch.ones(1, 1), x_TD, x_TD)
        with pytest.raises(TypeError, match=r"with_weights: routing\.weight_TK must be float32, got bfloat16"):
            ops.ep_dispatch_with_weights(x_TD, replace(routing, weight_TK=x_TD[:, :1]), plain)
        with pytest.raises(ValueError, match="with_weights: capacity must be a positive multiple of 128, got 5"):
            ops.ep_dispatch_with_weights(x_TD, routing, plain, capacity=5)
        with pytest.raises(ValueError, match="first_row must be a multiple of 128, not negative, got 5"):
            ops.ep_dispatch_with_weights(x_TD, routing, plain, first_row=5)
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_are_for_serving() -> None:
    placement = Placement((0, 1, 1, 0), 2, 2)
    with pytest.raises(ValueError, match="placement must be on the group's 4 ranks, got 2 GPUs"):
        ExpertExchange(None, 4, placement)
    exchange = ExpertExchange(None, 2, placement)
    x_TD, weight_TK = torch.zeros(1, 8), torch.ones(1, 1)
    routing = ops.Routing(torch.zeros(1, 1, dtype=torch.int64), weight_TK, weight_TK, weight_TK)
    with pytest.raises(ValueError, match="placement must be of the layer's 3 experts, got 2"):
        exchange.dispatch(x_TD, routing, num_experts=3, block=1)
    with pytest.raises(ValueError, match="replicas must serve without gradients"):
        exchange.dispatch(x_TD.requires_grad_(), routing, num_experts=2, block=1)
