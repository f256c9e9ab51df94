"""Requests over a paged cache, and attention over them in FP64, that the tests of the decoding kernels share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv3rt import ops

PAGE, C, R = 64, 512, 64
WIDTH = C + R
SCALE = 192**-0.5

# A number rounded to BF16, of eight significant bits, moves by at most 2^-8 of itself. With weights w, true result
# o = sum(w v) and magnitude m = sum(w |v|), the kernel sums p v and p over tokens, where p is the exponential of a
# score's distance to the largest so far, or to one below it (p up to 2^8; all bounds are relative, none changes):
#   - p meets v rounded to BF16, and is summed as it was: sum(w |v| 2^-8) = 2^-8 m;
#   - FP32: the tensor cores cut each sum of 16 products, up to 512 of them for the 8192 tokens that one block takes at
#     most here, at 2^-22 of m at worst: 2^-13 m; a thread's sum of p is at most 90 roundings of 2^-24; ex2.approx is
#     off by 2^-22, twice; joining up to 264 partial results adds as many roundings of 2^-24: together below 2^-12 m;
#   - what comes out, at most |o| + (2^-8 + 2^-12) m, is rounded to BF16: 2^-8 of that.
# p below 2^-126 is zero, which takes at most 2^-126 |v| a token. Rescaling earlier pages multiplies both sums by the
# same number. The error of the scores themselves is `doubt` below.
BF16_UNIT = 2.0**-8
WEIGHT_RELATIVE = BF16_UNIT + 2.0**-12
# FP32 scores: 576 products, each rounded at 2^-24 of the sum of magnitudes, which is |q| |k| scale at most.
SCORE_RELATIVE = WIDTH * 2.0**-24
LSE_ABSOLUTE = 1e-5  # sums of up to 8192 positive FP32 numbers, partly in order


@dataclass(frozen=True)
class Requests:
    q: Tensor  # (B, L, H, 576) BF16
    cache: Tensor  # (pages, 64, 576) BF16 or (pages, 64, 656) uint8
    block_table: Tensor  # (B, max_pages) int32
    lengths: Tensor  # (B,) int32


def draw(lengths: list[int], num_queries: int, num_heads: int, *, size: float = 1.0, spare: int = 3) -> Requests:
    """Pages in any order, `spare` of nobody; slots past the end of a request hold NaN, and so do spare pages.

    Entries of the table past a request's pages name pages that do not exist.
    """
    counts = [-(-length // PAGE) for length in lengths]
    total = sum(counts) + spare
    cache = torch.full((total, PAGE, WIDTH), math.nan, device="cuda", dtype=torch.bfloat16)
    table = torch.full((len(lengths), max(counts, default=0) + 1), 2**30, dtype=torch.int32)
    order = torch.randperm(total)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = order[first : first + count]
        table[row, :count] = pages.int()
        filled = torch.full((count * PAGE, WIDTH), math.nan, device="cuda")
        filled[:length] = torch.randn((length, WIDTH), device="cuda")
        cache[pages.cuda()] = filled.view(count, PAGE, WIDTH).bfloat16()
        first += count
    q = (torch.randn((len(lengths), num_queries, num_heads, WIDTH), device="cuda") * size).bfloat16()
    return Requests(q, cache, table.cuda(), torch.tensor(lengths, dtype=torch.int32, device="cuda"))


def in_fp8(requests: Requests) -> Requests:
    """The same requests over an FP8 cache; slots of nobody hold bytes that are NaN, scales that are NaN as well."""
    packed = ops.quantize_latents(requests.cache, latent_dim=C)
    packed[requests.cache[:, :, 0].isnan()] = 0xFF
    return replace(requests, cache=packed)


def tokens_of(requests: Requests, row: int, length: int) -> Tensor:
    pages = requests.block_table[row, : -(-length // PAGE)].long()
    rows = requests.cache[pages].flatten(0, 1)[:length]
    return ops.dequantize_latents(rows, latent_dim=C) if rows.dtype == torch.uint8 else rows


def assert_close(requests: Requests, out: Tensor, lse: Tensor, scale: float = SCALE) -> None:
    """Against FP64 of the same BF16 numbers, request by request."""
    L = requests.q.shape[1]
    for row, length in enumerate(requests.lengths.tolist()):
        keys = tokens_of(requests, row, length).double()
        q, values = requests.q[row].double(), keys[:, :C]
        seen = length - L + 1 + torch.arange(L, device="cuda")
        hidden = torch.arange(length, device="cuda") >= seen[:, None]
        scores = (torch.einsum("lhc,sc->lhs", q, keys) * scale).masked_fill(hidden[:, None], -math.inf)
        want_lse = scores.logsumexp(dim=2)
        weights = (scores - want_lse[:, :, None]).exp().nan_to_num(0.0)
        want, magnitude = weights @ values, weights @ values.abs()
        largest = keys.norm(dim=1).amax() if length else torch.zeros((), device="cuda", dtype=torch.float64)
        doubt = SCORE_RELATIVE * scale * q.norm(dim=2) * largest
        # An error in the scores' exponent multiplies weights by up to exp(doubt) either way.
        relative = WEIGHT_RELATIVE + (2 * doubt).expm1().unsqueeze(2)
        flushed = 2.0**-126 * values.abs().sum(dim=0)
        allowed = flushed + magnitude * relative + BF16_UNIT * (want.abs() + magnitude * relative)
        error = (out[row].double() - want).abs()
        assert (error <= allowed).all(), (row, length, (error - allowed).max())
        blind = want_lse == -math.inf
        assert torch.equal(lse[row] == -math.inf, blind), (row, length)
        lse_error = (lse[row].double() - want_lse).masked_fill(blind, 0.0).abs()
        bound = LSE_ABSOLUTE + 2.0**-23 * want_lse.nan_to_num(0, 0, 0).abs() + doubt
        assert (lse_error <= bound).all(), (row, length, lse_error.max())
