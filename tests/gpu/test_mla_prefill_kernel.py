"""The latent-attention kernel against attention in FP64 of the same BF16 numbers."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda.extension import load
from tests.gpu.mla_cases import BATCHES, SCALE, WIDE_BATCHES, Lengths, N, R, U, draw, ends, random_batch

pytestmark = pytest.mark.gpu

# A number rounded to BF16, of eight significant bits, moves by at most 2^-8 of itself. With weights w, true result
# o = sum(w v) and magnitude m = sum(w |v|), the kernel sums p v and p over keys, where p is the exponential of a
# score's distance to the largest:
#   - p meets v rounded to BF16, and is summed as it was: sum(w |v| 2^-8) = 2^-8 m;
#   - FP32: the tensor cores cut each sum of 16 products, up to 532 of them for 8500 keys, at 2^-22 of m at worst:
#     2^-13 m; a thread's sum of p is at most 90 roundings of 2^-24; ex2.approx is off by 2^-22, twice: together
#     below 2^-12 m;
#   - what comes out, at most |o| + (2^-8 + 2^-12) m, is rounded to BF16: 2^-8 of that.
# p below 2^-126 is zero, which takes at most 2^-126 |v| a key. Rescaling earlier blocks multiplies both sums by the
# same number. The error of the scores themselves is `doubt` below.
BF16_UNIT = 2.0**-8
WEIGHT_RELATIVE = BF16_UNIT + 2.0**-12
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
            relative = WEIGHT_RELATIVE + torch.as_tensor(2 * doubt, device="cuda").expm1().unsqueeze(-1)
            flushed = 2.0**-126 * v[:, some].abs().sum(dim=0)
            allowed = flushed + magnitude * relative + BF16_UNIT * (want.abs() + magnitude * relative)
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


def assert_batch(
    q_lengths: Lengths,
    k_lengths: Lengths,
    heads: int,
    causal: bool,
    *,
    size: float = 1.0,
    v_size: float = 1.0,
    scale: float = SCALE,
) -> None:
    inputs = draw(sum(q_lengths), sum(k_lengths), heads, size, v_size)
    out, lse = run_poisoned(inputs, ends(q_lengths), ends(k_lengths), causal, scale)
    query = key = 0
    for num_queries, num_keys in zip(q_lengths, k_lengths, strict=True):
        rows, keys = slice(query, query + num_queries), slice(key, key + num_keys)
        q, k_nope, k_rope, v = inputs
        assert_sequence((q[rows], k_nope[keys], k_rope[keys], v[keys]), out[rows], lse[rows], causal, scale)
        query, key = rows.stop, keys.stop


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), BATCHES, ids=lambda lengths: "_".join(map(str, lengths))[:40])
def test_mla_prefill_kernel_matches_fp64(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool) -> None:
    assert_batch(q_lengths, k_lengths, heads, causal)


@pytest.mark.parametrize("seed", range(48))
def test_mla_prefill_kernel_matches_fp64_on_random_batches(seed: int) -> None:
    torch.manual_seed(seed)
    batch = random_batch(seed)
    assert_batch(batch.q_lengths, batch.k_lengths, batch.heads, batch.causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), WIDE_BATCHES, ids=str)
def test_mla_prefill_kernel_takes_128_heads(q_lengths: Lengths, k_lengths: Lengths, causal: bool) -> None:
    assert_batch(q_lengths, k_lengths, 128, causal)


@pytest.mark.parametrize("block", range(3))
def test_mla_prefill_kernel_weighs_every_key(block: int) -> None:
    """Each of 128 keys has a column of its own, which then holds nothing but that key's weight. An error of 2 % in one
    of them would be seen."""
    q, k_nope, k_rope, v = draw(300, 300, 2)
    v = torch.zeros_like(v)
    keys = torch.arange(block * 128, min(block * 128 + 128, 300), device="cuda")
    v[keys, :, keys % 128] = 1
    out, lse = run_poisoned((q, k_nope, k_rope, v), ends([300]), ends([300]), causal=True)
    assert_sequence((q, k_nope, k_rope, v), out, lse, causal=True)
    out[:, :, 7] *= 1.02
    with pytest.raises(AssertionError):
        assert_sequence((q, k_nope, k_rope, v), out, lse, causal=True)


def test_mla_prefill_kernel_runs_in_a_thread_that_has_not_used_the_gpu() -> None:
    """As autograd's threads: the driver, which describes arrays to the copy engine, wants a context in each."""
    inputs = draw(200, 200, 2)
    cu = ends([200])
    want = run_poisoned(inputs, cu, cu, causal=True)
    torch.cuda.synchronize()
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    out, lse = torch.empty_like(want[0]), torch.empty_like(want[1])
    call = partial(load().mla_prefill, *inputs, out, lse, cu, cu, counter, scale=SCALE, causal=True)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(call).result()
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


@pytest.mark.parametrize("size", [1e-3, 8.0, 60.0])
def test_mla_prefill_kernel_survives_extreme_scores(size: float) -> None:
    """Scores up to 60 * 60 * 192 * scale * a few: exp would overflow without the running maximum."""
    assert_batch([300, 129], [300, 129], 3, causal=True, size=size)


@pytest.mark.parametrize("v_size", [3e-20, 1.0, 7e19])
@pytest.mark.parametrize(("size", "scale"), [(1.0, 1e-6), (1.0, 0.3), (1.0, 5.0), (3e-6, 1e9), (1e5, 1e-9)])
def test_mla_prefill_kernel_takes_any_scale(size: float, scale: float, v_size: float) -> None:
    """From weights that are all alike to one that is nearly 1. The bounds are relative to values and scores."""
    assert_batch([300, 129], [300, 200], 3, causal=True, size=size, v_size=v_size, scale=scale)


@pytest.mark.parametrize(("of_q", "of_scale", "of_v"), [(40, 0, 0), (-40, 0, 60), (20, 30, -60), (-15, -30, 10)])
def test_mla_prefill_kernel_passes_on_powers_of_two(of_q: int, of_scale: int, of_v: int) -> None:
    """Moved between queries, keys and scale they change nothing; those of values are those of out. Bitwise: no number
    comes near the ends of FP32's range."""
    q, k_nope, k_rope, v = draw(900, 900, 5)
    cu = ends([500, 400])
    out, lse = run_poisoned((q, k_nope, k_rope, v), cu, cu, causal=True)
    of_k = 2.0 ** -(of_q + of_scale)
    moved = (q * 2.0**of_q, k_nope * of_k, k_rope * of_k, v * 2.0**of_v)
    again, lse_again = run_poisoned(moved, cu, cu, causal=True, scale=SCALE * 2.0**of_scale)
    assert torch.equal(again, out * 2.0**of_v)
    assert torch.equal(lse_again, lse)


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
