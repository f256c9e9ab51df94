"""Routing, load balance and permutation, against loops over tokens and transformers' router."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import Permutation, Routing

FP32_CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # a few FP32 roundings

# top_k, num_groups, groups_kept
RULES = [(1, 1, 1), (3, 1, 1), (8, 1, 1), (2, 4, 1), (3, 4, 2), (4, 2, 1), (4, 4, 4)]


def route_oracle(
    logits: list[float], bias: list[float], top_k: int, groups: int, kept: int
) -> tuple[list[int], list[float]]:
    """One token, in Python: chosen experts in order, and their unbiased scores."""
    size = len(logits) // groups
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    group_scores = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-group_scores[g], g))[:kept]
    allowed = [e for e in range(len(logits)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: (-biased[e], e))[:top_k]
    return chosen, [scores[e] for e in chosen]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("top_k", "groups", "kept"), RULES)
def test_route_matches_a_loop(top_k: int, groups: int, kept: int, renormalize: bool) -> None:
    logits, bias = torch.randn(50, 8), torch.randn(8) * 0.3
    routing = ops.route(
        logits, bias, top_k=top_k, num_groups=groups, groups_kept=kept, scale=2.5, renormalize=renormalize
    )  # fmt: skip
    for t in range(50):
        chosen, scores = route_oracle(logits[t].tolist(), bias.tolist(), top_k, groups, kept)
        total = sum(scores) if renormalize else 1.0
        assert routing.idx_TK[t].tolist() == chosen
        torch.testing.assert_close(routing.weight_TK[t], torch.tensor([2.5 * s / total for s in scores]), **FP32_CLOSE)
    assert routing.counts_E.tolist() == [int((routing.idx_TK == e).sum()) for e in range(8)]
    torch.testing.assert_close(routing.scores_TE, torch.sigmoid(logits))
    assert (routing.idx_TK.dtype, routing.counts_E.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_matches_transformers(renormalize: bool) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    E, groups, kept, top_k = 16, 4, 2, 4
    config = SimpleNamespace(
        num_local_experts=E, n_group=groups, topk_group=kept, num_experts_per_tok=top_k,
        norm_topk_prob=renormalize, routed_scaling_factor=2.5, hidden_size=8,
    )  # fmt: skip
    theirs = modeling.DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_()
    with torch.no_grad():
        logits, weight, idx = theirs(torch.randn(40, 8))
    order = idx.argsort(dim=1)  # theirs is unsorted
    mine = ops.route(
        logits, theirs.e_score_correction_bias, top_k=top_k, num_groups=groups, groups_kept=kept, scale=2.5,
        renormalize=renormalize,
    )  # fmt: skip
    my_order = mine.idx_TK.argsort(dim=1)
    assert torch.equal(mine.idx_TK.gather(1, my_order), idx.gather(1, order))
    torch.testing.assert_close(mine.weight_TK.gather(1, my_order), weight.gather(1, order), **FP32_CLOSE)


def test_route_gives_ties_to_the_lowest_index() -> None:
    routing = ops.route(torch.zeros(300, 256), torch.zeros(256), top_k=8, num_groups=8, groups_kept=4)
    assert routing.idx_TK.eq(torch.arange(8)).all()
    logits = torch.zeros(1, 8)
    logits[0, [3, 6]] = 1.0
    assert ops.route(logits, torch.zeros(8), top_k=4).idx_TK.tolist() == [[3, 6, 0, 1]]


def test_route_never_leaves_the_kept_groups_even_where_biases_are_negative() -> None:
    bias = torch.full((8,), -5.0)  # a mask of 0 for dropped groups would win over these scores
    routing = ops.route(torch.randn(64, 8), bias, top_k=2, num_groups=4, groups_kept=1)
    assert (routing.idx_TK // 2).diff(dim=1).eq(0).all()


def test_route_bias_moves_the_choice_but_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    routing = ops.route(logits, bias, top_k=2, renormalize=False)
    assert routing.idx_TK.tolist() == [[3, 0]]
    torch.testing.assert_close(routing.weight_TK, torch.sigmoid(logits[:, [3, 0]]))


def test_route_survives_scores_that_all_underflow() -> None:
    routing = ops.route(torch.full((2, 4), -200.0), torch.zeros(4), top_k=2)
    assert routing.weight_TK.eq(0).all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_weights_and_scores_pass_gradcheck(renormalize: bool) -> None:
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64)

    def weigh(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = ops.route(
            logits, bias, top_k=3, num_groups=4, groups_kept=2, scale=2.5, renormalize=renormalize
        )  # fmt: skip
        return routing.weight_TK, routing.scores_TE

    assert torch.autograd.gradcheck(weigh, (logits,))


def test_route_handles_empty_and_bf16() -> None:
    empty = ops.route(torch.empty(0, 8), torch.zeros(8), top_k=2, num_groups=4, groups_kept=2)
    assert empty.idx_TK.shape == empty.weight_TK.shape == (0, 2)
    assert empty.counts_E.tolist() == [0] * 8
    logits = torch.randn(5, 8).bfloat16()
    bf16, fp32 = (ops.route(x, torch.zeros(8), top_k=2) for x in (logits, logits.float()))
    assert bf16.weight_TK.dtype == torch.float32
    assert torch.equal(bf16.weight_TK, fp32.weight_TK)


def balance_oracle(scores: Tensor, idx: Tensor, ends: list[int], alpha: float) -> Tensor:
    E, K = scores.shape[1], idx.shape[1]
    losses = []
    for start, end in pairwise(ends):
        T = end - start
        if T == 0:
            continue
        total = scores.new_zeros(())
        for i in range(E):
            f = E / (K * T) * sum(i in idx[t].tolist() for t in range(start, end))
            total = total + f * sum(scores[t, i] / scores[t].sum() for t in range(start, end)) / T
        losses.append(alpha * total)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lengths", [[12], [5, 7], [1, 0, 4, 7]], ids=str)
def test_balance_loss_matches_the_papers_sums(lengths: list[int]) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    scores = torch.rand(12, 6, dtype=torch.float64)
    idx = torch.stack([torch.randperm(6)[:2] for _ in range(12)])
    expected = balance_oracle(scores, idx, ends.tolist(), 0.3)
    torch.testing.assert_close(ops.balance_loss(scores, idx, ends.int(), alpha=0.3), expected)  # FP64 default
    fp32 = ops.balance_loss(scores.float(), idx, ends.int(), alpha=0.3)
    assert fp32.dtype == torch.float32
    torch.testing.assert_close(fp32.double(), expected, rtol=1e-6, atol=1e-7)


def test_balance_loss_is_alpha_at_balance_and_more_when_collapsed() -> None:
    ends = torch.tensor([0, 4], dtype=torch.int32)
    even = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    torch.testing.assert_close(ops.balance_loss(torch.ones(4, 4), even, ends, alpha=0.5), torch.tensor(0.5))
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(4, 4)
    collapsed = torch.zeros(4, 2, dtype=torch.int64) + torch.tensor([0, 1])
    torch.testing.assert_close(ops.balance_loss(scores, collapsed, ends, alpha=0.5), torch.tensor(1.0))


def test_balance_loss_passes_gradcheck() -> None:
    scores = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    idx = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    ends = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda s: ops.balance_loss(s, idx, ends, alpha=0.7), (scores,))


@pytest.mark.parametrize("ends", [[0], [0, 0]])
def test_balance_loss_handles_empty(ends: list[int]) -> None:
    empty = torch.zeros(0, 2, dtype=torch.int64)
    loss = ops.balance_loss(torch.empty(0, 4), empty, torch.tensor(ends, dtype=torch.int32), alpha=1.0)
    assert loss.item() == 0.0


def test_update_bias_steps_towards_the_mean_load() -> None:
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4])
    new = ops.update_bias(bias, torch.tensor([4, 9, 5, 2]), gamma=0.001)
    torch.testing.assert_close(new, torch.tensor([0.101, 0.199, 0.3, 0.401]), rtol=0, atol=1e-7)
    assert bias.tolist() == torch.tensor([0.1, 0.2, 0.3, 0.4]).tolist()
    # 2^40 and 2^40 + 1 are one number in FP32, but not one load.
    large = ops.update_bias(torch.zeros(2), torch.tensor([2**40, 2**40 + 1]), gamma=1.0)
    assert large.tolist() == [1.0, -1.0]


def routing_of(idx: Tensor, num_experts: int) -> Routing:
    counts = torch.bincount(idx.flatten(), minlength=num_experts)
    return Routing(idx, torch.rand(idx.shape), torch.rand(idx.shape[0], num_experts), counts)


def placement_oracle(idx: Tensor, E: int, block: int) -> tuple[list[list[int]], list[int]]:
    """row_of_TK and offsets by walking experts, tokens and choices in order."""
    row_of = [[-1] * idx.shape[1] for _ in range(idx.shape[0])]
    offsets, row = [0], 0
    for e in range(E):
        for t in range(idx.shape[0]):
            for k in range(idx.shape[1]):
                if idx[t, k] == e:
                    row_of[t][k] = row
                    row += 1
        row = -(-row // block) * block
        offsets.append(row)
    return row_of, offsets


def choices(kind: str, T: int, K: int, E: int) -> Tensor:
    if kind == "one expert":
        return torch.full((T, K), 2)
    return torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize(
    ("kind", "T", "K"), [("random", 9, 3), ("one expert", 9, 1), ("random", 1, 2), ("random", 0, 2)]
)
def test_permute_places_rows_like_a_loop(kind: str, T: int, K: int, block: int) -> None:
    E = 5
    idx = choices(kind, T, K, E)
    x = torch.randn(T, 6)
    rows, layout, permutation = ops.permute(x, routing_of(idx, E), num_experts=E, block=block)
    row_of, offsets = placement_oracle(idx, E, block)
    P = -(-T * K // block) * block + E * block
    assert rows.shape == (P, 6)
    assert permutation.num_rows == P
    assert permutation.row_of_TK.tolist() == row_of
    assert layout.offsets.tolist() == offsets
    assert layout.counts_X.tolist() == [int((idx == e).sum()) for e in range(E)]
    assert (layout.offsets.dtype, layout.counts_X.dtype) == (torch.int32, torch.int32)
    expected = torch.zeros(P, 6)
    for t in range(T):
        for k in range(K):
            expected[row_of[t][k]] = x[t]
    assert torch.equal(rows, expected)


def test_permute_moves_quantised_rows_unchanged() -> None:
    idx = choices("random", 7, 2, 4)
    x = torch.randn(7, 144)
    q = ops.quantize_1x128(x)
    rows, layout, permutation = ops.permute(q, routing_of(idx, 4), num_experts=4, block=4)
    wide, same_layout, _ = ops.permute(ops.dequantize(q), routing_of(idx, 4), num_experts=4, block=4)
    assert torch.equal(ops.dequantize(rows), wide)
    assert torch.equal(layout.offsets, same_layout.offsets)
    assert rows.scale.stride() == (1, permutation.num_rows)
    w = torch.randn(4, 32, 144)
    y = ops.m_grouped_fp8_gemm_nt(rows, ops.quantize_128x128(w), layout)  # the GEMM takes these rows as they are
    assert y.shape == (permutation.num_rows, 32)


@pytest.mark.parametrize("weighted", [True, False])
def test_unpermute_matches_a_loop(weighted: bool) -> None:
    idx = choices("random", 9, 3, 5)
    _, _, permutation = ops.permute(torch.randn(9, 6), routing_of(idx, 5), num_experts=5, block=4)
    rows = torch.randn(permutation.num_rows, 6)
    weight = torch.rand(9, 3) if weighted else None
    y = ops.unpermute(rows, permutation, weight)
    for t in range(9):
        terms = [rows[permutation.row_of_TK[t, k]].double() * (weight[t, k] if weighted else 1.0) for k in range(3)]
        torch.testing.assert_close(y[t].double(), torch.stack(terms).sum(0), **FP32_CLOSE)


def test_unpermute_sums_bf16_rows_in_fp32() -> None:
    permutation = Permutation(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    # 256 + 1 is a tie that BF16 sums twice down to 256; FP32 reaches 258, which BF16 holds.
    assert ops.unpermute(rows, permutation, None).item() == 258.0
    half = ops.unpermute(rows, permutation, torch.full((1, 3), 0.5))
    assert half.dtype == torch.bfloat16
    assert half.item() == 129.0


def test_unpermute_undoes_permute() -> None:
    idx = choices("random", 9, 4, 8)
    x = torch.randn(9, 6)
    rows, _, permutation = ops.permute(x, routing_of(idx, 8), num_experts=8, block=4)
    torch.testing.assert_close(ops.unpermute(rows, permutation, torch.full((9, 4), 0.25)), x)


@pytest.mark.parametrize("weighted", [True, False])
def test_permutation_passes_gradcheck(weighted: bool) -> None:
    idx = choices("random", 3, 2, 3)
    routing = routing_of(idx, 3)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, routing, num_experts=3, block=2)[0], (x,))
    _, _, permutation = ops.permute(x, routing, num_experts=3, block=2)
    rows = torch.randn(permutation.num_rows, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True) if weighted else None
    assert torch.autograd.gradcheck(lambda r, w: ops.unpermute(r, permutation, w), (rows, weight))


def test_permutation_gradients_keep_their_dtypes() -> None:
    idx = choices("random", 5, 2, 4)
    x = torch.randn(5, 6).bfloat16().requires_grad_()
    weight = torch.rand(5, 2, requires_grad=True)
    rows, _, permutation = ops.permute(x, routing_of(idx, 4), num_experts=4, block=4)
    ops.unpermute(rows * 2, permutation, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(
        weight.grad, (2 * x.detach().float().sum(1, keepdim=True)).expand(5, 2), rtol=1e-2, atol=1e-2
    )


def test_moe_layer_of_ops_equals_a_loop_over_experts() -> None:
    """route, permute, grouped product and unpermute together, gradients included."""
    T, D, E, K = 11, 4, 6, 2
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(E, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(E, D, D, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(E, dtype=torch.float64)

    def fused() -> Tensor:
        routing = ops.route(x @ gate.t(), bias, top_k=K)
        rows, layout, permutation = ops.permute(x, routing, num_experts=E, block=4)
        return ops.unpermute(ops.grouped_gemm_nt(rows, w, layout), permutation, routing.weight_TK)

    def looped() -> Tensor:
        scores = torch.sigmoid(x @ gate.t())
        best = scores.topk(K, dim=1)
        mask = torch.zeros_like(scores).scatter(1, best.indices, 1.0)
        weights = scores * mask / (scores * mask).sum(1, keepdim=True)
        return torch.einsum("te,tf,edf->td", weights, x, w)

    for got, want in zip(*(torch.autograd.grad(f().sin().sum(), (x, gate, w)) for f in (fused, looped)), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(fused(), looped())


def test_permute_is_deterministic() -> None:
    idx = choices("random", 50, 4, 8)
    x = torch.randn(50, 8)
    runs = [ops.permute(x, routing_of(idx, 8), num_experts=8) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])


def test_moe_family_rejects_bad_arguments() -> None:
    logits, bias = torch.randn(4, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"^route: bias_E must have shape \(8,\), got \(7,\)$"):
        ops.route(logits, bias[:7], top_k=2)
    with pytest.raises(TypeError, match=r"^route: bias_E must be float32 or float64, got bfloat16$"):
        ops.route(logits, bias.bfloat16(), top_k=2)
    with pytest.raises(ValueError, match=r"^route: num_groups must divide the 8 experts, got 3$"):
        ops.route(logits, bias, top_k=2, num_groups=3)
    with pytest.raises(ValueError, match=r"^route: groups_kept must be in 1..4, got 5$"):
        ops.route(logits, bias, top_k=2, num_groups=4, groups_kept=5)
    with pytest.raises(ValueError, match=r"^route: top_k must be in 1..2, got 3$"):
        ops.route(logits, bias, top_k=3, num_groups=4, groups_kept=1)
    routing = ops.route(logits, bias, top_k=2)
    with pytest.raises(ValueError, match=r"^permute: routing.idx_TK must have shape \(5, \*\), got \(4, 2\)$"):
        ops.permute(torch.randn(5, 3), routing, num_experts=8)
    with pytest.raises(ValueError, match=r"^permute: block must be positive, got 0$"):
        ops.permute(logits, routing, num_experts=8, block=0)
    with pytest.raises(ValueError, match=r"^permute: routing.idx_TK must be in 0..1, got 3..3$"):
        ops.permute(logits, routing_of(torch.full((4, 2), 3), 8), num_experts=2)
    rows, layout, permutation = ops.permute(logits, routing, num_experts=8, block=4)
    with pytest.raises(ValueError, match=r"^unpermute: rows_PD must have shape \(40, \*\), got \(39, 8\)$"):
        ops.unpermute(rows[1:], permutation, None)
    with pytest.raises(ValueError, match=r"^unpermute: weight_TK must have shape \(4, 2\), got \(4, 1\)$"):
        ops.unpermute(rows, permutation, routing.weight_TK[:, :1])
    with pytest.raises(TypeError, match=r"^balance_loss: idx_TK must be int64, got int32$"):
        ops.balance_loss(routing.scores_TE, routing.idx_TK.int(), layout.offsets, alpha=1.0)
    with pytest.raises(ValueError, match=r"^update_bias: counts_E must have shape \(8,\), got \(7,\)$"):
        ops.update_bias(bias, routing.counts_E[1:], gamma=0.1)
    with pytest.raises(ValueError, match=r"^update_bias: gamma must not be negative, got -0.1$"):
        ops.update_bias(bias, routing.counts_E, gamma=-0.1)


def test_place_is_where_permute_puts_rows():
    routing = Routing(torch.tensor([[1, 0], [1, 3], [3, 1]]), torch.ones(3, 2), torch.ones(3, 4), torch.zeros(4))
    _, layout, permutation = ops.permute(torch.randn(3, 8), routing, num_experts=4, block=4)
    placed, places = ops.place(routing.idx_TK, num_experts=4, block=4)
    assert torch.equal(places.row_of_TK, permutation.row_of_TK)
    assert places.num_rows == permutation.num_rows
    assert torch.equal(placed.counts_X, layout.counts_X)
    assert torch.equal(placed.offsets, layout.offsets)
    with pytest.raises(ValueError, match=r"^place: idx_TK must be in 0..2, got 0..3$"):
        ops.place(routing.idx_TK, num_experts=3)
