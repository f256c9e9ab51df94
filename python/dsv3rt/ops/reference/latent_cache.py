"""Reference of the latent cache. An FP8 token is its latent in E4M3, a scale a tile, and rope keys in BF16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3rt.ops.reference.embed import rope
from dsv3rt.ops.reference.norm import rms_norm
from dsv3rt.ops.reference.quant import quantize_1x128
from dsv3rt.ops.types import TILE, ceil_div


def quantize_latents(rows: Tensor, latent_dim: int) -> Tensor:
    latent, rope = rows.flatten(0, -2).bfloat16().split([latent_dim, rows.shape[-1] - latent_dim], dim=-1)
    (quantized,) = quantize_1x128(latent, pow2_scales=True, with_transpose=False)
    parts = (quantized.data, quantized.scale.clone(memory_format=torch.contiguous_format), rope.contiguous())
    packed = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
    return packed.unflatten(0, rows.shape[:-1])


def dequantize_latents(packed: Tensor, latent_dim: int) -> Tensor:
    """FP32."""
    tiles = ceil_div(latent_dim, TILE)
    data, scale, rope = packed.split([latent_dim, 4 * tiles, packed.shape[-1] - latent_dim - 4 * tiles], dim=-1)
    latent = pad(data.contiguous().view(torch.float8_e4m3fn).float(), (0, tiles * TILE - latent_dim))
    latent = latent.unflatten(-1, (tiles, TILE)) * scale.contiguous().view(torch.float32).unsqueeze(-1)
    return torch.cat([latent.flatten(-2)[..., :latent_dim], rope.contiguous().view(torch.bfloat16).float()], dim=-1)


def append_latents(
    cache: Tensor, rows: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float
) -> None:
    latent, rope_keys = rows.split([weight.shape[0], rows.shape[1] - weight.shape[0]], dim=1)
    normed, _ = rms_norm(latent, weight, eps)
    new = torch.cat([normed, rope(rope_keys, cos, sin, False)], dim=1)
    if cache.dtype == torch.uint8:
        new = quantize_latents(new, weight.shape[0])
    kept = slots >= 0
    cache.view(-1, cache.shape[2])[slots[kept]] = new[kept]
