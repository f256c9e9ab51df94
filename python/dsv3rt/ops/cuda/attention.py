"""Latent attention kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load

QUERY_TILE = 64  # queries whose statistics lie together
FEW_ROWS = 32  # up to so many queries x heads, an FP8 cache is read by blocks of few rows


def mla_prefill(inputs: list[Tensor], cu_seqlens: list[Tensor], *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of q, k_nope, k_rope, v, laid out as `dsv3rt.ops.mla_prefill` says."""
    extension = load()
    q, _, _, v = inputs
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile_counter = torch.empty(1, dtype=torch.int32, device=q.device)
    extension.mla_prefill(*inputs, out, lse, *cu_seqlens, tile_counter, scale=scale, causal=causal)
    return out, lse


def mla_prefill_backward(
    inputs: list[Tensor],
    results: list[Tensor],
    gradients: list[Tensor],
    cu_seqlens: list[Tensor],
    *,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """Gradients of q, k_nope, k_rope, v; those of k_nope and v are views of one (Tk, H, N + U)."""
    extension = load()
    q, k_nope, k_rope, v = inputs
    keys, H, N = k_nope.shape
    dq = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    dk_rope = torch.empty(k_rope.shape, dtype=torch.bfloat16, device=q.device)
    dkv = torch.empty((keys, H, N + v.shape[2]), dtype=torch.bfloat16, device=q.device)
    dk_nope, dv = dkv.split([N, v.shape[2]], dim=2)
    if q.shape[0] == 0 or keys == 0:  # nobody attends to anything
        for gradient in (dq, dk_rope, dkv):
            gradient.zero_()
        return [dq, dk_nope, dk_rope, dv]
    tiles = H * (q.shape[0] // QUERY_TILE + len(cu_seqlens[0]) - 1)
    statistics = torch.empty(tiles * 2 * QUERY_TILE, dtype=torch.float32, device=q.device)
    dk_rope_parts = torch.empty(H * k_rope.numel(), dtype=torch.float32, device=q.device)
    scratch = (statistics, dk_rope_parts, torch.empty(2, dtype=torch.int32, device=q.device))
    dense = [gradient.contiguous() for gradient in gradients]
    extension.mla_prefill_backward(
        *inputs, *results, *dense, dq, dk_nope, dk_rope, dv, *cu_seqlens, *scratch, scale=scale, causal=causal
    )  # fmt: skip
    return [dq, dk_nope, dk_rope, dv]


def decode_block_rows(cache_dtype: torch.dtype, rows: int) -> int:
    """Queries x heads of a request that one block of `mla_decode` takes."""
    return 16 if cache_dtype == torch.uint8 and rows <= FEW_ROWS else 64


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, latent_dim: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `dsv3rt.ops.mla_decode`. As many blocks as run at a time, each with its share of all pages."""
    extension = load()
    B, L, H, _ = q.shape
    out = torch.empty((B, L, H, latent_dim), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty((B, L, H), dtype=torch.float32, device=q.device)
    block_rows = decode_block_rows(cache.dtype, L * H)
    row_blocks = -(-L * H // block_rows)
    blocks = torch.cuda.get_device_properties(q.device).multi_processor_count  # one an SM
    parts = max(blocks // max(row_blocks, 1), 1)
    # A part holds two results at most that other parts hold more of: its first and its last.
    partial_out = torch.empty((row_blocks, parts, 2, block_rows, latent_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((row_blocks, parts, 2, block_rows), dtype=torch.float32, device=q.device)
    extension.mla_decode(
        q.contiguous(), cache, block_table, lengths, out, lse, partial_out, partial_lse, scale=scale
    )  # fmt: skip
    return out, lse
