"""Latent attention, against a loop over queries and heads in FP64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda.attention import decode_block_rows

H, N, R, U = 3, 6, 4, 5
SCALE = 0.4
# FP32 softmax and sums of under 200 terms of order 1.
FP32_CLOSE = {"rtol": 1e-5, "atol": 1e-5}

Ends = list[int]


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def inputs(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = [(num_queries, H, N + R), (num_keys, H, N), (num_keys, R), (num_keys, H, U)]
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def oracle(tensors: tuple[Tensor, ...], q_ends: Ends, k_ends: Ends, causal: bool) -> tuple[Tensor, Tensor]:
    """One query and head at a time; differentiable, so that it is an oracle of gradients as well."""
    q, k_nope, k_rope, v = (x.double() for x in tensors)
    outs, lses = [], []
    for b in range(len(q_ends) - 1):
        num_queries, num_keys = q_ends[b + 1] - q_ends[b], k_ends[b + 1] - k_ends[b]
        for i in range(num_queries):
            seen = max(0, i + 1 + num_keys - num_queries) if causal else num_keys
            keys = slice(k_ends[b], k_ends[b] + seen)
            for h in range(H):
                query = q[q_ends[b] + i, h]
                scores = SCALE * (k_nope[keys, h] @ query[:N] + k_rope[keys] @ query[N:])
                lses.append(torch.logsumexp(scores, 0) if seen else torch.tensor(-math.inf, dtype=torch.float64))
                outs.append(torch.softmax(scores, 0) @ v[keys, h])
    if not outs:
        return q.new_zeros(0, H, U), q.new_zeros(0, H)
    return torch.stack(outs).view(-1, H, U), torch.stack(lses).view(-1, H)


CASES = [
    ([7], [7]),
    ([5, 5, 5], [5, 5, 5]),  # equal lengths: one batch
    ([130, 130], [130, 130]),  # several blocks of queries
    ([3, 1, 8], [3, 1, 8]),
    ([4, 0, 2, 0], [4, 0, 2, 0]),
    ([2, 3], [9, 70]),  # fewer queries than keys: ends align
    ([70, 1], [70, 3]),
    ([6, 2, 3], [2, 2, 0]),  # queries without a key
    ([0, 0], [0, 0]),
    ([0, 2], [3, 2]),
    ([], []),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), CASES, ids=str)
def test_mla_prefill_matches_fp64(q_lengths: list[int], k_lengths: list[int], causal: bool) -> None:
    cu, cu_k = ends(q_lengths), ends(k_lengths)
    tensors = inputs(sum(q_lengths), sum(k_lengths))
    same = q_lengths == k_lengths
    out, lse = ops.mla_prefill(*tensors, cu, scale=SCALE, causal=causal, cu_seqlens_k=None if same else cu_k)
    expected_out, expected_lse = oracle(tensors, cu.tolist(), cu_k.tolist(), causal)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.double(), expected_out, **FP32_CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **FP32_CLOSE)
    assert out[lse == -math.inf].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([3, 3], [3, 3]), ([2, 1], [1, 3]), ([2, 1], [2, 0])],
    ids=str,
)
def test_mla_prefill_passes_gradcheck(q_lengths: list[int], k_lengths: list[int], causal: bool) -> None:
    Tq, Tk = sum(q_lengths), sum(k_lengths)
    shapes = [(Tq, 2, 4), (Tk, 2, 2), (Tk, 2), (Tk, 2, 3)]  # small: gradcheck runs the op twice for every element
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    cu, cu_k = ends(q_lengths), ends(k_lengths)

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.mla_prefill(*tensors, cu, scale=SCALE, causal=causal, cu_seqlens_k=cu_k)
        return out, lse[lse.isfinite()]  # finite differences of -inf are NaN

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize("lengths", [[100, 100], [65, 70, 1]], ids=str)
def test_mla_prefill_gradients_match_fp64_across_query_blocks(lengths: list[int]) -> None:
    cu = ends(lengths)
    tensors = inputs(sum(lengths), sum(lengths))
    mine = [x.clone().requires_grad_() for x in tensors]
    theirs = [x.double().requires_grad_() for x in tensors]
    out, lse = ops.mla_prefill(*mine, cu, scale=SCALE)
    expected = oracle(tuple(theirs), cu.tolist(), cu.tolist(), causal=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    torch.autograd.backward((out, lse), (dout, dlse))
    torch.autograd.backward(expected, (dout.double(), dlse.double()))
    for got, want in zip(mine, theirs, strict=True):
        assert got.grad is not None
        # Key gradients sum over up to 100 queries and 3 heads.
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


def test_mla_prefill_batch_equals_its_sequences_alone() -> None:
    tensors = inputs(12, 12)
    out, lse = ops.mla_prefill(*tensors, ends([4, 4, 4]), scale=SCALE)
    for b in range(3):
        rows = slice(4 * b, 4 * b + 4)
        alone, lse_alone = ops.mla_prefill(*(x[rows] for x in tensors), ends([4]), scale=SCALE)
        torch.testing.assert_close(out[rows], alone, **FP32_CLOSE)
        torch.testing.assert_close(lse[rows], lse_alone, **FP32_CLOSE)


def test_mla_prefill_matches_scaled_dot_product_attention() -> None:
    q, k_nope, k_rope, v = inputs(20, 20)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, H, -1)), dim=2)
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=SCALE)
    out, _ = ops.mla_prefill(q, k_nope, k_rope, v, ends([20]), scale=SCALE)
    torch.testing.assert_close(out, expected.transpose(0, 1), **FP32_CLOSE)


def test_mla_prefill_rounds_bf16_once() -> None:
    tensors = inputs(9, 9, torch.bfloat16)
    out, lse = ops.mla_prefill(*tensors, ends([4, 5]), scale=SCALE)
    expected_out, expected_lse = oracle(tensors, [0, 4, 9], [0, 4, 9], causal=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    # FP32 inside: half a BF16 ulp from the exact value, plus FP32 error that may tip a tie.
    torch.testing.assert_close(out.double(), expected_out, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, **FP32_CLOSE)


@pytest.mark.parametrize("size", [1e-6, 300.0])
def test_mla_prefill_survives_extreme_scores(size: float) -> None:
    q, k_nope, k_rope, v = inputs(12, 12)
    tensors = (q * size, k_nope * size, k_rope * size, v)  # scores up to about 1e6: exp would overflow
    out, lse = ops.mla_prefill(*tensors, ends([12]), scale=SCALE)
    expected_out, expected_lse = oracle(tensors, [0, 12], [0, 12], causal=True)
    # FP32 scores near 1e5 are 0.01 apart, which a softmax turns into 1 %.
    tolerance = {"rtol": 1e-4, "atol": 3e-2} if size > 1 else FP32_CLOSE
    torch.testing.assert_close(out.double(), expected_out, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, **tolerance)


def test_mla_prefill_ignores_the_future() -> None:
    tensors = inputs(10, 10)
    out, _ = ops.mla_prefill(*tensors, ends([10]), scale=SCALE)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[6:] = torch.randn_like(x[6:])
    other, _ = ops.mla_prefill(*changed, ends([10]), scale=SCALE)
    assert torch.equal(out[:6], other[:6])
    assert not torch.equal(out[6:], other[6:])


def test_mla_prefill_is_deterministic() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        tensors = [x.requires_grad_() for x in inputs(160, 160)]
        out, lse = ops.mla_prefill(*tensors, ends([80, 80]), scale=SCALE)
        (out.square().sum() + lse.sum()).backward()
        return [out, lse, *(x.grad for x in tensors if x.grad is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mla_prefill_is_registered(dtype: torch.dtype) -> None:
    tensors = [x.requires_grad_() for x in inputs(6, 8, dtype)]
    cu = [ends([2, 4]), ends([3, 5])]
    arguments = (tensors, cu, SCALE, True)
    torch.library.opcheck(
        torch.ops.dsv3rt.mla_prefill.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )
    out, lse = torch.ops.dsv3rt.mla_prefill.default(*arguments)
    arguments = (tensors, [out, lse], [torch.randn_like(out), torch.randn_like(lse)], cu, SCALE, True)
    torch.library.opcheck(
        torch.ops.dsv3rt.mla_prefill_backward.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )  # fmt: skip


C = 8  # latent width of the decoding tests


def paged(rows: list[Tensor], max_pages: int) -> tuple[Tensor, Tensor]:
    """A cache of shuffled pages, NaN wherever no token was written, and its block table, -1 where unused."""
    B, width = len(rows), rows[0].shape[1]
    cache = torch.full((B * max_pages, 64, width), math.nan, dtype=rows[0].dtype)
    table = torch.full((B, max_pages), -1, dtype=torch.int32)
    free = torch.randperm(B * max_pages).tolist()
    for b, tokens in enumerate(rows):
        for i, page in enumerate(tokens.split(64)):
            table[b, i] = free.pop()
            cache[table[b, i], : page.shape[0]] = page
    return cache, table


def decode_oracle(q: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Decoding is attention whose keys and values are the cache rows, for every head alike."""
    outs, lses = [], []
    for b, tokens in enumerate(rows):
        L = q.shape[1]
        for i in range(L):
            seen = tokens[: max(0, tokens.shape[0] - L + i + 1)].double()
            scores = SCALE * q[b, i].double() @ seen.t()
            lses.append(torch.logsumexp(scores, 1) if len(seen) else scores.new_full((q.shape[2],), -math.inf))
            outs.append(torch.softmax(scores, 1) @ seen[:, :C])
    return torch.stack(outs).view(*q.shape[:3], C), torch.stack(lses).view(q.shape[:3])


@pytest.mark.parametrize("L", [1, 2, 4])
def test_mla_decode_matches_fp64_and_never_reads_past_lengths(L: int) -> None:
    lengths = [1, 63, 64, 65, 130, 0, 3]
    rows = [torch.randn(length, C + R) for length in lengths]
    cache, table = paged(rows, max_pages=3)
    q = torch.randn(len(lengths), L, H, C + R)
    out, lse = ops.mla_decode(
        q, cache, table, torch.tensor(lengths, dtype=torch.int32), scale=SCALE, latent_dim=C
    )  # fmt: skip
    expected_out, expected_lse = decode_oracle(q, rows)
    torch.testing.assert_close(out.double(), expected_out, **FP32_CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **FP32_CLOSE)
    assert out[5].eq(0).all()
    assert lse[5].eq(-math.inf).all()


def test_mla_decode_keeps_the_dtype_of_the_query() -> None:
    rows = [torch.randn(70, C + R).bfloat16()]
    cache, table = paged(rows, max_pages=2)
    q = torch.randn(1, 1, H, C + R).bfloat16()
    out, lse = ops.mla_decode(q, cache, table, torch.tensor([70], dtype=torch.int32), scale=SCALE, latent_dim=C)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), decode_oracle(q, rows)[0], rtol=2**-8, atol=1e-5)  # one BF16 rounding


@pytest.mark.parametrize("L", [1, 3])
def test_mla_decode_absorbed_equals_training_form(L: int) -> None:
    """k_nope = latent w_k^T and v = latent w_v^T in training; decoding folds w_k into q and w_v behind the output."""
    lengths = [67, 5]
    latents = [torch.randn(length, C, dtype=torch.float64) for length in lengths]
    k_ropes = [torch.randn(length, R, dtype=torch.float64) for length in lengths]
    w_k, w_v = torch.randn(H, N, C, dtype=torch.float64), torch.randn(H, U, C, dtype=torch.float64)
    q = torch.randn(2 * L, H, N + R, dtype=torch.float64)

    latent = torch.cat(latents)
    k_nope, v = torch.einsum("tc,hnc->thn", latent, w_k), torch.einsum("tc,huc->thu", latent, w_v)
    expected, expected_lse = ops.mla_prefill(
        q, k_nope, torch.cat(k_ropes), v, ends([L, L]), scale=SCALE, cu_seqlens_k=ends(lengths)
    )  # fmt: skip

    absorbed = torch.cat((torch.einsum("thn,hnc->thc", q[..., :N], w_k), q[..., N:]), dim=2).view(2, L, H, C + R)
    cache, table = paged([torch.cat(pair, dim=1) for pair in zip(latents, k_ropes, strict=True)], max_pages=2)
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    out, lse = ops.mla_decode(absorbed, cache, table, lengths_B, scale=SCALE, latent_dim=C)
    torch.testing.assert_close(torch.einsum("blhc,huc->blhu", out, w_v).flatten(0, 1), expected)  # FP64 default
    torch.testing.assert_close(lse.flatten(0, 1), expected_lse)


def test_mla_prefill_rejects_bad_arguments() -> None:
    q, k_nope, k_rope, v = inputs(6, 6)
    with pytest.raises(ValueError, match=r"^mla_prefill: q_THC must have shape \(\*, 3, 10\), got \(6, 3, 6\)$"):
        ops.mla_prefill(k_nope, k_nope, k_rope, v, ends([6]), scale=SCALE)
    with pytest.raises(ValueError, match=r"^mla_prefill: k_rope_TR must have shape \(6, \*\), got \(5, 4\)$"):
        ops.mla_prefill(q, k_nope, k_rope[1:], v, ends([6]), scale=SCALE)
    with pytest.raises(TypeError, match=r"^mla_prefill: v_THU must be float32, got bfloat16$"):
        ops.mla_prefill(q, k_nope, k_rope, v.bfloat16(), ends([6]), scale=SCALE)
    with pytest.raises(TypeError, match=r"^mla_prefill: cu_seqlens must be int32, got int64$"):
        ops.mla_prefill(q, k_nope, k_rope, v, ends([6]).long(), scale=SCALE)
    with pytest.raises(ValueError, match=r"^mla_prefill: cu_seqlens must rise from 0 to 6, got \[0, 5\]$"):
        ops.mla_prefill(q, k_nope, k_rope, v, ends([5]), scale=SCALE)
    with pytest.raises(ValueError, match=r"^mla_prefill: cu_seqlens must rise from 0 to 6, got \[0, 8, 6\]$"):
        ops.mla_prefill(q, k_nope, k_rope, v, ends([8, -2]), scale=SCALE)
    with pytest.raises(ValueError, match=r"^mla_prefill: cu_seqlens_k must have shape \(2,\), got \(3,\)$"):
        ops.mla_prefill(q, k_nope, k_rope, v, ends([6]), scale=SCALE, cu_seqlens_k=ends([3, 3]))


def test_mla_decode_rejects_bad_arguments() -> None:
    cache, table = paged([torch.randn(3, C + R)], max_pages=1)
    q, length = torch.randn(1, 1, H, C + R), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^mla_decode: latent_dim must be in 1..12, got 512$"):
        ops.mla_decode(q, cache, table, length, scale=SCALE, latent_dim=512)
    with pytest.raises(ValueError, match=r"^mla_decode: cache must have shape \(\*, 64, 12\), got \(1, 32, 12\)$"):
        ops.mla_decode(q, cache[:, :32], table, length, scale=SCALE, latent_dim=C)
    with pytest.raises(TypeError, match=r"^mla_decode: cache must be float32 or uint8, got bfloat16$"):
        ops.mla_decode(q, cache.bfloat16(), table, length, scale=SCALE, latent_dim=C)
    with pytest.raises(ValueError, match=r"^mla_decode: lengths must be at most the 64 tokens of block_table, got 65$"):
        ops.mla_decode(q, cache, table, length + 62, scale=SCALE, latent_dim=C)
    with pytest.raises(ValueError, match=r"^mla_decode: lengths must not be negative, got -1$"):
        ops.mla_decode(q, cache, table, length - 4, scale=SCALE, latent_dim=C)


def test_rows_of_a_decoding_block() -> None:
    """Many rows over an FP8 cache share what one block makes of a page; few leave the cache's bytes the limit."""
    assert [decode_block_rows(torch.uint8, rows) for rows in (1, 16, 32, 33, 128)] == [16, 16, 16, 64, 64]
    assert {decode_block_rows(torch.bfloat16, rows) for rows in (1, 32, 128)} == {64}
