"""Kernels of routing and permutation in tight places: guarded outputs, exact ranks, bad numbers, bad choices."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.types import Routing
from tests.gpu.quant_cases import Guarded, assert_pads_kept

pytestmark = pytest.mark.gpu


def distinct_logits(tokens: int, experts: int) -> Tensor:
    """Multiples of 1/32 in -8 .. 8, different within a token: their sigmoids differ by 1e-5, FP32 rounds at 6e-8."""
    ranks = torch.rand((tokens, 512), device="cuda").argsort(dim=1)[:, :experts]
    return (ranks.float() - 256) / 32


@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), [(256, 8, 4, 8), (512, 32, 5, 16), (60, 5, 2, 6)])
def test_route_kernel_ranks_like_fp64(experts: int, groups: int, kept: int, top_k: int) -> None:
    logits = distinct_logits(3000, experts)
    bias = torch.zeros(experts, device="cuda")
    got = ops.route(logits, bias, top_k=top_k, num_groups=groups, groups_kept=kept)
    wide = torch.sigmoid(logits.double())
    group_scores = wide.view(-1, groups, experts // groups).topk(2, dim=2).values.sum(dim=2).sort(dim=1).values
    # Sums of two scores round at 1.2e-7; nearer ones may go either way.
    clear = group_scores[:, groups - kept] - group_scores[:, groups - kept - 1] > 1e-6
    assert clear.float().mean() > 0.9
    want = reference._select(wide, reference.RouteRule(top_k, groups, kept, 1.0, True))
    assert torch.equal(got.idx_TK[clear], want[clear])


def assert_ties_as_the_reference(tokens: int, experts: int, groups: int, kept: int, top_k: int) -> None:
    logits = torch.randint(-1, 2, (tokens, experts), device="cuda").float()  # three scores alone: ties everywhere
    bias = torch.randint(0, 2, (experts,), device="cuda").float() / 4
    got = ops.route(logits, bias, top_k=top_k, num_groups=groups, groups_kept=kept)
    rule = reference.RouteRule(top_k, groups, kept, 1.0, True)
    assert torch.equal(got.idx_TK, reference._select(got.scores_TE + bias, rule))


@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), [(256, 8, 4, 8), (64, 16, 3, 6), (384, 4, 1, 16)])
def test_route_kernel_breaks_ties_between_groups_and_experts_as_the_reference(
    experts: int, groups: int, kept: int, top_k: int
) -> None:
    assert_ties_as_the_reference(2000, experts, groups, kept, top_k)


@pytest.mark.parametrize("seed", range(2))
def test_route_kernel_breaks_ties_as_the_reference_at_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        groups = rng.randint(1, 32)
        size = rng.choice([rng.randint(1, 512 // groups), max(1, 512 // groups // 8 * 8)])
        kept = rng.randint(1, groups)
        case = rng.randint(1, 1000), groups * size, groups, kept, rng.randint(1, min(16, kept * size))
        print(case)
        assert_ties_as_the_reference(*case)


def test_route_kernel_takes_nan_and_infinity_as_the_reference() -> None:
    logits = torch.randn((8, 64), device="cuda")
    logits[0, 33], logits[1, 5], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    bias = torch.zeros(64, device="cuda")
    bias[10] = -torch.inf
    got = ops.route(logits, bias, top_k=6, num_groups=4, groups_kept=2)
    rule = reference.RouteRule(6, 4, 2, 1.0, True)
    assert torch.equal(got.idx_TK, reference._select(got.scores_TE + bias, rule))
    assert torch.equal(got.weight_TK.isnan().any(dim=1), torch.tensor([True, False, False, True] + [False] * 4).cuda())


@pytest.mark.parametrize(("groups", "kept"), [(4, 1), (4, 3), (1, 1)])
def test_route_kernel_falls_back_to_the_lowest_index_among_minus_infinities(groups: int, kept: int) -> None:
    logits, bias = torch.randn((50, 64), device="cuda"), torch.full((64,), -torch.inf, device="cuda")
    bias[::20] = 0.0  # four experts of finite scores, one in each group
    got = ops.route(logits, bias, top_k=6, num_groups=groups, groups_kept=kept)
    rule = reference.RouteRule(6, groups, kept, 1.0, True)
    assert torch.equal(got.idx_TK, reference._select(got.scores_TE + bias, rule))


def assert_places(idx: Tensor, experts: int, block: int) -> None:
    """By sorting; what names no expert gets no row."""
    counts, offsets, row_of = torch.ops.dsv3rt.place(idx, experts, block)
    exist = (idx >= 0) & (idx < experts)
    choices = idx.where(exist, experts).flatten()
    loads = choices.bincount(minlength=experts + 1)[:experts]
    assert torch.equal(counts.long(), loads)
    assert offsets[0].item() == 0
    assert torch.equal(offsets[1:].long(), ((loads + block - 1) // block * block).cumsum(0))
    order = choices.argsort(stable=True)[: int(loads.sum())]  # those that are left out come last
    rank = torch.arange(len(order), device="cuda") - (loads.cumsum(0) - loads)[choices[order]]
    assert torch.equal(row_of.flatten()[order], offsets.long()[choices[order]] + rank)
    assert row_of[~exist].eq(-1).all()


def test_place_kernel_gives_a_block_more_choices_than_threads_where_there_are_many() -> None:
    idx = torch.rand((20011, 64), device="cuda").topk(8, dim=1).indices
    idx[5, 3] = 64  # no such expert
    assert_places(idx, 64, 128)


@pytest.mark.parametrize("seed", range(2))
def test_place_kernel_gives_every_choice_its_row_at_random_shapes(seed: int) -> None:
    """Any choices at all: an expert chosen twice, few of many, none that exists."""
    rng = random.Random(seed)
    for _ in range(60):
        experts, block = rng.randint(1, 512), rng.choice([1, 3, 16, 64, 128, 200])
        first, last = sorted(rng.randint(-2, experts + 1) for _ in range(2))
        shape = rng.randint(1, 5000), rng.randint(1, 16)
        print(shape, experts, block, first, last)
        assert_places(torch.randint(first, last + 1, shape, device="cuda"), experts, block)


def test_route_kernel_survives_scores_that_all_underflow() -> None:
    logits = torch.full((5, 64), -200.0, device="cuda", requires_grad=True)
    got = ops.route(logits, torch.zeros(64, device="cuda"), top_k=6)
    assert got.weight_TK.eq(0).all()
    (grad,) = torch.autograd.grad(got.weight_TK.sum(), logits)
    assert grad.eq(0).all()


def test_route_kernels_write_every_element_and_no_other() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    for tokens, experts, top_k in [(1, 8, 1), (77, 60, 6), (133, 512, 16)]:
        room = Guarded()
        logits, bias = torch.randn((tokens, experts), device="cuda"), torch.zeros(experts, device="cuda")
        idx = room.codes(8 * tokens * top_k).view(torch.int64).view(tokens, top_k)
        counts = room.codes(8 * experts).view(torch.int64).zero_()
        weight, scores = room.floats(tokens, top_k), room.floats(tokens, experts)
        extension.route(
            logits, bias, idx, weight, scores, counts, num_groups=1, groups_kept=1, scale=1.0, renormalize=True
        )
        want = ops.route(logits, bias, top_k=top_k)
        assert torch.equal(idx, want.idx_TK)
        assert torch.equal(weight, want.weight_TK)
        assert torch.equal(scores, want.scores_TE)
        assert counts.sum().item() == tokens * top_k
        grad = room.floats(tokens, experts)
        extension.route_backward(torch.ones_like(weight), None, scores, idx, grad, scale=1.0, renormalize=False)
        assert grad.isfinite().all()
        room.assert_intact()


@pytest.mark.parametrize("top_k", [1, 3, 6, 8, 16])
@pytest.mark.parametrize("columns", [8, 200, 7168, 8200])
def test_row_kernels_write_every_element_and_no_other(columns: int, top_k: int) -> None:
    extension = pytest.importorskip("dsv3rt._C")
    tokens, experts = 137, 20
    idx = torch.rand((tokens, experts), device="cuda").topk(top_k, dim=1).indices
    counts, offsets, row_of = torch.ops.dsv3rt.place(idx, experts, 128)
    end = int(offsets[-1])
    x, room = torch.randn((tokens, columns), device="cuda").bfloat16(), Guarded()
    rows = room.halves(end, columns)  # no row behind the last segment
    extension.permute(x, row_of, counts, offsets, rows)
    assert torch.equal(rows, reference.scatter(x, row_of, x.new_zeros(end, columns)))
    y = room.halves(tokens, columns)
    extension.unpermute(rows, None, row_of, y)
    assert torch.equal(y, reference.gather_sum(rows, row_of, None))  # products with one are exact, sums in one order
    weight, grad, grad_weight = torch.rand((tokens, top_k), device="cuda"), room.halves(end, columns), None
    for with_weights in (False, True):
        grad.fill_(torch.nan)
        grad_weight = room.floats(tokens, top_k) if with_weights else None
        given = rows if with_weights else None
        extension.unpermute_backward(x, given, weight, row_of, counts, offsets, grad, grad_weight)
        want = reference.unpermute_backward(x, rows, weight, row_of, end)
        assert torch.equal(grad, want[0])
        if grad_weight is not None:
            wide = (x.double().unsqueeze(1) * rows[row_of].double()).sum(dim=2)
            # Squares: every term is positive. A thread adds at most 5 runs of 8, then come 13 additions of the block.
            torch.testing.assert_close(grad_weight.double(), wide, rtol=60 * 2.0**-24, atol=0)
    room.assert_intact()


def test_permute_kernel_of_fp8_writes_every_scale_and_no_other() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    idx = torch.rand((137, 20), device="cuda").topk(6, dim=1).indices
    counts, offsets, row_of = torch.ops.dsv3rt.place(idx, 20, 1)
    end, room = int(offsets[-1]), Guarded()
    q = ops.quantize_1x128(torch.randn((137, 400), device="cuda"))
    rows, scale = room.codes(end, 400), room.row_scales(end, 4)
    packed, token_of_row = room.floats(137, 4), torch.full((end,), 7, dtype=torch.int32, device="cuda")
    scratch = {"packed_scale": packed, "token_of_row": token_of_row}
    extension.permute(
        q.data.view(torch.uint8), row_of, counts, offsets, rows, scale=q.scale, rows_scale=scale, **scratch
    )
    want = reference.permute_quant(q, row_of, end)
    assert torch.equal(rows, want.data.view(torch.uint8))
    assert torch.equal(scale, want.scale)
    assert_pads_kept(scale)
    room.assert_intact()


@pytest.mark.parametrize("top_k", [8, 16])
def test_row_kernels_leave_out_rows_that_do_not_exist_in_every_pass(top_k: int) -> None:
    tokens, experts = 300, 20
    idx = torch.rand((tokens, experts), device="cuda").topk(top_k, dim=1).indices
    idx[::7, 3] = experts
    idx[1::7, 0] = -(2**40)
    idx[2::7, -1] = experts
    idx[3::7] = -1  # no row at all
    exists = (idx >= 0) & (idx < experts)
    x = torch.randn((tokens, 1024), device="cuda").bfloat16().requires_grad_()
    weight = torch.rand((tokens, top_k), device="cuda", requires_grad=True)
    rows, _, permutation = ops.permute(x, Routing(idx, weight, weight, idx), num_experts=experts)
    assert torch.equal(permutation.row_of_TK.ge(0), exists)
    y = ops.unpermute(rows, permutation, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    gates = (weight.detach() * exists).double()
    # One rounding to BF16, which is 2^-9 of a number at most; FP32 sums of up to 16 of the same sign.
    torch.testing.assert_close(y.double(), x.double() * gates.sum(dim=1, keepdim=True), rtol=2.0**-8, atol=0)
    # Each gate is rounded to BF16 on its way through a row, and so is their sum.
    torch.testing.assert_close(dx.double(), gates.sum(dim=1, keepdim=True).expand_as(dx), rtol=2.0**-7, atol=0)
    assert dweight[~exists].eq(0).all()
    scores = torch.rand((tokens, experts), device="cuda")
    got = torch.ops.dsv3rt.route_backward(torch.ones_like(weight), None, scores, idx, True, 1.0, False)
    chosen = torch.zeros((tokens, experts + 1), device="cuda").scatter_(1, idx.where(exists, experts), 1.0)
    torch.testing.assert_close(got, chosen[:, :experts] * scores * (1 - scores))


@pytest.mark.parametrize("experts", [6, 64, 256, 510])
def test_route_backward_kernel_adds_gradients_of_an_expert_named_twice(experts: int) -> None:
    """As its reference does; `route` names none twice."""
    idx = torch.randint(0, experts, (100, 16))
    idx[:, 1] = idx[:, 0]
    weight_grad, (scores, scores_grad) = torch.rand((100, 16)), torch.rand((2, 100, experts)).unbind()
    arguments = (weight_grad, scores_grad, scores, idx)
    got = torch.ops.dsv3rt.route_backward(*(a.cuda() for a in arguments), True, 2.5, True)
    want = torch.ops.dsv3rt.route_backward(*(a.double() for a in arguments[:3]), idx, True, 2.5, True)
    # Sums of up to 17 terms of at most 2.5, each some roundings off.
    torch.testing.assert_close(got.cpu().double(), want.double(), rtol=0, atol=17 * 2.5 * 8 * 2.0**-24)


@pytest.mark.parametrize("experts", [6, 64, 256])
def test_kernels_of_experts_take_arrays_on_any_address(experts: int) -> None:
    def moved(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    idx = torch.rand((40, experts), device="cuda").topk(4, dim=1).indices
    weight_grad, (scores, scores_grad) = torch.rand((40, 4)).cuda(), torch.rand((2, 40, experts)).cuda().unbind()
    ends, one = torch.tensor([0, 30, 40], dtype=torch.int32, device="cuda"), torch.ones((), device="cuda")
    namespace = torch.ops.dsv3rt
    want = namespace.route_backward(weight_grad, scores_grad, scores, idx, True, 2.5, True)
    got = namespace.route_backward(moved(weight_grad), moved(scores_grad), moved(scores), moved(idx), True, 2.5, True)
    assert torch.equal(got, want)
    loss, slope = namespace.balance_loss(scores, idx, ends, 0.5)
    for a, b in zip(namespace.balance_loss(moved(scores), idx, ends, 0.5), (loss, slope), strict=True):
        assert torch.equal(a, b)
    grad = namespace.balance_loss_backward(one, scores, slope, ends)
    assert torch.equal(namespace.balance_loss_backward(one, moved(scores), moved(slope), ends), grad)


def test_row_kernels_take_slices_and_expanded_gradients() -> None:
    idx = torch.rand((50, 8), device="cuda").topk(2, dim=1).indices
    wide = torch.randn((50, 130), device="cuda").bfloat16()
    x = wide[:, 1:129].requires_grad_()  # neither contiguous nor on 16 bytes
    rows, _, permutation = ops.permute(x, Routing(idx, wide, wide, idx), num_experts=8)
    y = ops.unpermute(rows, permutation, None)
    assert torch.equal(y, x * 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.eq(2).all()
    flat = torch.randn(50 * 128 + 1, device="cuda").bfloat16()[1:].view(50, 128)  # contiguous, not on 16 bytes
    rows, _, permutation = ops.permute(flat, Routing(idx, wide, wide, idx), num_experts=8)
    assert torch.equal(rows[permutation.row_of_TK[:, 1]], flat)


def test_moe_ops_are_registered_on_cuda() -> None:
    namespace, logits, bias = torch.ops.dsv3rt, torch.randn((12, 8), device="cuda"), torch.zeros(8, device="cuda")
    idx, weight, scores, _ = namespace.route(logits, bias, 2, 4, 2, 2.5, True)
    torch.library.opcheck(namespace.route.default, (logits, bias, 2, 4, 2, 2.5, True))
    torch.library.opcheck(namespace.route_backward.default, (weight, scores, scores, idx, True, 2.5, True))
    torch.library.opcheck(namespace.place.default, (idx, 8, 4))
    counts, offsets, row_of = namespace.place(idx, 8, 4)
    x = torch.randn((12, 16), device="cuda").bfloat16()
    rows = torch.randn((56, 16), device="cuda").bfloat16()
    checks = ("test_schema", "test_faketensor")  # rows behind the last segment are unspecified: values differ
    torch.library.opcheck(namespace.permute.default, (x, None, row_of, counts, offsets, 56), test_utils=checks)
    torch.library.opcheck(namespace.unpermute.default, (rows, weight, row_of))
    arguments = (x, rows, weight, row_of, counts, offsets, 56)
    torch.library.opcheck(namespace.unpermute_backward.default, arguments, test_utils=checks)
