"""Kernels of routing and permutation against FP64 and against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.types import Routing

pytestmark = pytest.mark.gpu

CASES = [  # tokens, experts, groups, kept, top-k
    (1, 8, 1, 1, 1),
    (77, 64, 1, 1, 6),
    (1000, 256, 8, 4, 8),
    (4099, 256, 8, 4, 8),
    (513, 384, 1, 1, 8),
    (300, 512, 16, 3, 16),
    (0, 256, 8, 4, 8),
    (65, 12, 4, 2, 5),
]


def routing_of(idx_TK: Tensor, num_experts: int) -> Routing:
    weight = torch.rand(idx_TK.shape, device="cuda")
    scores = torch.zeros((idx_TK.shape[0], num_experts), device="cuda")
    return Routing(idx_TK, weight, scores, torch.bincount(idx_TK.flatten(), minlength=num_experts))


def random_choices(tokens: int, experts: int, top_k: int, skew: float = 0.0) -> Tensor:
    keys = torch.rand((tokens, experts), device="cuda") + skew * torch.linspace(1, 0, experts, device="cuda")
    return keys.topk(top_k, dim=1).indices


def random_number_of_experts(rng: random.Random) -> int:
    """1 to 512; every second one a multiple of 32, or of 8."""
    unit = rng.choice([1, 1, 8, 32])
    return unit * rng.randint(1, 512 // unit)


def random_case(rng: random.Random) -> tuple[int, int, int, int, int]:
    """As in CASES: any number of groups that divides the experts, as many kept, any top-k that those hold."""
    experts = random_number_of_experts(rng)
    groups = rng.choice([groups for groups in range(1, 33) if experts % groups == 0])
    kept = rng.randint(1, groups)
    return rng.randint(1, 5000), experts, groups, kept, rng.randint(1, min(16, kept * experts // groups))


def assert_routes(case: tuple[int, ...], dtype: torch.dtype, renormalize: bool) -> None:
    """Choices are compared where the kernel's own FP32 scores decide: the reference chooses from them, exactly."""
    tokens, experts, groups, kept, top_k = case
    logits = torch.randn((tokens, experts), device="cuda").to(dtype)
    bias = torch.randn(experts, device="cuda") * 0.1
    got = ops.route(logits, bias, top_k=top_k, num_groups=groups, groups_kept=kept, scale=2.5, renormalize=renormalize)
    # A sigmoid in FP32: the exponential is within 2 ulp, sum and division round once each.
    exact = torch.sigmoid(logits.double())
    assert ((got.scores_TE.double() - exact).abs() <= 4 * 2.0**-23 * exact).all()
    rule = reference.RouteRule(top_k, groups, kept, 2.5, renormalize)
    assert torch.equal(got.idx_TK, reference._select(got.scores_TE + bias, rule))
    assert torch.equal(got.counts_E, torch.bincount(got.idx_TK.flatten(), minlength=experts))
    chosen = got.scores_TE.double().gather(1, got.idx_TK)
    want = chosen / chosen.sum(dim=1, keepdim=True) if renormalize else chosen
    # Up to 16 additions and three more roundings.
    torch.testing.assert_close(got.weight_TK.double(), want * 2.5, rtol=20 * 2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
def test_route_kernel_matches_fp64(case: tuple[int, ...], dtype: torch.dtype, renormalize: bool) -> None:
    assert_routes(case, dtype, renormalize)


def assert_route_gradients(case: tuple[int, ...], dtype: torch.dtype, renormalize: bool) -> None:
    tokens, experts, groups, kept, top_k = case
    logits = torch.randn((tokens, experts), device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(experts, device="cuda") * 0.1
    got = ops.route(logits, bias, top_k=top_k, num_groups=groups, groups_kept=kept, scale=2.5, renormalize=renormalize)
    dweight, dscores = torch.randn_like(got.weight_TK), torch.randn_like(got.scores_TE)
    torch.autograd.backward((got.weight_TK, got.scores_TE), (dweight, dscores))
    wide = logits.detach().double().requires_grad_()
    scores = torch.sigmoid(wide)
    chosen = scores.gather(1, got.idx_TK)
    total = chosen.sum(dim=1, keepdim=True) if renormalize else torch.ones_like(chosen[:, :1])
    torch.autograd.backward((chosen / total * 2.5, scores), (dweight.double(), dscores.double()))
    assert logits.grad is not None
    assert wide.grad is not None
    assert logits.grad.dtype == dtype
    # The magnitudes of what a score's slope adds up. It is taken times s (1 - s), whose error is of the size of s.
    size = dweight.double().abs()
    if renormalize:
        size = (size + (size * chosen.detach()).sum(dim=1, keepdim=True) / total.detach()) / total.detach()
    size = dscores.double().abs().scatter_add(1, got.idx_TK, 2.5 * size)
    # Scores are within 2^-21 of themselves (above), totals within that and 16 roundings, and may be there twice: 2^-18
    # has room for ten more roundings. Half a step of BF16 is 2^-8 of a number at most.
    bound = 2.0**-18 * size * scores.detach() + (2.0**-8 * wide.grad.abs() if dtype == torch.bfloat16 else 0.0)
    assert ((logits.grad.double() - wide.grad).abs() <= bound).all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_kernel_gradient_matches_fp64(renormalize: bool, dtype: torch.dtype) -> None:
    assert_route_gradients((515, 256, 8, 4, 8), dtype, renormalize)


@pytest.mark.parametrize("seed", range(4))
def test_route_kernels_match_fp64_at_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        case, dtype, renormalize = random_case(rng), rng.choice([torch.float32, torch.bfloat16]), rng.random() < 0.7
        print(case, dtype, renormalize)
        assert_routes(case, dtype, renormalize)
        assert_route_gradients(case, dtype, renormalize)


def test_route_kernel_breaks_ties_by_index() -> None:
    logits = torch.zeros((40, 256), device="cuda")
    logits[1::2, 100:] = 1.0
    got = ops.route(logits, torch.zeros(256, device="cuda"), top_k=8, num_groups=8, groups_kept=4)
    assert torch.equal(got.idx_TK[0], torch.arange(8, device="cuda"))
    assert torch.equal(got.idx_TK[1], torch.arange(100, 108, device="cuda"))


def placement_cases() -> list[tuple[Tensor, int]]:
    return [
        (random_choices(1, 8, 1), 8),
        (random_choices(1000, 256, 8), 256),
        (random_choices(4097, 64, 6, skew=2.0), 64),
        (random_choices(300, 512, 16), 512),
        (torch.full((700, 1), 3, device="cuda"), 8),  # all to one
        (torch.empty((0, 8), dtype=torch.int64, device="cuda"), 256),
    ]


def random_placement(rng: random.Random) -> tuple[Tensor, int, int]:
    """Choices, experts, and the block that segments are padded to; some draws leave most experts without a token."""
    experts = random_number_of_experts(rng)
    idx = random_choices(rng.randint(1, 5000), experts, rng.randint(1, min(16, experts)), rng.choice([0.0, 0.5, 4.0]))
    return idx, experts, rng.choice([1, 2, 8, 16, 64, 100, 128, 128, 256])


def assert_permutes(idx: Tensor, experts: int, columns: int, block: int) -> None:
    x = torch.randn((idx.shape[0], columns), device="cuda").bfloat16()
    rows, layout, permutation = ops.permute(x, routing_of(idx, experts), num_experts=experts, block=block)
    want_layout, want = reference.place(idx, experts, block)
    assert torch.equal(layout.counts_X, want_layout.counts_X)
    assert torch.equal(layout.offsets, want_layout.offsets)
    assert torch.equal(permutation.row_of_TK, want.row_of_TK)
    end = int(layout.offsets[-1])
    expected = reference.scatter(x, want.row_of_TK, x.new_zeros(want.num_rows, columns))
    assert torch.equal(rows[:end], expected[:end])


def assert_moves_fp8_rows(idx: Tensor, experts: int, columns: int, block: int) -> None:
    q = ops.quantize_1x128(torch.randn((idx.shape[0], columns), device="cuda").bfloat16())
    rows, layout, permutation = ops.permute(q, routing_of(idx, experts), num_experts=experts, block=block)
    end = int(layout.offsets[-1])
    want = reference.permute_quant(q, permutation.row_of_TK, permutation.num_rows)
    assert torch.equal(rows.data.view(torch.uint8)[:end], want.data.view(torch.uint8)[:end])
    assert torch.equal(rows.scale[:end], want.scale[:end])
    assert rows.scale.stride() == want.scale.stride()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("columns", [64, 7168, 136])
def test_permute_kernel_matches_reference(number: int, columns: int) -> None:
    assert_permutes(*placement_cases()[number], columns=columns, block=128)


@pytest.mark.parametrize("number", range(6))
def test_permute_kernel_moves_fp8_rows(number: int) -> None:
    assert_moves_fp8_rows(*placement_cases()[number], columns=7168, block=128)


@pytest.mark.parametrize("seed", range(4))
def test_permute_kernel_matches_reference_at_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        idx, experts, block = random_placement(rng)
        octets = (1 << 22) // (idx.numel() + experts * block) + 1  # 2^25 numbers and some
        columns = rng.choice([8, 16]) * rng.randint(1, min(octets, 600))
        print(tuple(idx.shape), experts, block, columns)
        assert_permutes(idx, experts, columns, block)
        assert_moves_fp8_rows(idx, experts, 16 * -(-columns // 16), block)


def assert_unpermutes(idx: Tensor, experts: int, columns: int, weighted: bool, block: int = 128) -> None:
    """With gradients. No more than 8200 columns: a thread then has at most five runs of eight of them."""
    routing = routing_of(idx, experts)
    x = torch.randn((idx.shape[0], columns), device="cuda").bfloat16().requires_grad_()
    weight = routing.weight_TK.requires_grad_() if weighted else None
    rows, _, permutation = ops.permute(x, routing, num_experts=experts, block=block)
    scale = torch.randn((permutation.num_rows, 1), device="cuda").bfloat16()
    y = ops.unpermute(rows * scale, permutation, weight)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, weight] if weight is not None else [x], dy)
    row_of = permutation.row_of_TK
    picked = (rows.detach() * scale)[row_of].double()  # (T, K, D)
    gates = torch.ones(idx.shape, device="cuda") if weight is None else weight.detach()
    terms = picked * gates.double().unsqueeze(2)
    drows = ((dy.unsqueeze(1) * gates.unsqueeze(2)).bfloat16() * scale[row_of]).double()  # products rounded to BF16
    for got, parts in ((y, terms), (grads[0], drows)):
        # FP32 sums of up to 16 terms, then half a step of BF16, which is 2^-8 of a number at most.
        bound = 2.0**-8 * parts.sum(dim=1).abs() + 18 * 2.0**-24 * parts.abs().sum(dim=1)
        assert ((got.double() - parts.sum(dim=1)).abs() <= bound).all()
    if weight is not None:
        products = picked * dy.double().unsqueeze(1)
        # 40 additions of a thread, then 13 of the block.
        bound = 60 * 2.0**-24 * products.abs().sum(dim=2)
        assert ((grads[1].double() - products.sum(dim=2)).abs() <= bound).all()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("number", range(6))
def test_unpermute_kernel_and_gradients_match_fp64(number: int, weighted: bool) -> None:
    assert_unpermutes(*placement_cases()[number], columns=1024, weighted=weighted)


@pytest.mark.parametrize("seed", range(4))
def test_unpermute_kernel_and_gradients_match_fp64_at_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        idx, experts, block = random_placement(rng)
        columns = 8 * rng.randint(1, min((1 << 19) // idx.numel() + 1, 1025))  # 2^22 FP64 numbers and some
        weighted = rng.random() < 0.7
        print(tuple(idx.shape), experts, block, columns, weighted)
        assert_unpermutes(idx, experts, columns, weighted, block)


def test_unpermute_kernel_gives_padding_no_gradient() -> None:
    idx = random_choices(500, 64, 6)
    routing = routing_of(idx, 64)
    _, layout, permutation = ops.permute(torch.randn((500, 512), device="cuda").bfloat16(), routing, num_experts=64)
    rows = torch.full((permutation.num_rows, 512), torch.nan, device="cuda", dtype=torch.bfloat16)
    rows[permutation.row_of_TK.flatten()] = 1.0
    rows.requires_grad_()
    poison = torch.full_like(rows, torch.nan)  # what the allocator may hand out next
    del poison
    y = ops.unpermute(rows, permutation, routing.weight_TK)
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y, rows, torch.ones_like(y))
    used = torch.zeros(permutation.num_rows, dtype=torch.bool, device="cuda")
    used[permutation.row_of_TK.flatten()] = True
    end = int(layout.offsets[-1])
    assert grad[:end][~used[:end]].eq(0).all()
    assert grad[:end][used[:end]].isfinite().all()


def test_moe_kernels_leave_out_what_is_out_of_range() -> None:
    idx = random_choices(100, 16, 4)
    idx[7, 2], idx[9, 0] = 99, -5
    x = torch.ones((100, 128), device="cuda", dtype=torch.bfloat16)
    routing = Routing(idx, torch.ones(idx.shape, device="cuda"), x, x)
    rows, layout, permutation = ops.permute(x, routing, num_experts=16)
    assert permutation.row_of_TK[7, 2] == -1
    assert permutation.row_of_TK[9, 0] == -1
    assert int(layout.counts_X.sum()) == 398
    y = ops.unpermute(rows, permutation, routing.weight_TK)
    assert torch.equal(y[:, 0].float(), torch.tensor([4.0] * 7 + [3.0, 4.0, 3.0] + [4.0] * 90, device="cuda"))


def test_moe_kernels_are_deterministic() -> None:
    logits = torch.randn((4096, 256), device="cuda")
    bias = torch.zeros(256, device="cuda")
    x = torch.randn((4096, 2048), device="cuda").bfloat16()

    def run() -> list[Tensor]:
        routing = ops.route(logits, bias, top_k=8, num_groups=8, groups_kept=4)
        rows, layout, permutation = ops.permute(x, routing, num_experts=256)
        y = ops.unpermute(rows, permutation, routing.weight_TK)
        return [routing.idx_TK, routing.weight_TK, routing.counts_E, layout.offsets, permutation.row_of_TK, y]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_moe_kernels_of_gradients_and_fp8_rows_are_deterministic() -> None:
    tokens, experts, columns = 3000, 256, 2048
    idx = random_choices(tokens, experts, 8, skew=0.5)
    scores, dscores = torch.rand((2, tokens, experts), device="cuda").unbind()
    weight, dweight = torch.rand((2, tokens, 8), device="cuda").unbind()
    q = ops.quantize_1x128(torch.randn((tokens, columns), device="cuda"))
    dy = torch.randn((tokens, columns), device="cuda").bfloat16()
    layout, permutation = ops.place(idx, num_experts=experts)
    row_of, num_rows, end = permutation.row_of_TK, permutation.num_rows, int(layout.offsets[-1])
    rows = torch.randn((num_rows, columns), device="cuda").bfloat16()
    namespace = torch.ops.dsv3rt

    def run() -> list[Tensor]:
        moved, _, _ = ops.permute(q, routing_of(idx, experts), num_experts=experts)
        choices = dweight, dscores, scores, idx
        wide, narrow = (namespace.route_backward(*choices, is_wide, 2.5, True) for is_wide in (True, False))
        drows, dgates = namespace.unpermute_backward(
            dy, rows, weight, row_of, layout.counts_X, layout.offsets, num_rows
        )
        return [moved.data.view(torch.uint8)[:end], moved.scale[:end], wide, narrow, drows[:end], dgates]

    first = run()
    assert all(result.count_nonzero() > result.numel() // 4 for result in first)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_moe_kernels_do_not_wait_for_the_device() -> None:
    logits = torch.randn((512, 256), device="cuda", requires_grad=True)
    bias = torch.zeros(256, device="cuda")
    x = torch.randn((512, 1024), device="cuda").bfloat16().requires_grad_()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = ops.route(logits, bias, top_k=8, num_groups=8, groups_kept=4)
        rows, _, permutation = ops.permute(x, routing, num_experts=256)
        ops.unpermute(rows, permutation, routing.weight_TK).backward(x.detach())
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert x.grad is not None
    assert logits.grad is not None
