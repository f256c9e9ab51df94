"""The ops that routing and permutation are made of, as torch.library and torch.compile see them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.balance import BalanceByKernel


def test_balance_loss_gradient_by_formula_equals_autograd() -> None:
    scores = torch.rand(12, 6, dtype=torch.float64, requires_grad=True)
    idx = torch.stack([torch.randperm(6)[:2] for _ in range(12)])
    ends = torch.tensor([0, 1, 1, 5, 11], dtype=torch.int32)  # the last token belongs to none
    (want,) = torch.autograd.grad(ops.balance_loss(scores, idx, ends, alpha=0.7), scores)
    got = BalanceByKernel.apply(scores, idx, ends, 0.7)
    torch.testing.assert_close(torch.autograd.grad(got, scores)[0], want)


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


def test_moe_family_compiles() -> None:
    x, logits = torch.randn(12, 16), torch.randn(12, 8)

    def chain(x: Tensor, logits: Tensor) -> Tensor:
        routing = ops.route(logits, torch.zeros(8), top_k=2)
        rows, _, permutation = ops.permute(x, routing, num_experts=8, block=4)
        return ops.unpermute(rows, permutation, routing.weight_TK)

    compiled = torch.compile(chain, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), chain(x, logits))
