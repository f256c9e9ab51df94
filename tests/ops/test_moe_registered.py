"""The ops that routing and permutation are made of, as torch.library and torch.compile see them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import expert_rows
from dsv3rt.ops.balance import BalanceByKernel
from dsv3rt.ops.reference.moe import RouteRule
from dsv3rt.ops.types import Routing


def test_balance_loss_gradient_by_formula_equals_autograd() -> None:
    scores = torch.rand(12, 6, dtype=torch.float64, requires_grad=True)
    idx = torch.stack([torch.randperm(6)[:2] for _ in range(12)])
    ends = torch.tensor([0, 1, 1, 5, 11], dtype=torch.int32)  # the last token belongs to none
    (want,) = torch.autograd.grad(ops.balance_loss(scores, idx, ends, alpha=0.7), scores)
    got = BalanceByKernel.apply(scores, idx, ends, 0.7)
    torch.testing.assert_close(torch.autograd.grad(got, scores)[0], want)


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_gradient_by_formula_equals_autograd(renormalize: bool) -> None:
    logits, bias, rule = torch.randn(9, 8, requires_grad=True), torch.randn(8), RouteRule(3, 4, 2, 2.5, renormalize)
    dweight, dscores = torch.randn(9, 3), torch.randn(9, 8)
    plain = ops.route(logits, bias, top_k=3, num_groups=4, groups_kept=2, scale=2.5, renormalize=renormalize)
    _, weight, scores, _ = expert_rows.RouteByKernel.apply(logits, bias, rule)
    for outputs, grads in [((0,), (dweight,)), ((1,), (dscores,)), ((0, 1), (dweight, dscores))]:
        mine, theirs = (weight, scores), (plain.weight_TK, plain.scores_TE)
        got, want = (
            torch.autograd.grad([of[i] for i in outputs], logits, grads, retain_graph=True)[0] for of in (mine, theirs)
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # a few FP32 roundings


def test_moe_ops_are_registered() -> None:
    namespace = torch.ops.dsv3rt
    logits, ends = torch.randn(12, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    idx, weight, scores, _ = namespace.route(logits, torch.zeros(8), 2, 4, 2, 2.5, True)
    torch.library.opcheck(namespace.route.default, (logits, torch.zeros(8), 2, 4, 2, 2.5, True))
    torch.library.opcheck(namespace.route_backward.default, (weight, scores, scores, idx, True, 2.5, True))
    torch.library.opcheck(namespace.balance_loss.default, (scores, idx, ends, 0.5))
    slope = namespace.balance_loss(scores, idx, ends, 0.5)[1]
    torch.library.opcheck(namespace.balance_loss_backward.default, (torch.ones(()), scores, slope, ends))
    torch.library.opcheck(namespace.place.default, (idx, 8, 4))
    counts, offsets, row_of = namespace.place(idx, 8, 4)
    x = torch.randn(12, 16)
    torch.library.opcheck(namespace.permute.default, (x, None, row_of, counts, offsets, 56))
    (rows,) = namespace.permute(x, None, row_of, counts, offsets, 56)
    torch.library.opcheck(namespace.unpermute.default, (rows, weight, row_of))
    for given in (rows, None):
        arguments = (x, given, weight, row_of, counts, offsets, 56)
        torch.library.opcheck(namespace.unpermute_backward.default, arguments)


def test_moe_family_compiles_in_one_piece() -> None:
    """The functions that CUDA tensors take, whose ops have CPU bodies too: `permute` looks at choices on the CPU."""
    x, logits = torch.randn(12, 16, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    ends, rule = torch.tensor([0, 5, 12], dtype=torch.int32), RouteRule(2, 4, 2, 2.5, True)

    def chain(x: Tensor, logits: Tensor) -> Tensor:
        routing = Routing(*expert_rows.RouteByKernel.apply(logits, torch.zeros(8), rule))
        counts, offsets, row_of = expert_rows.place(routing.idx_TK, 8, 4)
        rows = expert_rows.Permute.apply(x, row_of, counts, offsets, 56)
        y = expert_rows.Unpermute.apply(rows, routing.weight_TK, row_of, counts, offsets)
        return y.sin().sum() + BalanceByKernel.apply(routing.scores_TE, routing.idx_TK, ends, 0.5)

    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(x, logits), (x, logits)) for f in (compiled, chain)), strict=True):
        torch.testing.assert_close(got, want)
