"""The two forms of a latent cache: numbers of the model's dtype, or FP8 with scales beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import FLOATS, check_dtype, require
from dsv3rt.ops.reference import latent_cache as reference
from dsv3rt.ops.types import TILE, ceil_div


def fp8_token_bytes(latent_dim: int, rope_dim: int) -> int:
    """What a token takes in the FP8 cache: C of E4M3, an FP32 scale for each 128 of them, R of BF16.

    Args:
        latent_dim: C.
        rope_dim: R.
    Returns:
        bytes; 656 for 512 and 64.
    Raises:
        ValueError: never.
    """
    return latent_dim + 4 * ceil_div(latent_dim, TILE) + 2 * rope_dim


def quantize_latents(rows: Tensor, *, latent_dim: int) -> Tensor:
    """Rows of a latent cache in the form of the FP8 cache.

    Args:
        rows: (..., C + R) bf16, fp32 or fp64, rounded to bf16 first.
        latent_dim: C.
    Returns:
        (..., fp8_token_bytes(C, R)) uint8: C numbers in E4M3, a power of two for each 128 of them as fp32, R in bf16.
    Raises:
        ValueError: shape or latent_dim.
        TypeError: dtype outside the above.
    Numerics: as `quantize_1x128(..., pow2_scales=True)`: 2^-4 of a number at most, 2^-10 of its tile's scale for small
        ones.
    """
    op = "quantize_latents"
    check_dtype(op, "rows", rows, FLOATS)
    require(rows.dim() >= 2, op, "rows", "have at least two dimensions", tuple(rows.shape))
    require(0 < latent_dim < rows.shape[-1], op, "latent_dim", f"be in 1..{rows.shape[-1] - 1}", latent_dim)
    return reference.quantize_latents(rows, latent_dim)


def dequantize_latents(packed: Tensor, *, latent_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What `quantize_latents` made, as numbers.

    Args:
        packed: (..., fp8_token_bytes(C, R)) uint8.
        latent_dim: C.
        dtype: of the result; bf16 holds it exactly.
    Returns:
        (..., C + R).
    Raises:
        ValueError: a width that no R gives.
        TypeError: dtype other than uint8.
    """
    op = "dequantize_latents"
    check_dtype(op, "packed", packed, (torch.uint8,))
    rope_bytes = packed.shape[-1] - fp8_token_bytes(latent_dim, 0)
    require(rope_bytes > 0 and rope_bytes % 2 == 0, op, "packed", "have the width of some R", tuple(packed.shape))
    return reference.dequantize_latents(packed, latent_dim).to(dtype)
