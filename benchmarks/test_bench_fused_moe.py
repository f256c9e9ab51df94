"""Routing and permutation beside a copy of the bytes they must move, and beside the torch ops they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.peers import copy_of, empty_kernel, peer_of, with_chains
from benchmarks.timing import Case, Peer, Run
from dsv3rt import ops
from dsv3rt.ops import balance, expert_rows
from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.types import QuantTensor, Routing

Versus = Callable[..., dict[str, Any]]
EXPERTS, GROUPS, KEPT, TOP_K, DIM = 256, 8, 4, 8, 7168
TOKENS = [4096, 16384]
CASES = with_chains(TOKENS)
RULE = reference.RouteRule(TOP_K, GROUPS, KEPT, 2.5, True)
ALPHA = 1e-4


def routed(tokens: int) -> tuple[Tensor, Routing]:
    logits = torch.randn((tokens, EXPERTS), device="cuda")
    bias = torch.zeros(EXPERTS, device="cuda")
    return logits, ops.route(logits, bias, top_k=TOP_K, num_groups=GROUPS, groups_kept=KEPT, scale=2.5)


class Placed:
    """Routed tokens, their rows and where they lie."""

    def __init__(self, tokens: int) -> None:
        _, self.routing = routed(tokens)
        self.x = torch.randn((tokens, DIM), device="cuda").bfloat16()
        self.rows, layout, self.permutation = ops.permute(self.x, self.routing, num_experts=EXPERTS)
        self.row_of, self.num_rows = self.permutation.row_of_TK, self.permutation.num_rows
        self.counts, self.offsets = layout.counts_X, layout.offsets
        self.num_padded = int(layout.offsets[-1])  # rows up to the last segment's end


class SmallOp(NamedTuple):
    """What it must move a token, how it is run, and the torch ops that it replaces."""

    bytes_a_token: int
    run: Run
    chain: Run


class SmallOps:
    """Those whose bytes would take 1 to 10 us. Sequences of 4096 tokens."""

    def __init__(self, tokens: int) -> None:
        logits, routing = routed(tokens)
        bias = torch.zeros(EXPERTS, device="cuda")
        ends = torch.arange(0, tokens + 1, TOKENS[0], dtype=torch.int32, device="cuda")
        scores, idx = routing.scores_TE, routing.idx_TK
        _, slope = balance._balance_loss(scores, idx, ends, ALPHA)
        of_route = (torch.rand_like(routing.weight_TK), None, scores, idx, True, 2.5, True)
        of_loss = (torch.ones((), device="cuda"), scores, slope, ends)
        row, choices, weights = 4 * EXPERTS, 8 * TOP_K, 4 * TOP_K
        self.named = {
            "route": SmallOp(
                2 * row + choices + weights,
                lambda: ops.route(logits, bias, top_k=TOP_K, num_groups=GROUPS, groups_kept=KEPT, scale=2.5),
                lambda: reference.route(logits, bias, RULE),
            ),
            "route, backward": SmallOp(
                2 * row + choices + weights,
                lambda: torch.ops.dsv3rt.route_backward(*of_route),
                lambda: expert_rows._route_backward_on_cpu(*of_route),
            ),
            "balance_loss": SmallOp(
                row + choices,
                lambda: balance._balance_loss(scores, idx, ends, ALPHA),
                lambda: reference.balance_loss(scores, idx, ends, ALPHA),
            ),
            "balance_loss, backward": SmallOp(
                2 * row,
                lambda: balance._balance_loss_backward(*of_loss),
                lambda: reference.balance_loss_backward(*of_loss),
            ),
            "place": SmallOp(
                2 * choices,
                lambda: ops.place(idx, num_experts=EXPERTS),
                lambda: reference.place(idx, EXPERTS, 128),
            ),
        }


def bench_small_op(versus: Versus, copy_peer: Peer, op: str, tokens: int, peer: str) -> None:
    small = SmallOps(tokens).named[op]
    case = Case(op, f"{tokens}x{EXPERTS}", "gbps", tokens * small.bytes_a_token)
    versus(case, small.run, peer_of(peer, copy_peer, small.chain))


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_route(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    bench_small_op(versus, copy_peer, "route", tokens, peer)


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_route_backward(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    bench_small_op(versus, copy_peer, "route, backward", tokens, peer)


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_balance_loss(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    bench_small_op(versus, copy_peer, "balance_loss", tokens, peer)


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_balance_loss_backward(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    bench_small_op(versus, copy_peer, "balance_loss, backward", tokens, peer)


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_permute(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    """Placement included. Every token is read once and written K times; so is the padding of segments."""
    placed = Placed(tokens)
    x, routing = placed.x, placed.routing

    def chain() -> Tensor:
        _, permutation = reference.place(routing.idx_TK, EXPERTS, 128)
        return reference.scatter(x, permutation.row_of_TK, x.new_zeros(permutation.num_rows, DIM))

    versus(
        Case("permute", f"{tokens}x{DIM}", "gbps", 2 * DIM * (tokens + placed.num_padded)),
        lambda: ops.permute(x, routing, num_experts=EXPERTS),
        peer_of(peer, copy_peer, chain),
    )


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_permute_fp8(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    placed = Placed(tokens)
    q, routing = ops.quantize_1x128(placed.x), placed.routing

    def chain() -> QuantTensor:
        _, permutation = reference.place(routing.idx_TK, EXPERTS, 128)
        return reference.permute_quant(q, permutation.row_of_TK, permutation.num_rows)

    versus(
        Case("permute of FP8", f"{tokens}x{DIM}", "gbps", (DIM + DIM // 32) * (tokens + placed.num_padded)),
        lambda: ops.permute(q, routing, num_experts=EXPERTS),
        peer_of(peer, copy_peer, chain),
    )


@pytest.mark.parametrize("weighted", [True, False], ids=["unpermute", "permute-backward"])
@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_unpermute(versus: Versus, copy_peer: Peer, tokens: int, peer: str, weighted: bool) -> None:
    """Without weights it is the backward pass of permute."""
    placed = Placed(tokens)
    arguments = (placed.rows, placed.routing.weight_TK if weighted else None, placed.row_of)
    versus(
        Case(
            "unpermute" if weighted else "permute, backward", f"{tokens}x{DIM}", "gbps", 2 * DIM * tokens * (TOP_K + 1)
        ),
        lambda: torch.ops.dsv3rt.unpermute(*arguments),
        peer_of(peer, copy_peer, lambda: reference.gather_sum(arguments[0], arguments[2], arguments[1])),
    )


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_unpermute_backward(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    """Rows are read for the gradient of the weights, and as many written, padding too."""
    placed = Placed(tokens)
    dy, rows, weight, row_of, num_rows = (
        torch.randn_like(placed.x), placed.rows, placed.routing.weight_TK, placed.row_of, placed.num_rows,
    )  # fmt: skip
    arguments = (dy, rows, weight, row_of, placed.counts, placed.offsets, num_rows)
    versus(
        Case("unpermute, backward", f"{tokens}x{DIM}", "gbps", 2 * DIM * (tokens * (TOP_K + 1) + placed.num_padded)),
        lambda: torch.ops.dsv3rt.unpermute_backward(*arguments),
        peer_of(peer, copy_peer, lambda: reference.unpermute_backward(dy, rows, weight, row_of, num_rows)),
    )


@pytest.mark.parametrize("peer", ["empty_kernel", "copy_of_this_size"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("op", ["route", "route, backward", "balance_loss", "balance_loss, backward", "place"])
def test_bench_small_ops_beside_a_copy_and_an_empty_kernel(versus: Versus, tokens: int, op: str, peer: str) -> None:
    small = SmallOps(tokens).named[op]
    shape, moved = f"{tokens}x{EXPERTS}", tokens * small.bytes_a_token
    if peer == "empty_kernel":
        versus(Case(op, shape, "us"), small.run, empty_kernel())
    else:
        versus(Case(op, shape, "gbps", moved), small.run, copy_of(moved))


def test_bench_permute_fp8_beside_a_copy_of_its_size(versus: Versus) -> None:
    placed = Placed(TOKENS[0])
    q, routing = ops.quantize_1x128(placed.x), placed.routing
    moved = (DIM + DIM // 32) * (TOKENS[0] + placed.num_padded)
    case = Case("permute of FP8", f"{TOKENS[0]}x{DIM}", "gbps", moved)
    versus(case, lambda: ops.permute(q, routing, num_experts=EXPERTS), copy_of(moved))
