"""Routing and permutation beside a copy of the bytes they must move, and beside the torch ops they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Case, Peer
from dsv3rt import ops
from dsv3rt.ops import expert_rows
from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.types import Permutation, Routing

Versus = Callable[..., dict[str, Any]]
EXPERTS, GROUPS, KEPT, TOP_K, DIM = 256, 8, 4, 8, 7168
TOKENS = [4096, 16384]
RULE = reference.RouteRule(TOP_K, GROUPS, KEPT, 2.5, True)


def chain(name: str, run: Callable[[], object]) -> Peer:
    return Peer(name, torch.compile(run) if name == "torch_compile" else run)


def routed(tokens: int) -> tuple[Tensor, Routing]:
    logits = torch.randn((tokens, EXPERTS), device="cuda")
    bias = torch.zeros(EXPERTS, device="cuda")
    return logits, ops.route(logits, bias, top_k=TOP_K, num_groups=GROUPS, groups_kept=KEPT, scale=2.5)


@pytest.mark.parametrize(("tokens", "peer"), [(4096, "torch_eager"), (4096, "torch_compile"), (16384, "torch_eager")])
def test_bench_route(versus: Versus, tokens: int, peer: str) -> None:
    logits, _ = routed(tokens)
    bias = torch.zeros(EXPERTS, device="cuda")
    case = Case("route", f"{tokens}x{EXPERTS}", "us", 1)
    versus(
        case,
        lambda: ops.route(logits, bias, top_k=TOP_K, num_groups=GROUPS, groups_kept=KEPT, scale=2.5),
        chain(peer, lambda: reference.route(logits, bias, RULE)),
    )


@pytest.mark.parametrize("tokens", TOKENS)
def test_bench_permute(versus: Versus, copy_peer: Peer, tokens: int) -> None:
    """Placement included. Every token is read once and written K times, padding too."""
    _, routing = routed(tokens)
    x = torch.randn((tokens, DIM), device="cuda").bfloat16()
    _, layout, _ = ops.permute(x, routing, num_experts=EXPERTS)
    moved = 2 * DIM * (tokens + int(layout.offsets[-1]))
    versus(
        Case("permute", f"{tokens}x{DIM}", "gbps", moved),
        lambda: ops.permute(x, routing, num_experts=EXPERTS),
        copy_peer,
    )


@pytest.mark.parametrize("tokens", TOKENS)
def test_bench_permute_fp8(versus: Versus, copy_peer: Peer, tokens: int) -> None:
    _, routing = routed(tokens)
    q = ops.quantize_1x128(torch.randn((tokens, DIM), device="cuda").bfloat16())
    _, layout, _ = ops.permute(q, routing, num_experts=EXPERTS)
    moved = (DIM + DIM // 32) * (tokens + int(layout.offsets[-1]))
    versus(
        Case("permute of FP8", f"{tokens}x{DIM}", "gbps", moved),
        lambda: ops.permute(q, routing, num_experts=EXPERTS),
        copy_peer,
    )


def gathered(tokens: int) -> tuple[Tensor, Routing, Permutation]:
    _, routing = routed(tokens)
    x = torch.randn((tokens, DIM), device="cuda").bfloat16()
    rows, _, permutation = ops.permute(x, routing, num_experts=EXPERTS)
    return rows, routing, permutation


@pytest.mark.parametrize("tokens", TOKENS)
def test_bench_unpermute(versus: Versus, copy_peer: Peer, tokens: int) -> None:
    rows, routing, permutation = gathered(tokens)
    versus(
        Case("unpermute", f"{tokens}x{DIM}", "gbps", 2 * DIM * tokens * (TOP_K + 1)),
        lambda: ops.unpermute(rows, permutation, routing.weight_TK),
        copy_peer,
    )


@pytest.mark.parametrize("tokens", TOKENS)
def test_bench_unpermute_backward(versus: Versus, copy_peer: Peer, tokens: int) -> None:
    """Rows are read for the gradient of the weights, and as many written, padding too."""
    rows, routing, permutation = gathered(tokens)
    assert permutation.layout is not None
    counts, offsets = permutation.layout.counts_X, permutation.layout.offsets
    dy = torch.randn((tokens, DIM), device="cuda").bfloat16()
    moved = 2 * DIM * (tokens + tokens * TOP_K + int(offsets[-1]))
    versus(
        Case("unpermute, backward", f"{tokens}x{DIM}", "gbps", moved),
        lambda: expert_rows._unpermute_backward(
            dy, rows, routing.weight_TK, permutation.row_of_TK, counts, offsets, permutation.num_rows
        ),
        copy_peer,
    )


def test_bench_permute_and_back(versus: Versus) -> None:
    """Both ways, beside the same in torch, not compiled: its placement waits for the host, and that takes minutes."""
    tokens = TOKENS[0]
    _, routing = routed(tokens)
    x = torch.randn((tokens, DIM), device="cuda").bfloat16()

    def ours() -> Tensor:
        rows, _, permutation = ops.permute(x, routing, num_experts=EXPERTS)
        return ops.unpermute(rows, permutation, routing.weight_TK)

    def theirs() -> Tensor:
        _, permutation = reference.place(routing.idx_TK, EXPERTS, 128)
        rows = reference.scatter(x, permutation.row_of_TK, x.new_zeros(permutation.num_rows, DIM))
        return reference.gather_sum(rows, permutation.row_of_TK, routing.weight_TK)

    versus(Case("permute and unpermute", f"{tokens}x{DIM}", "us", 1), ours, Peer("torch_eager", theirs))
