"""Latent attention kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load


def mla_prefill(inputs: list[Tensor], cu_seqlens: list[Tensor], *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of q, k_nope, k_rope, v, laid out as `dsv3rt.ops.mla_prefill` says."""
    extension = load()
    q, _, _, v = inputs
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile_counter = torch.empty(1, dtype=torch.int32, device=q.device)
    extension.mla_prefill(*inputs, out, lse, *cu_seqlens, tile_counter, scale=scale, causal=causal)
    return out, lse
