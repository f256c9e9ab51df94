"""A MoE block in FP8 on ranks, its tokens exchanged in chunks on two streams, beside the same block without chunks.

Results and gradients of tokens are the same to the bit: a row in FP8 is cast and multiplied by itself. Weight gradients
are of rows that are cast in columns of 128, and those are others.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt.layers import main_grad
from dsv3rt.model.block import Block
from dsv3rt.ops.types import ceil_div
from dsv3rt.parallel.expert import ExpertExchange
from dsv3rt.parallel.pipeline.lanes import Lanes
from tests.gpu.ep_layer import DIM, LOCAL, TOP_K, Passed, alike, block_of, forward_and_backward, moe_of
from tests.gpu.ep_ranks import Ranks, captured, equal

MOST_TOKENS = 600


def block_with(ranks: Ranks, chunks: int, *, carries_gates: bool) -> Block:
    block = block_of(ranks.rank, ranks.size, "fp8").to(ranks.device)
    exchange = ExpertExchange(dist.group.WORLD, ranks.size, num_sms=2, carries_gates=carries_gates, num_chunks=chunks)
    like_TD = torch.empty(ceil_div(MOST_TOKENS, chunks), DIM, dtype=torch.bfloat16, device=ranks.device)
    exchange.open(like_TD, LOCAL * ranks.size, TOP_K)
    ranks.kernels_of(exchange._experts)
    moe_of(block).exchange = exchange
    return block


def draw(ranks: Ranks, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 * seed + ranks.rank)
    x_TD, dy_TD = (torch.randn(tokens, DIM, generator=random).bfloat16().to(ranks.device) for _ in range(2))
    return x_TD, dy_TD


def taken_gradients(block: Block) -> list[Tensor]:
    """Of the experts; the next ones start anew."""
    found = []
    for parameter in moe_of(block).experts.parameters():
        total = main_grad.of(parameter)
        assert total.grad is not None
        found.append(total.grad)
        total.grad = None
    return found


def same(got: Passed, want: Passed, what: str) -> None:
    for field in fields(Passed):
        equal(f"{field.name}, {what}", getattr(got, field.name), getattr(want, field.name).detach().cpu())


def check_graph(ranks: Ranks, blocks: dict[int, Block], lanes: Lanes, chunks: int, seeds: range) -> None:
    """A graph of forward and backward in chunks, replayed with other tokens."""
    x_TD, dy_TD = draw(ranks, MOST_TOKENS, 0)
    graph, got = captured(lambda: forward_and_backward(blocks[chunks], lanes, x_TD, dy_TD.clone()))
    for seed in seeds:
        for target, source in zip((x_TD, dy_TD), draw(ranks, MOST_TOKENS, seed), strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        same(got, forward_and_backward(blocks[1], lanes, x_TD, dy_TD.clone()), f"replay of {chunks} chunks")


def check_chunks(ranks: Ranks, args: argparse.Namespace) -> None:
    lanes = Lanes(ranks.device)
    for carries_gates in (True, False)[0 if ranks.num_nodes == 1 else 1 :]:
        blocks = {chunks: block_with(ranks, chunks, carries_gates=carries_gates) for chunks in (1, 2, 3)}
        for seed in range(max(4, args.rounds // 10)):
            # Two tokens in three chunks leave one without any, and now and then a rank has none.
            tokens = (MOST_TOKENS, 300 + 17 * ranks.rank, 2, 77 * ((ranks.rank + seed) % 3))[seed % 4]
            x_TD, dy_TD = draw(ranks, tokens, seed)
            want, weights = forward_and_backward(blocks[1], lanes, x_TD, dy_TD.clone()), taken_gradients(blocks[1])
            for chunks in (2, 3):
                what, found = f"{chunks} chunks of {tokens}", []
                for turn in ("", " again"):
                    same(forward_and_backward(blocks[chunks], lanes, x_TD, dy_TD.clone()), want, what + turn)
                    found.append(taken_gradients(blocks[chunks]))
                for first, second, theirs in zip(*found, weights, strict=True):
                    equal(f"weight gradient again, {what}", second, first.cpu())
                    assert alike(first, theirs), f"weight gradient, {what}"
        for chunks in (2, 3):
            check_graph(ranks, blocks, lanes, chunks, range(args.replays))
        torch.cuda.synchronize()
        for block in blocks.values():
            destroy(block)
        ranks.say(f"in 2 and 3 chunks as at once, {'fetched' if carries_gates else 'pushed'}; {args.replays} replays")


def destroy(block: Block) -> None:
    exchange = moe_of(block).exchange
    assert isinstance(exchange, ExpertExchange)
    group = exchange._experts
    assert group is not None
    assert group.kernels is not None
    group.kernels.check()
    dist.barrier()
    group.destroy()
