"""Products in FP8 on the references: near FP32, the same to the bit each time, put off or not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from fp8_cases import Weights, bound, layout_of, take
from torch import Tensor, nn
from torch.nn import functional

from dsv3rt import ops
from dsv3rt.layers import fp8, main_grad
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.weights import WeightCast


def no_sink(parameter: nn.Parameter, gradient: Tensor) -> None:
    raise AssertionError("products in FP8 add to their sums themselves")


def assert_near(got: list[Tensor], want: list[Tensor], casts: list[int]) -> None:
    for index, (one, other, count) in enumerate(zip(got, want, casts, strict=True)):
        diff = ops.calc_diff(one, other)
        assert diff < bound(count), (index, diff)
        assert diff > 0, f"{index}: this was no product in FP8"


def mlp_in_fp32(weights: Weights, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf, up, down = (t.detach().clone().requires_grad_() for t in (x, weights.up, weights.down))
    gate, value = functional.linear(leaf, up).chunk(2, dim=-1)
    y = functional.linear(functional.silu(gate) * value, down)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in (leaf, up, down))]  # type: ignore[list-item]


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("rows", [1, 130])
def test_fp8_linear_is_near_fp32(rows: int, keep_input: bool) -> None:
    """Two casts lie behind each result."""
    weights = tuple(nn.Parameter(torch.randn(n, 256) * 0.05) for n in (128, 48))
    x, dy = torch.randn(rows, 256, requires_grad=True), torch.randn(rows, 176)
    y = fp8.linear(x, (WeightCast(), weights), None, keep_input=keep_input)
    y.backward(dy)
    assert all(weight.grad is None for weight in weights), "their gradients go past autograd"
    stacked = torch.cat([weight.detach() for weight in weights])
    got = [y.detach(), x.grad, torch.cat([take(weight) for weight in weights])]  # type: ignore[misc]
    assert_near(got, [x.detach() @ stacked.t(), dy @ stacked, dy.t() @ x.detach()], [2, 2, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("rows", [1, 130])
def test_fp8_norm_linear_is_the_linear_of_the_norm(rows: int, deferred: bool) -> None:
    """To the bit, from columns of a wider tensor as a latent is."""
    norm = RMSNorm(192, 1e-6, dtype=torch.bfloat16)
    weight = nn.Parameter((torch.randn(80, 192) * 0.05).bfloat16())
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    wide, dy = torch.randn(rows, 320).bfloat16(), torch.randn(rows, 80).bfloat16()

    def run(fused: bool) -> list[Tensor]:
        owed = WeightGrads(no_sink) if deferred else None
        ledger, stack = Ledger(owed), (WeightCast(), (weight,))
        leaf = wide.clone().requires_grad_()
        x, norm.weight.grad = leaf[:, 64:256], None
        y = fp8.norm_linear(x, norm, stack, ledger) if fused else fp8.linear(norm(x), stack, ledger, keep_input=False)
        y.backward(dy)
        if owed is not None:
            assert take(weight) is None
            owed.run()
        return [y.detach(), leaf.grad, norm.weight.grad, take(weight)]  # type: ignore[list-item]

    got, want = run(True), run(False)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert all(bool(one.any()) for one in got)


def test_fp8_mlp_is_near_fp32() -> None:
    """A product has the casts of both factors behind it. Gate and up: x and the weight each, so 6 behind y with those
    of hidden and down. As kept they have one more each, so 8 behind down's gradient with those of the product and dy.
    Their gradient has both, dy and down behind it, 8; then itself and an operand are cast for dx and up's: 10."""
    weights = Weights.draw(128, 256, None, torch.float32)
    x, dy = (torch.randn(150, 128) for _ in range(2))
    assert_near(weights.run(x, dy, None), mlp_in_fp32(weights, x, dy), [6, 10, 10, 8])


def test_fp8_experts_are_mlps_side_by_side() -> None:
    """The same products, but for the order of FP32 sums in weight gradients; none where there are no rows."""
    counts = [5, 0, 131]
    layout, valid, num_rows = layout_of(counts)
    weights = Weights.draw(128, 128, len(counts), torch.float32)
    x, dy = (torch.randn(num_rows, 128) * valid[:, None] for _ in range(2))
    y, dx, up, down = weights.run(x, dy, layout)
    for index, (start, count) in enumerate(zip(layout.offsets.tolist()[:-1], counts, strict=True)):
        if count == 0:
            assert not up[index].any()
            assert not down[index].any()
            continue
        rows = slice(start, start + count)
        alone = Weights(*(nn.Parameter(w.detach()[index]) for w in (weights.up, weights.down)))
        want = alone.run(x[rows], dy[rows], None)
        for got, right in zip((y[rows], dx[rows], up[index], down[index]), want, strict=True):
            assert ops.calc_diff(got, right) < 1e-10


def test_fp8_experts_gather_is_permute_and_unpermute() -> None:
    """With the gates inside, other numbers are cast: on either side one forward (hidden) and two backward (dy, and the
    product or the gradient behind it). The gates' gradient: dy, gate and up on one side, hidden on the other."""
    experts, tokens = 4, 70
    weights = Weights.draw(128, 128, experts, torch.float32)
    x, dy = torch.randn(tokens, 128), torch.randn(tokens, 128)
    idx_TK = torch.rand(tokens, experts).argsort(dim=1)[:, :2].contiguous()
    gate_TK = torch.rand(tokens, 2)
    layout, permutation = ops.place(idx_TK, num_experts=experts)
    inside, outside = (gate_TK.clone().requires_grad_() for _ in range(2))
    got = weights.run(x, dy, layout, gather=fp8.Gather(permutation, inside))

    leaf = x.clone().requires_grad_()
    rows_PD = torch.zeros(permutation.num_rows, 128).index_copy(
        0, permutation.row_of_TK.flatten(), leaf.repeat_interleave(2, dim=0)
    )
    up, down = (WeightCast(), (weights.up,)), (WeightCast(), (weights.down,))
    y = ops.unpermute(fp8.swiglu_mlp(rows_PD, up, down, None, layout), permutation, outside)
    y.backward(dy)
    want = [y.detach(), leaf.grad, *weights.gradients()]
    assert inside.grad is not None
    assert outside.grad is not None
    assert_near([*got, inside.grad], [*want, outside.grad], [2, 4, 4, 4, 4])


def test_fp8_gradients_put_off_are_the_same() -> None:
    """To the bit, over two micro-batches in one queue, and not before the queue runs."""
    layout, valid, num_rows = layout_of([100, 40])
    weights = Weights.draw(128, 128, 2, torch.float32)
    batches = [[torch.randn(num_rows, 128) * valid[:, None] for _ in range(2)] for _ in range(2)]
    up, down = (WeightCast(), (weights.up,)), (WeightCast(), (weights.down,))

    def backward(ledger: Ledger | None) -> list[Tensor]:
        found = []
        for x, dy in batches:
            leaf = x.clone().requires_grad_()
            fp8.swiglu_mlp(leaf, up, down, ledger, layout).backward(dy)
            found.append(leaf.grad)
        return found  # type: ignore[return-value]

    inputs, want = backward(None), weights.gradients()
    queue = WeightGrads(no_sink)
    deferred = backward(Ledger(queue))
    assert all(torch.equal(one, other) for one, other in zip(deferred, inputs, strict=True))
    assert weights.gradients() == []
    queue.run()
    got = weights.gradients()
    assert len(got) == 2
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_fp8_products_are_deterministic() -> None:
    layout, valid, num_rows = layout_of([7, 129])
    weights = Weights.draw(128, 128, 2, torch.bfloat16)
    x, dy = (torch.randn(num_rows, 128).to(torch.bfloat16) * valid[:, None] for _ in range(2))
    one, two = weights.run(x, dy, layout), weights.run(x, dy, layout)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_sums_of_stacked_weights_stay_in_place() -> None:
    """They begin as neighbours, so that later contributions add to both in one product."""
    weights = tuple(nn.Parameter(torch.randn(128, 128) * 0.1) for _ in range(2))
    cast, x = WeightCast(), torch.randn(64, 128)
    sums = []
    for _ in range(3):
        fp8.linear(x.requires_grad_(), (cast, weights), None, keep_input=False).sum().backward()
        sums.append([main_grad.of(weight).grad for weight in weights])
    first = sums[0]
    for before, after in pairwise(sums):
        assert all(a is b for a, b in zip(before, after, strict=True))
    assert first[0] is not None
    assert first[1] is not None
    assert first[1].data_ptr() == first[0].data_ptr() + first[0].numel() * 4
    twice = [take(weight) for weight in weights]
    fp8.linear(x, (cast, weights), None, keep_input=False).sum().backward()
    for weight, total in zip(weights, twice, strict=True):
        once = take(weight)
        assert once is not None
        assert total is not None
        torch.testing.assert_close(total, 3 * once, rtol=1e-6, atol=1e-6 * float(once.abs().max()))  # two FP32 sums


def test_weights_are_cast_again_only_after_a_change() -> None:
    weight, cast = nn.Parameter(torch.randn(128, 128)), WeightCast()
    before = cast.of(weight)
    assert cast.of(weight) is before
    with torch.no_grad():
        weight.mul_(2.0)
    after = cast.of(weight)
    assert torch.equal(after[0].scale, 2 * before[0].scale)
    other = nn.Parameter(torch.randn(128, 128))
    assert cast.of(other) is not after


def test_fp8_linear_shows_nan() -> None:
    weight = nn.Parameter(torch.randn(128, 128))
    x = torch.randn(4, 128)
    x[2, 5] = torch.nan
    y = fp8.linear(x, (WeightCast(), (weight,)), None, keep_input=False)
    assert torch.isnan(y).all(dim=1).tolist() == [False, False, True, False]
    assert torch.isfinite(y[[0, 1, 3]]).all()


def test_frozen_weights_get_no_sum() -> None:
    weight = nn.Parameter(torch.randn(128, 128), requires_grad=False)
    x = torch.randn(4, 128, requires_grad=True)
    fp8.linear(x, (WeightCast(), (weight,)), None, keep_input=False).sum().backward()
    assert x.grad is not None
    assert main_grad.of(weight).grad is None
