"""The two forms of a latent cache, numbers of the model's dtype or FP8 with scales beside them, and how it grows."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import FLOATS, check_dtype, check_same_device, check_tensor, require
from dsv3rt.ops.reference import latent_cache as reference
from dsv3rt.ops.reference.attention import PAGE
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import TILE, ceil_div

KERNEL_DIMS = (512, 576)  # C, C + R


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


def _append_on_cuda(
    cache: Tensor, rows: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float
) -> None:
    numbers_of_kernel = rows.dtype == weight.dtype == torch.bfloat16 and cos.dtype == torch.float32
    if not numbers_of_kernel or (weight.shape[0], rows.shape[1]) != KERNEL_DIMS:
        return reference.append_latents(cache, rows, weight, cos, sin, slots, eps)
    from dsv3rt.ops.cuda import latent_cache as cuda

    return cuda.append_latents(cache, rows, weight, cos, sin, slots, eps=eps)


def _append_fake(
    cache: Tensor, rows: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, eps: float
) -> None:
    return None


_append = register(
    "append_latents(Tensor(a!) cache, Tensor rows, Tensor weight, Tensor cos, Tensor sin, Tensor slots, float eps)"
    " -> ()",
    cpu=reference.append_latents,
    cuda=_append_on_cuda,
    fake=_append_fake,
)


def append_latents(
    cache: Tensor, rows_TX: Tensor, weight_C: Tensor, cos_TR: Tensor, sin_TR: Tensor, slots_T: Tensor, *, eps: float
) -> Tensor:
    """Writes new tokens into a latent cache: the latent normed, the rope key turned, quantised where the cache is FP8.

    Args:
        cache: (pages, 64, C + R) of rows' dtype, or (pages, 64, fp8_token_bytes(C, R)) uint8; contiguous.
        rows_TX: (T, C + R) bf16, fp32 or fp64: the joint projection of latent and rope key, as it comes.
        weight_C: (C,) of rows' dtype, of the norm.
        cos_TR: (T, R / 2) fp32 (or fp64), as `rope` takes them.
        sin_TR: as cos_TR.
        slots_T: (T,) int64, page * 64 + place of each token, each slot once; a negative one: not written.
        eps: of the norm.
    Returns:
        cache itself.
    Raises:
        ValueError: shape, stride, or a slot outside the cache; on CUDA slots stay on the device, and the kernel leaves
            such tokens out.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: `rms_norm` and `rope`, each rounded to rows' dtype, then `quantize_latents`. The kernel runs on CUDA for
        bf16 with C, R = 512, 64 and fp32 tables; everything else is the reference. Its sum of squares has another
        order: a normed number may be the bf16 beside the reference's.
    Source: DeepSeek-V2 report (arXiv 2405.04434) sec. 2.1.2.
    """
    op = "append_latents"
    check_tensor(op, "weight_C", weight_C, (None,), FLOATS)
    C = weight_C.shape[0]
    check_tensor(op, "rows_TX", rows_TX, (None, None), (weight_C.dtype,))
    T, width = rows_TX.shape
    require(width > C and (width - C) % 2 == 0, op, "rows_TX", f"have {C} + an even number of columns", width)
    fp8 = cache.dtype == torch.uint8
    row = fp8_token_bytes(C, width - C) if fp8 else width
    check_tensor(op, "cache", cache, (None, PAGE, row), (rows_TX.dtype, torch.uint8))
    require(cache.is_contiguous(), op, "cache", "be contiguous", f"stride {cache.stride()}")
    check_tensor(op, "cos_TR", cos_TR, (T, (width - C) // 2), (torch.float32, torch.float64))
    check_tensor(op, "sin_TR", sin_TR, (T, (width - C) // 2), (cos_TR.dtype,))
    check_tensor(op, "slots_T", slots_T, (T,), (torch.int64,))
    check_same_device(
        op, cache=cache, rows_TX=rows_TX, weight_C=weight_C, cos_TR=cos_TR, sin_TR=sin_TR, slots_T=slots_T
    )
    if slots_T.device.type == "cpu" and T > 0:
        require(int(slots_T.max()) < cache.shape[0] * PAGE, op, "slots_T", "be in the cache", int(slots_T.max()))
    _append(cache, rows_TX, weight_C, cos_TR, sin_TR, slots_T, eps)
    return cache
