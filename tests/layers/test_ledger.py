"""Weight gradients put off and tensors computed again give what autograd gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsv3rt.config import ModelConfig
from dsv3rt.layers.feed_forward import FeedForward
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.moe import MoE

SMALL = ModelConfig(
    dim=32, expert_dim=16, num_experts=4, top_k=2, num_expert_groups=2, num_groups_kept=2, num_shared_experts=0
)


class Sums:
    """Takes gradients from a queue."""

    def __init__(self) -> None:
        self.order: list[nn.Parameter] = []

    def __call__(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.order.append(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_put_off_gradients_are_autograds(dtype: torch.dtype) -> None:
    """To the bit, twice in one queue, and not before the queue runs."""
    module = filled(FeedForward(16, 24, dtype=dtype))
    x = torch.randn(10, 16, dtype=dtype, requires_grad=True)
    for _ in range(2):
        module(x).sum().backward()
    want = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad(set_to_none=True)
    sums = Sums()
    queue = WeightGrads(sums)
    for _ in range(2):
        module(x, Ledger(queue)).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(x.grad, want[0])
    queue.run()
    assert all(torch.equal(p.grad, right) for p, right in zip(module.parameters(), want[1:], strict=True))
    assert len(sums.order) == 6
    assert sums.order[0] is module.down_proj.weight, "the backward's order"
    queue.run()
    assert len(sums.order) == 6, "a queue is worked off once"


def test_experts_put_their_gradients_off() -> None:
    moe = filled(MoE(SMALL))
    x = torch.randn(12, 32, requires_grad=True)
    routing = moe.route(x)
    dispatched = moe.dispatch(x, routing)
    moe.combine(moe.run_experts(dispatched), dispatched, routing).square().sum().backward()
    want = {name: p.grad for name, p in moe.named_parameters()}
    moe.zero_grad(set_to_none=True)
    queue = WeightGrads(Sums())
    routing = moe.route(x)
    dispatched = moe.dispatch(x, routing)
    ledger = Ledger(queue, frozenset({"swiglu"}))
    y = moe.combine(moe.run_experts(dispatched, ledger), dispatched, routing)
    assert ledger.discard()
    ledger.restore()
    y.square().sum().backward()
    assert moe.experts.down_proj.grad is None
    queue.run()
    assert all(torch.equal(p.grad, want[name]) for name, p in moe.named_parameters())


def test_recomputed_tensors_hold_no_memory_meanwhile() -> None:
    ledger = Ledger(recompute=frozenset({"norm"}))
    x = torch.randn(4, 8, requires_grad=True)
    y = ledger.recomputed("norm", lambda x: x * 2.0, x)
    kept = ledger.recomputed("other", lambda x: x * 2.0, x)
    z = (y * y + kept).sum()
    assert ledger.discard()
    assert y.untyped_storage().nbytes() == 0
    assert kept.untyped_storage().nbytes() == 4 * 8 * 4
    ledger.restore()
    assert torch.equal(y, 2 * x)
    z.backward()
    assert torch.equal(x.grad, 8 * x.detach() + 2)
    assert not Ledger().discard()
