"""Routing and permutation beside a copy of the bytes they must move, and beside the torch ops they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import copy_of, empty_kernel, peer_of, with_chains
from benchmarks.timing import Case, Peer
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


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_route(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    logits, _ = routed(tokens)
    bias = torch.zeros(EXPERTS, device="cuda")
    moved = tokens * (2 * 4 * EXPERTS + 12 * TOP_K)  # logits and scores; choices with their weights
    versus(
        Case("route", f"{tokens}x{EXPERTS}", "gbps", moved),
        lambda: ops.route(logits, bias, top_k=TOP_K, num_groups=GROUPS, groups_kept=KEPT, scale=2.5),
        peer_of(peer, copy_peer, lambda: reference.route(logits, bias, RULE)),
    )


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_route_backward(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    _, routing = routed(tokens)
    arguments = (torch.rand_like(routing.weight_TK), None, routing.scores_TE, routing.idx_TK, True, 2.5, True)
    moved = tokens * (2 * 4 * EXPERTS + 12 * TOP_K)
    versus(
        Case("route, backward", f"{tokens}x{EXPERTS}", "gbps", moved),
        lambda: torch.ops.dsv3rt.route_backward(*arguments),
        peer_of(peer, copy_peer, lambda: expert_rows._route_backward_on_cpu(*arguments)),
    )


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_balance_loss(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    """Sequences of 4096 tokens."""
    _, routing = routed(tokens)
    ends = torch.arange(0, tokens + 1, TOKENS[0], dtype=torch.int32, device="cuda")
    arguments = (routing.scores_TE, routing.idx_TK, ends, ALPHA)
    versus(
        Case("balance_loss", f"{tokens}x{EXPERTS}", "gbps", tokens * (4 * EXPERTS + 8 * TOP_K)),
        lambda: balance._balance_loss(*arguments),
        peer_of(peer, copy_peer, lambda: reference.balance_loss(*arguments)),
    )


@pytest.mark.parametrize(("tokens", "peer"), CASES)
def test_bench_balance_loss_backward(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    _, routing = routed(tokens)
    ends = torch.arange(0, tokens + 1, TOKENS[0], dtype=torch.int32, device="cuda")
    _, slope = balance._balance_loss(routing.scores_TE, routing.idx_TK, ends, ALPHA)
    arguments = (torch.ones((), device="cuda"), routing.scores_TE, slope, ends)
    versus(
        Case("balance_loss, backward", f"{tokens}x{EXPERTS}", "gbps", 2 * 4 * tokens * EXPERTS),
        lambda: balance._balance_loss_backward(*arguments),
        peer_of(peer, copy_peer, lambda: reference.balance_loss_backward(*arguments)),
    )


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


class SmallOps:
    """Those whose bytes would take 1 to 10 us: what each moves, and how it is run."""

    NAMES = ("route", "route, backward", "balance_loss", "balance_loss, backward", "place")

    def __init__(self, tokens: int) -> None:
        logits, routing = routed(tokens)
        bias = torch.zeros(EXPERTS, device="cuda")
        ends = torch.arange(0, tokens + 1, TOKENS[0], dtype=torch.int32, device="cuda")
        scores, idx = routing.scores_TE, routing.idx_TK
        _, slope = balance._balance_loss(scores, idx, ends, ALPHA)
        weight_grad, one = torch.rand_like(routing.weight_TK), torch.ones((), device="cuda")
        row, choices = 4 * EXPERTS, 8 * TOP_K
        self.runs: dict[str, tuple[int, Callable[[], object]]] = {
            "route": (
                2 * row + choices + 4 * TOP_K,
                lambda: ops.route(logits, bias, top_k=TOP_K, num_groups=GROUPS, groups_kept=KEPT, scale=2.5),
            ),
            "route, backward": (
                2 * row + choices + 4 * TOP_K,
                lambda: torch.ops.dsv3rt.route_backward(weight_grad, None, scores, idx, True, 2.5, True),
            ),
            "balance_loss": (row + choices, lambda: balance._balance_loss(scores, idx, ends, ALPHA)),
            "balance_loss, backward": (2 * row, lambda: balance._balance_loss_backward(one, scores, slope, ends)),
            "place": (2 * choices, lambda: ops.place(idx, num_experts=EXPERTS)),
        }


@pytest.mark.parametrize("peer", ["empty_kernel", "copy_of_this_size"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("op", SmallOps.NAMES)
def test_bench_small_ops_beside_a_copy_and_an_empty_kernel(versus: Versus, tokens: int, op: str, peer: str) -> None:
    bytes_a_token, run = SmallOps(tokens).runs[op]
    shape, moved = f"{tokens}x{EXPERTS}", tokens * bytes_a_token
    if peer == "empty_kernel":
        versus(Case(op, shape, "us"), run, empty_kernel())
    else:
        versus(Case(op, shape, "gbps", moved), run, copy_of(moved))


def test_bench_permute_fp8_beside_a_copy_of_its_size(versus: Versus) -> None:
    placed = Placed(TOKENS[0])
    q, routing = ops.quantize_1x128(placed.x), placed.routing
    moved = (DIM + DIM // 32) * (TOKENS[0] + placed.num_padded)
    case = Case("permute of FP8", f"{TOKENS[0]}x{DIM}", "gbps", moved)
    versus(case, lambda: ops.permute(q, routing, num_experts=EXPERTS), copy_of(moved))
