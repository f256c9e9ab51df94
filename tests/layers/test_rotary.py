"""Queries rotated in their own memory: the numbers and gradients of a rotated copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.linear import Linear
from dsv3rt.layers.rotary import rotate_queries

T, H, N, R, D = 9, 3, 6, 4, 10


def case(dtype: torch.dtype) -> tuple[Linear, Tensor, Tensor, Tensor]:
    linear = Linear(D, H * (N + R), dtype=dtype)
    nn.init.normal_(linear.weight)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    return linear, x, torch.randn(T, R // 2), torch.randn(T, R // 2)


def rotated_copy(q_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    nope, rope = q_THC.split([N, R], dim=-1)
    return torch.cat((nope, ops.rope(rope, cos_TR, sin_TR)), dim=-1)


def gradients(rotate: Any, dtype: torch.dtype, ledger: Ledger | None) -> list[Tensor]:
    torch.manual_seed(0)
    linear, x, cos, sin = case(dtype)
    q = rotate(linear(x, ledger).unflatten(-1, (H, N + R)), cos, sin)
    (q.float().sin() * torch.randn(T, H, N + R)).sum().backward()
    return [q.detach(), *(t.grad for t in (x, linear.weight) if t.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_queries_equals_a_rotated_copy(dtype: torch.dtype) -> None:
    got, want = (gradients(rotate, dtype, None) for rotate in (rotate_queries, rotated_copy))
    assert len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rotate_queries_follows_a_deferred_weight_gradient() -> None:
    results = []
    for rotate in (rotate_queries, rotated_copy):
        owed: list[Tensor] = []
        queue = WeightGrads(lambda _, gradient, owed=owed: owed.append(gradient))  # type: ignore[misc]
        results.append(gradients(rotate, torch.float32, Ledger(weight_grads=queue)))
        queue.run()
        results[-1] += owed
    assert len(results[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rotate_queries_copies_nothing() -> None:
    linear, x, cos, sin = case(torch.float32)
    q_THC = linear(x).unflatten(-1, (H, N + R))
    turned = rotate_queries(q_THC, cos, sin)
    assert turned.data_ptr() == q_THC.data_ptr()
    passed_on: list[int] = []
    linear.weight.requires_grad_(False)
    q_THC.register_hook(lambda gradient: passed_on.append(gradient.data_ptr()))
    dq = torch.randn(T, H, N + R)
    turned.backward(dq)
    assert passed_on == [dq.data_ptr()]
