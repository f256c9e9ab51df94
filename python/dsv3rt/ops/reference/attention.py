"""Reference latent attention: softmax in at least FP32, queries in blocks, equally long sequences as one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3rt.ops.reference.common import at_least_fp32
from dsv3rt.ops.reference.latent_cache import dequantize_latents

PAGE = 64
QUERY_BLOCK = 64  # scores alive at once: B * H * QUERY_BLOCK * keys

# q (B, Sq, H, N + R), k_nope (B, Sk, H, N), k_rope (B, Sk, R), v (B, Sk, H, U); without B where a docstring says so
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor]  # out (B, Sq, H, U), lse (B, Sq, H), or the gradients of both; without B likewise
Ends = tuple[list[int], list[int]]  # cu_seqlens of queries and of keys, on the host


def mla_prefill(inputs: Inputs, ends: Ends, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Inputs have no B."""
    q, _, _, v = inputs
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = at_least_fp32(q[:, :, 0]).new_full(q.shape[:2], -torch.inf)
    for part in _parts(ends, causal):
        out_BLHU, lse_BLH = _forward(part.of(inputs), scale, causal)
        out[part.rows], lse[part.rows] = out_BLHU.flatten(0, 1), lse_BLH.flatten(0, 1)
    return out, lse


def mla_prefill_backward(
    inputs: Inputs, results: Results, gradients: Results, ends: Ends, scale: float, causal: bool
) -> list[Tensor]:
    """Gradients of q, k_nope, k_rope and v, in their dtypes, from out and lse and the gradients of both."""
    totals = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    for part in _parts(ends, causal):
        got = _backward(part.of(inputs), part.of_rows(results), part.of_rows(gradients), scale, causal)
        for total, gradient, where in zip(totals, got, (part.rows, *[part.keys] * 3), strict=True):
            total[where] = gradient.flatten(0, 1)
    return totals


class _Part(NamedTuple):
    """`batch` sequences of one length, every query of which sees a key."""

    batch: int
    rows: slice
    keys: slice

    def of(self, inputs: Inputs) -> Inputs:
        q, k_nope, k_rope, v = inputs
        slices = (q[self.rows], k_nope[self.keys], k_rope[self.keys], v[self.keys])
        q, k_nope, k_rope, v = (x.unflatten(0, (self.batch, -1)) for x in slices)
        return q, k_nope, k_rope, v

    def of_rows(self, pair: Results) -> Results:
        x, y = (x[self.rows].unflatten(0, (self.batch, -1)) for x in pair)
        return x, y


def _parts(ends: Ends, causal: bool) -> Iterator[_Part]:
    """All sequences together if they are equally long, else one by one without the queries that see no key."""
    q_ends, k_ends = ends
    B = len(q_ends) - 1
    length = q_ends[1] if B else 0
    if length > 0 and q_ends == k_ends == [length * b for b in range(B + 1)]:
        yield _Part(B, slice(0, length * B), slice(0, length * B))
        return
    for b in range(B):
        num_queries, num_keys = q_ends[b + 1] - q_ends[b], k_ends[b + 1] - k_ends[b]
        blind = num_queries if num_keys == 0 else max(0, num_queries - num_keys) if causal else 0
        if blind < num_queries:
            yield _Part(1, slice(q_ends[b] + blind, q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1]))


class _Heads(NamedTuple):
    """The inputs in at least FP32 with heads before rows; q carries the scale of the scores."""

    q_nope: Tensor  # (B, H, Sq, N)
    q_rope: Tensor  # (B, H, Sq, R)
    k_nope: Tensor  # (B, H, Sk, N)
    k_rope: Tensor  # (B, Sk, R)
    v: Tensor  # (B, H, Sk, U)

    @staticmethod
    def of(inputs: Inputs, scale: float) -> _Heads:
        q, k_nope, k_rope, v = (at_least_fp32(x) for x in inputs)
        q_nope, q_rope = (q * scale).transpose(1, 2).split([k_nope.shape[3], k_rope.shape[2]], dim=3)
        heads = (x.contiguous() for x in (q_nope, q_rope, k_nope.transpose(1, 2), k_rope, v.transpose(1, 2)))
        return _Heads(*heads)

    def scores(self, rows: slice, keys: int, causal: bool) -> Tensor:
        """(B, H, rows, keys) of these queries and the first keys; the last of the rows sees the last of the keys."""
        B, H, num_rows, _ = self.q_nope[:, :, rows].shape
        # k_rope is one for all heads: (H * rows, R) queries meet (keys, R) keys in a single product a sequence.
        scores = torch.bmm(self.q_rope[:, :, rows].reshape(B, H * num_rows, -1), self.k_rope[:, :keys].transpose(1, 2))
        scores = scores.view(B * H, num_rows, keys)
        k_nope = self.k_nope.flatten(0, 1)[:, :keys]
        scores.baddbmm_(self.q_nope.flatten(0, 1)[:, rows], k_nope.transpose(1, 2))
        if causal:
            hidden = torch.ones(num_rows, num_rows, dtype=torch.bool, device=scores.device).triu(1)
            scores[:, :, keys - num_rows :].masked_fill_(hidden, -torch.inf)
        return scores.view(B, H, num_rows, keys)


def _forward(inputs: Inputs, scale: float, causal: bool) -> Results:
    """out (B, Sq, H, U) in q's dtype, lse (B, Sq, H), at least FP32."""
    q, _, k_rope, v = inputs
    heads = _Heads.of(inputs, scale)
    B, H, Sq, _ = heads.q_nope.shape
    out = heads.v.new_empty(B, Sq, H, v.shape[3])
    lse = heads.v.new_empty(B, Sq, H)
    for rows, keys in _blocks(Sq, k_rope.shape[1], causal):
        scores = heads.scores(rows, keys, causal)
        weights = torch.softmax(scores, dim=3)
        out[:, rows] = (weights @ heads.v[:, :, :keys]).transpose(1, 2)
        # The largest weight is exp(max - lse) and at least 1 / keys, so its logarithm loses nothing.
        lse[:, rows] = (scores.amax(dim=3) - weights.amax(dim=3).log()).transpose(1, 2)
    return out.to(q.dtype), lse


def _backward(inputs: Inputs, results: Results, gradients_of: Results, scale: float, causal: bool) -> Inputs:
    """Recomputes the scores from lse, so that nothing of size Sq * Sk is kept."""
    q, _, k_rope, _ = inputs
    out, lse = results
    dout, dlse = gradients_of
    heads = _Heads.of(inputs, scale)
    dout_BHSU = at_least_fp32(dout).transpose(1, 2).contiguous()
    # d lse / d score is the weight, so dlse joins the row term of the softmax's derivative.
    row_BHS = (at_least_fp32(dout) * out).sum(dim=3).sub_(dlse).transpose(1, 2)
    gradients = _Heads(*(torch.zeros_like(x) for x in heads))
    for rows, keys in _blocks(q.shape[1], k_rope.shape[1], causal):
        weights = heads.scores(rows, keys, causal).sub_(lse[:, rows].transpose(1, 2).unsqueeze(3)).exp_()
        dscores = dout_BHSU[:, :, rows] @ heads.v[:, :, :keys].transpose(2, 3)
        dscores.sub_(row_BHS[:, :, rows].unsqueeze(3)).mul_(weights)
        _add_product(gradients.v[:, :, :keys], weights.transpose(2, 3), dout_BHSU[:, :, rows])
        _add_scores_gradient(gradients, heads, dscores, rows)
    dq = torch.cat((gradients.q_nope, gradients.q_rope), dim=3).transpose(1, 2) * scale
    dk_nope, dv = gradients.k_nope.transpose(1, 2), gradients.v.transpose(1, 2)
    return dq.to(q.dtype), dk_nope.to(q.dtype), gradients.k_rope.to(q.dtype), dv.to(q.dtype)


def _blocks(num_queries: int, num_keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, each with the number of keys that its last query sees; ends of queries and keys align."""
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        yield slice(start, end), num_keys - num_queries + end if causal else num_keys


def _add_scores_gradient(gradients: _Heads, heads: _Heads, dscores: Tensor, rows: slice) -> None:
    B, H, num_rows, keys = dscores.shape
    gradients.q_nope[:, :, rows] = dscores @ heads.k_nope[:, :, :keys]
    _add_product(gradients.k_nope[:, :, :keys], dscores.transpose(2, 3), heads.q_nope[:, :, rows])
    flat = dscores.view(B, H * num_rows, keys)
    gradients.q_rope[:, :, rows] = (flat @ heads.k_rope[:, :keys]).view(B, H, num_rows, -1)
    q_rope = heads.q_rope[:, :, rows].reshape(B, H * num_rows, -1)
    gradients.k_rope[:, :keys].baddbmm_(flat.transpose(1, 2), q_rope)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    total.flatten(0, 1).baddbmm_(x.flatten(0, 1), y.flatten(0, 1))


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float, latent_dim: int
) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    wide = at_least_fp32(q)
    out = wide.new_zeros(B, L, H, latent_dim)
    lse = wide.new_full((B, L, H), -torch.inf)
    for b, length in enumerate(lengths.tolist()):
        pages = block_table[b, : -(-length // PAGE)].long()
        rows = cache[pages].flatten(0, 1)
        latent = (
            dequantize_latents(rows, latent_dim).to(wide.dtype) if rows.dtype == torch.uint8 else at_least_fp32(rows)
        )
        for i in range(max(0, L - length), L):
            seen = latent[: length - L + i + 1]
            scores = wide[b, i] @ seen.t() * scale
            lse[b, i] = torch.logsumexp(scores, dim=-1)
            out[b, i] = torch.softmax(scores, dim=-1) @ seen[:, :latent_dim]
    return out.to(q.dtype), lse
