"""Inputs, batches and gradients in FP64, with what they may be off by, that tests of latent attention share."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

N, R, U = 128, 64, 128
SCALE = (N + R) ** -0.5
LONGEST = 8192
BLOCK = 64  # rows whose errors are looked at together

Lengths = list[int]


def ends(lengths: Lengths) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)


def draw(
    num_queries: int, num_keys: int, heads: int, size: float = 1.0, v_size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_nope and v are views of one projection, as in the layer. `size` is that of queries and keys."""
    q = torch.randn((num_queries, heads, N + R), device="cuda") * size
    kv = torch.randn((num_keys, heads, N + U), device="cuda") * torch.tensor([size] * N + [v_size] * U, device="cuda")
    k_rope = torch.randn((num_keys, R), device="cuda") * size
    k_nope, v = kv.bfloat16().split([N, U], dim=2)
    return q.bfloat16(), k_nope, k_rope.bfloat16(), v


BATCHES = [
    ([1], [1]),
    ([128], [128]),
    ([777], [777]),
    ([1, 127, 128, 129, 300, 5, 1000, 64, 63, 65], [1, 127, 128, 129, 300, 5, 1000, 64, 63, 65]),
    ([0, 3, 0, 0, 200, 0], [0, 3, 0, 0, 200, 0]),
    ([100, 1, 130], [1000, 513, 131]),  # more keys than queries: ends align
    ([1000, 300, 7], [100, 299, 0]),  # queries without a key
    ([33] * 70, [33] * 70),  # more than two windows of sequences in the scheduler
]

# For 128 heads.
WIDE_BATCHES = [
    ([1000, 537], [1000, 537]),
    ([300], [300]),
    ([129, 0, 257, 1, 64], [129, 0, 257, 1, 64]),
    ([200, 131, 7], [331, 300, 200]),
    ([250, 65], [190, 64]),  # queries without a key
]


@dataclass(frozen=True)
class Batch:
    q_lengths: Lengths
    k_lengths: Lengths
    heads: int
    causal: bool


def random_batch(seed: int, work: int = 2**30) -> Batch:
    """1 to 128 heads and 1 to 6 sequences of up to 8192 queries, with as many keys, up to 300 more, or fewer.

    H * sum(Tq * Tk) stays within `work`: 16 heads leave room for 8192 tokens, 128 heads for 2896. One sequence, in any
    place, has at least half of the tokens that are left room for.
    """
    rng = random.Random(seed)
    heads = rng.choice([rng.randint(1, 128), int(129 ** rng.random())])
    left, pairs = work // heads, []
    for _ in range(rng.randint(1, 6)):
        longest = min(LONGEST, math.isqrt(left))
        share = min(1.0, rng.uniform(0.5, 1.2))
        queries = rng.choice([0, *[int(longest ** rng.random())] * 9]) if pairs else int(longest * share)
        more = rng.randint(0, max(0, min(300, left // max(queries, 1) - queries)))
        keys = rng.choice([queries, queries, queries + more, rng.randint(0, queries) if pairs else queries])
        left -= queries * keys
        pairs.append((queries, keys))
    rng.shuffle(pairs)
    return Batch([q for q, _ in pairs], [k for _, k in pairs], heads, causal=seed % 5 != 0)


# How far gradients may be off. A number rounded to BF16 is off by a relative error of random sign, whose mean square is
# 2^-16 / 3 at most. With weights P, g = dout v - delta and dS = P g:
#   - P, g and their product are rounded, by kernels of one form or another: 3 roundings in each dS, of its own;
#   - delta errs with out, which is rounded, as the weights in it were; all dS of the row share that;
#   - in FP32 g is off by 2^-20 |dout| |v| at most (128 products, cut at 2^-22 every 16 of them, and delta as many);
#   - P is off by `doubt` of itself: 1e-5 for sums and ex2.approx; 2^-22 |lse| for four roundings of scores and lse; and
#     12 cuts of a score at 2^-22 of its partial sums, which are within 4 |q| |k| / sqrt(192), four standard deviations
#     of a sum of random signs. What is below 2^-126 is zero, of P as of products;
#   - the result is rounded, and bears the largest doubt in full, since scores may all be cut to the same side.
# So each query is a source of errors, independent of the others, which leaves a share of known mean square in every
# block of rows of dq, dk and dv. A sum of squares of normal variables, of mean squares e, exceeds
# sum(e) + 2 sqrt(x sum(e^2)) + 2 x max(e) less often than once in e^x (Laurent and Massart 2000, lemma 1).
ROUNDED = 2.0**-16 / 3
FLUSHED = 2.0**-125
FP32_OF_G = 2.0**-20
DOUBT = (1e-5, 2.0**-22, 12 * 2.0**-22 * 4 / (N + R) ** 0.5)
RARELY = 20.0  # e^-20 is 2e-9, of some 10^6 blocks


@dataclass
class Gradients:
    """Of one sequence, in FP64, by name; and mean squares of the errors that each source leaves in 64 rows of one head,
    (sources, blocks, heads)."""

    wanted: dict[str, Tensor]
    shares: dict[str, Tensor]
    doubt: float


def gradients_of(inputs: tuple[Tensor, ...], weights: tuple[Tensor, Tensor], causal: bool, scale: float) -> Gradients:
    """Of sum(out * weights[0]) + sum(lse * weights[1]) over queries that see a key."""
    q, k_nope, k_rope, v, dout, dlse = (x.double() for x in (*inputs, *weights))
    (num_queries, heads, _), num_keys = q.shape, k_rope.shape[0]
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1)], dim=2)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    of_q = q.new_zeros(num_queries, heads)
    of_k, of_v = (q.new_zeros(num_queries, -(-num_keys // BLOCK), heads) for _ in range(2))
    doubt = 0.0
    for rows, some in _pieces(num_queries, num_keys, heads):
        piece = _Piece(*(x.transpose(0, 1) for x in (q[rows, some], k[:, some], v[:, some], dout[rows, some])))
        seen = torch.arange(rows.start, rows.stop, device=q.device) + 1 + num_keys - num_queries
        hidden = torch.arange(num_keys, device=q.device) >= (seen[:, None] if causal else num_keys)
        found, shares, largest = piece.differentiate(dlse[rows, some].t(), hidden, scale)
        for total, x in ((dq[rows, some], found[0]), (dk[:, some], found[1]), (dv[:, some], found[2])):
            total += x.transpose(0, 1)
        of_q[rows, some] = shares[0].t()
        of_k[rows, :, some], of_v[rows, :, some] = (x.permute(1, 2, 0) for x in shares[1:])
        doubt = max(doubt, largest)
    of_nope, of_rope = (x.square().sum(2)[:, None] * of_k for x in q.split([N, R], dim=2))
    shares_of_q = _blocks(of_q, 0).transpose(0, 1)
    shares_of_rope = of_rope.transpose(1, 2).flatten(0, 1)[..., None]  # to one k_rope from all heads
    return Gradients(
        {"dq": dq, "dk_nope": dk[..., :N], "dk_rope": dk[..., N:].sum(1), "dv": dv},
        {"dq": shares_of_q, "dk_nope": of_nope, "dk_rope": shares_of_rope, "dv": of_v},
        doubt,
    )


def _pieces(num_queries: int, num_keys: int, heads: int, block: int = 512) -> list[tuple[slice, slice]]:
    """Queries and heads to take at a time: a matrix of scores has 256 MB at most."""
    if num_keys == 0:
        return []
    step = max(1, 2**25 // (block * num_keys))
    rows = [slice(first, min(first + block, num_queries)) for first in range(0, num_queries, block)]
    return [(some, slice(h, min(h + step, heads))) for some in rows for h in range(0, heads, step)]


def _blocks(x: Tensor, dim: int) -> Tensor:
    """`dim` becomes two, the second one of 64; what is missing is zero."""
    missing = x.new_zeros(*x.shape[:dim], -x.shape[dim] % BLOCK, *x.shape[dim + 1 :])
    return torch.cat([x, missing], dim).unflatten(dim, (-(-x.shape[dim] // BLOCK), BLOCK))


@dataclass
class _Piece:
    """Some queries of some heads, and all keys; heads first."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def differentiate(self, dlse: Tensor, hidden: Tensor, scale: float) -> tuple[list[Tensor], list[Tensor], float]:
        """Gradients of q, k and v; shares of each query in dq, (h, q), and in blocks of dk and dv, (h, q, blocks), dk's
        without the factor |q|^2; the largest doubt."""
        scores = (self.q @ self.k.transpose(1, 2) * scale).masked_fill_(hidden, -math.inf)
        lse = scores.logsumexp(dim=2)
        blind = lse == -math.inf
        lse, dlse = lse.masked_fill(blind, 0.0), dlse.masked_fill(blind, 0.0)
        p = scores.sub_(lse[..., None]).exp_()
        out = p @ self.v
        dp = self.dout @ self.v.transpose(1, 2)
        centred = dp - (self.dout * out).sum(2)[..., None]  # out moves by (v - out) for a weight's own error
        g = centred + dlse[..., None]

        dout_size, q_size = self.dout.norm(dim=2), self.q.norm(dim=2)
        k_size, v_size = (x.norm(dim=2).amax(1, keepdim=True) for x in (self.k, self.v))
        doubt = DOUBT[0] + DOUBT[1] * lse.abs() + DOUBT[2] * scale * q_size * k_size
        doubt2, fp32 = doubt.square()[..., None], (FP32_OF_G * dout_size * v_size).square()
        p2, g2 = p.square(), g.square()
        of_p = p2 * (ROUNDED + doubt2) + FLUSHED**2
        own = of_p * g2 + p2 * (2 * ROUNDED * g2 + fp32[..., None]) + FLUSHED**2
        shared = ROUNDED * (self.dout * out).square().sum(2) + fp32
        shared += (p2 * (ROUNDED * dp.square() + doubt2 * centred.square())).sum(2)
        of_q = (own @ self.k.square().sum(2)[..., None])[..., 0] + shared * (p @ self.k).square().sum(2)
        of_k = _blocks(own.addcmul_(p2, shared[..., None]), 2).sum(3)
        of_v = _blocks(of_p, 2).sum(3) * dout_size.square()[..., None]

        ds = g.mul_(p).mul_(scale)
        found = [ds @ self.k, ds.transpose(1, 2) @ self.q, p.transpose(1, 2) @ self.dout]
        return found, [scale**2 * of_q, scale**2 * of_k, of_v], float(doubt.max())


def assert_gradients(got: dict[str, Tensor], true: Gradients) -> None:
    """Block by block and head by head."""
    for name, want in true.wanted.items():
        mine, share = got[name], true.shares[name]
        assert mine.dtype == torch.bfloat16
        assert mine.shape == want.shape
        assert mine.isfinite().all(), name
        if mine.numel() == 0:
            continue
        share = share if len(share) else share.new_zeros(1, *share.shape[1:])
        allowed = share.sum(0) + 2 * (RARELY * share.square().sum(0)).sqrt() + 2 * RARELY * share.amax(0)
        allowed += (ROUNDED + true.doubt**2) * _squares(want, share.shape[2])
        ratio = _squares(mine.double() - want, share.shape[2]) / allowed.clamp(min=1e-300)
        assert (ratio <= 1).all(), (name, float(ratio.max()), (ratio > 1).nonzero()[:5].tolist())


def _squares(x: Tensor, heads: int) -> Tensor:
    """(blocks, heads) sums."""
    return _blocks(x.square().reshape(len(x), heads, -1).sum(2), 0).sum(1)
