"""The latent-attention kernel against attention in FP64 of the same BF16 numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda.extension import load
from tests.gpu.mla_cases import BATCHES, SCALE, Lengths, N, R, U, draw, ends

pytestmark = pytest.mark.gpu

# Weights and the result are each rounded to BF16, 2^-9 of their size: together at most 2^-8 of the values' weighted
# magnitude, sum(w |v|). FP32 sums of up to 8192 terms and ex2.approx (2^-22) stay far below; 2^-12 is room for them.
OUT_RELATIVE = 2.0**-8 + 2.0**-12
# FP32 scores: 192 products, each rounded at 2^-24 of the sum of magnitudes, which is |q| |k| scale at most.
SCORE_RELATIVE = 192 * 2.0**-24
LSE_ABSOLUTE = 1e-5  # sums of up to 8192 positive FP32 numbers, partly in order


def assert_sequence(
    inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor, causal: bool, scale: float = SCALE, block: int = 512
) -> None:
    """One sequence, a block of queries and all heads at a time."""
    q, k_nope, k_rope, v = (x.double() for x in inputs)
    num_queries, num_keys = q.shape[0], k_rope.shape[0]
    heads_a_step = max(1, 2**27 // (block * max(num_keys, 1) * 8))
    for first in range(0, num_queries, block):
        rows = slice(first, min(first + block, num_queries))
        seen = torch.arange(rows.start, rows.stop, device="cuda") + 1 + num_keys - num_queries
        hidden = torch.arange(num_keys, device="cuda") >= (seen[:, None] if causal else num_keys)
        for h in range(0, q.shape[1], heads_a_step):
            some = slice(h, h + heads_a_step)
            scores = torch.einsum("qhn,khn->hqk", q[rows, some, :N], k_nope[:, some])
            scores += torch.einsum("qhr,kr->hqk", q[rows, some, N:], k_rope)
            scores = (scores * scale).masked_fill(hidden, -math.inf)
            want_lse = scores.logsumexp(dim=2).t()
            weights = (scores - want_lse.t()[:, :, None]).exp().nan_to_num(0.0)
            want = torch.einsum("hqk,khu->qhu", weights, v[:, some])
            magnitude = torch.einsum("hqk,khu->qhu", weights, v[:, some].abs())
            largest_k = (k_nope[:, some].norm(dim=2).square() + k_rope.norm(dim=1)[:, None].square()).sqrt()
            doubt = (
                SCORE_RELATIVE * scale * q[rows, some].norm(dim=2) * largest_k.amax(dim=0, keepdim=True)
                if num_keys
                else 0
            )
            error = (out[rows, some].double() - want).abs()
            # An error in the scores' exponent multiplies weights by up to exp(doubt) either way.
            allowed = magnitude * (OUT_RELATIVE + torch.as_tensor(2 * doubt, device="cuda").expm1().unsqueeze(-1))
            assert (error <= allowed).all(), (error - allowed).max()
            blind = want_lse == -math.inf
            assert torch.equal(lse[rows, some] == -math.inf, blind)
            lse_error = (lse[rows, some].double() - want_lse).masked_fill(blind, 0.0).abs()
            assert (lse_error <= LSE_ABSOLUTE + 2.0**-23 * want_lse.nan_to_num(0, 0, 0).abs() + doubt).all(), (
                lse_error.max()
            )


def run_poisoned(
    inputs: tuple[Tensor, ...], cu: Tensor, cu_k: Tensor, causal: bool, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    """Straight into outputs that hold NaN, with guard rows behind them, and a counter that starts anywhere."""
    q = inputs[0]
    guard = 5
    out = torch.full((q.shape[0] + guard, q.shape[1], U), torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = torch.full((q.shape[0] + guard, q.shape[1]), torch.nan, device="cuda")
    counter = torch.full((1,), 77, dtype=torch.int32, device="cuda")
    rows = slice(0, q.shape[0])
    load().mla_prefill(*inputs, out[rows], lse[rows], cu, cu_k, counter, scale=scale, causal=causal)
    assert out[q.shape[0] :].isnan().all()
    assert lse[q.shape[0] :].isnan().all()
    return out[rows], lse[rows]


def assert_batch(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool, size: float = 1.0) -> None:
    inputs = draw(sum(q_lengths), sum(k_lengths), heads, size)
    out, lse = run_poisoned(inputs, ends(q_lengths), ends(k_lengths), causal)
    query = key = 0
    for num_queries, num_keys in zip(q_lengths, k_lengths, strict=True):
        rows, keys = slice(query, query + num_queries), slice(key, key + num_keys)
        q, k_nope, k_rope, v = inputs
        assert_sequence((q[rows], k_nope[keys], k_rope[keys], v[keys]), out[rows], lse[rows], causal)
        query, key = rows.stop, keys.stop


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), BATCHES, ids=lambda lengths: "_".join(map(str, lengths))[:40])
def test_mla_prefill_kernel_matches_fp64(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool) -> None:
    assert_batch(q_lengths, k_lengths, heads, causal)


@pytest.mark.parametrize("seed", range(40))
def test_mla_prefill_kernel_matches_fp64_on_random_lengths(seed: int) -> None:
    torch.manual_seed(seed)
    heads = [1, 3, 16][seed % 3]
    longest = [8192, 2048, 512][seed % 3]
    lengths = (2 ** (torch.rand(1 + seed % 4) * math.log2(longest))).int().tolist()
    extra = torch.randint(0, 300, (len(lengths),)).tolist() if seed % 2 else [0] * len(lengths)
    assert_batch(lengths, [n + m for n, m in zip(lengths, extra, strict=True)], heads, causal=seed % 5 != 0)


def test_mla_prefill_kernel_takes_128_heads() -> None:
    assert_batch([1000, 537], [1000, 537], 128, causal=True)


@pytest.mark.parametrize("size", [1e-3, 8.0, 60.0])
def test_mla_prefill_kernel_survives_extreme_scores(size: float) -> None:
    """Scores up to 60 * 60 * 192 * scale * a few: exp would overflow without the running maximum."""
    assert_batch([300, 129], [300, 129], 3, causal=True, size=size)


def test_mla_prefill_kernel_passes_on_what_is_not_finite() -> None:
    inputs = draw(300, 300, 2)
    inputs[0][17, 1, 5] = torch.nan
    out, lse = run_poisoned(inputs, ends([300]), ends([300]), causal=True)
    assert out[17, 1].isnan().all()
    assert lse[17, 1].isnan()
    assert torch.isnan(out).sum() == U


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[100, 77, 130, 128], [200, 1], [128, 128], [1, 1, 1]], ids=str)
def test_mla_prefill_kernel_keeps_neighbours_out(lengths: Lengths, causal: bool) -> None:
    """NaN in the second sequence reaches no other, though tiles of keys and values reach into it."""
    inputs = draw(sum(lengths), sum(lengths), 3)
    cu = ends(lengths)
    clean, clean_lse = run_poisoned(inputs, cu, cu, causal)
    foreign = slice(lengths[0], lengths[0] + lengths[1])
    for x in inputs:
        x[foreign] = torch.nan
    out, lse = run_poisoned(inputs, cu, cu, causal)
    assert out[foreign].isnan().all()
    for rows in (slice(0, foreign.start), slice(foreign.stop, None)):
        assert torch.equal(out[rows], clean[rows])
        assert torch.equal(lse[rows], clean_lse[rows])


def test_mla_prefill_kernel_is_deterministic() -> None:
    inputs = draw(3000, 3000, 16)
    cu = ends([1999, 1001])
    out, lse = ops.mla_prefill(*inputs, cu, scale=SCALE)
    for _ in range(20):
        again, lse_again = ops.mla_prefill(*inputs, cu, scale=SCALE)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


def test_mla_prefill_kernel_reads_any_strides() -> None:
    q, k_nope, k_rope, v = draw(300, 300, 4)
    cu = ends([300])
    out, lse = ops.mla_prefill(q, k_nope, k_rope, v, cu, scale=SCALE)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k_nope, v)]
    wide_rope = torch.cat((torch.full_like(k_rope, torch.nan), k_rope), dim=1)[:, R:]
    again, lse_again = ops.mla_prefill(heads_first[0], heads_first[1], wide_rope, heads_first[2], cu, scale=SCALE)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


def test_mla_prefill_kernel_handles_empty() -> None:
    q, k_nope, k_rope, v = draw(0, 0, 3)
    out, lse = ops.mla_prefill(q, k_nope, k_rope, v, ends([0, 0]), scale=SCALE)
    assert out.shape == (0, 3, U)
    assert lse.shape == (0, 3)
    q = draw(5, 0, 3)[0]
    out, lse = ops.mla_prefill(q, k_nope, k_rope, v, ends([5]), scale=SCALE, cu_seqlens_k=ends([0]))
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()


def test_mla_prefill_kernel_replays_in_a_graph() -> None:
    inputs = draw(700, 700, 3)
    cu = ends([300, 400])
    ops.mla_prefill(*inputs, cu, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.mla_prefill(*inputs, cu, scale=SCALE)
    inputs[0].copy_(draw(700, 700, 3)[0])
    for _ in range(2):
        graph.replay()
    want, want_lse = ops.mla_prefill(*inputs, cu, scale=SCALE)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize(
    ("scale", "dim", "message"),
    [
        (0.0, 0, "mla_prefill: scale must be positive on CUDA, got 0.0"),
        (1.0, 1, r"mla_prefill: q must have strides \(any, any, 1\), got \(576, 1, 3\)"),
    ],
)
def test_mla_prefill_kernel_rejects_what_it_cannot_read(scale: float, dim: int, message: str) -> None:
    q, k_nope, k_rope, v = draw(5, 5, 3)
    if dim:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=message):
        ops.mla_prefill(q, k_nope, k_rope, v, ends([5]), scale=scale)
