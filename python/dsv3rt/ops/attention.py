"""Multi-head latent attention: the training form and the absorbed decoding form."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.checks import FLOATS, check_same_device, check_tensor, require
from dsv3rt.ops.latent_cache import fp8_token_bytes
from dsv3rt.ops.reference import attention as reference
from dsv3rt.ops.registry import register

KERNEL_DIMS = (128, 64, 128)  # N, R, U
DECODE_KERNEL_DIMS = (512, 576)  # C, C + R


def _has_kernel(inputs: list[Tensor]) -> bool:
    q, k_nope, k_rope, v = inputs
    dims = (k_nope.shape[2], k_rope.shape[1], v.shape[2])
    return q.is_cuda and q.dtype == torch.bfloat16 and dims == KERNEL_DIMS


def _prefill_by_reference(
    inputs: list[Tensor], cu_seqlens: list[Tensor], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return reference.mla_prefill(_inputs(inputs), _ends(cu_seqlens), scale, causal)


def _prefill_on_cuda(
    inputs: list[Tensor], cu_seqlens: list[Tensor], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(inputs):
        return _prefill_by_reference(inputs, cu_seqlens, scale, causal)
    from dsv3rt.ops.cuda import attention as cuda

    return cuda.mla_prefill(inputs, cu_seqlens, scale=scale, causal=causal)


def _prefill_fake(inputs: list[Tensor], cu_seqlens: list[Tensor], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, _, _, v = inputs
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype)


_mla_prefill = register(
    "mla_prefill(Tensor[] inputs, Tensor[] cu_seqlens, float scale, bool causal) -> (Tensor, Tensor)",
    cpu=_prefill_by_reference,
    cuda=_prefill_on_cuda,
    fake=_prefill_fake,
)


def _backward_by_reference(
    inputs: list[Tensor],
    results: list[Tensor],
    gradients: list[Tensor],
    cu_seqlens: list[Tensor],
    scale: float,
    causal: bool,
) -> list[Tensor]:
    pairs = (results[0], results[1]), (gradients[0], gradients[1])
    return reference.mla_prefill_backward(_inputs(inputs), *pairs, _ends(cu_seqlens), scale, causal)


def _backward_on_cuda(
    inputs: list[Tensor],
    results: list[Tensor],
    gradients: list[Tensor],
    cu_seqlens: list[Tensor],
    scale: float,
    causal: bool,
) -> list[Tensor]:
    if not _has_kernel(inputs):
        return _backward_by_reference(inputs, results, gradients, cu_seqlens, scale, causal)
    from dsv3rt.ops.cuda import attention as cuda

    return cuda.mla_prefill_backward(inputs, results, gradients, cu_seqlens, scale=scale, causal=causal)


def _backward_fake(inputs: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


_mla_prefill_backward = register(
    "mla_prefill_backward(Tensor[] inputs, Tensor[] results, Tensor[] gradients, Tensor[] cu_seqlens, float scale,"
    " bool causal) -> Tensor[]",
    cpu=_backward_by_reference,
    cuda=_backward_on_cuda,
    fake=_backward_fake,
)


class _Prefill(torch.autograd.Function):
    """Inputs are q, k_nope, k_rope, v; the gradients of both results are wanted."""

    @staticmethod
    def forward(
        ctx: Any, cu_seqlens: tuple[Tensor, Tensor], scale: float, causal: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = _mla_prefill(list(inputs), list(cu_seqlens), scale, causal)
        ctx.save_for_backward(*inputs, out, lse, *cu_seqlens)
        ctx.scale, ctx.causal = scale, causal
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, results, cu_seqlens = list(saved[:4]), list(saved[4:6]), list(saved[6:])
        gradients = _mla_prefill_backward(inputs, results, [dout, dlse], cu_seqlens, ctx.scale, ctx.causal)
        return None, None, None, *gradients


def mla_prefill(
    q_THC: Tensor,
    k_nope_THN: Tensor,
    k_rope_TR: Tensor,
    v_THU: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * (q_nope k_nope^T + q_rope k_rope^T)) v inside each sequence. Differentiable, lse included.

    Args:
        q_THC: (T, H, N + R) bf16, fp32 or fp64: per head the nope part, then the turned rope part.
        k_nope_THN: (Tk, H, N) of q's dtype.
        k_rope_TR: (Tk, R) of q's dtype, shared by all heads.
        v_THU: (Tk, H, U) of q's dtype.
        cu_seqlens: (B + 1,) int32: sequence b holds queries cu_seqlens[b] .. cu_seqlens[b + 1]; from 0 to T.
        scale: factor of the scores.
        causal: query i of a sequence sees keys up to i + (its number of keys - its number of queries): ends align.
        cu_seqlens_k: as cu_seqlens for the keys; None: the same.
    Returns:
        out_THU (T, H, U) in q's dtype, and lse_TH (T, H) fp32 (fp64 for fp64 inputs), the natural logarithm of the
        sum of the exponentiated scaled scores. A query with no key gives 0 and -inf.
    Raises:
        ValueError: shape, or cu_seqlens that do not rise from 0 to the number of rows. For the kernel also a scale that
            is not positive, columns that are not contiguous, strides that are not multiples of 8; the numbers in
            cu_seqlens stay on the device and are not checked.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: fp32 scores, softmax and sums; the kernels round weights and their gradients to bf16 before they meet the
        other operand. They run on CUDA for bf16 with N, R, U = 128, 64, 128, k_nope and v in any strides (so that both
        may be views of one projection); everything else is the reference. Both passes are bitwise repeatable.
    Source: DeepSeek-V2 report (arXiv 2405.04434) sec. 2.1; FlashMLA dense prefill.
    """
    op = "mla_prefill"
    check_tensor(op, "k_nope_THN", k_nope_THN, (None, None, None), FLOATS)
    Tk, H, N = k_nope_THN.shape
    check_tensor(op, "k_rope_TR", k_rope_TR, (Tk, None), (k_nope_THN.dtype,))
    check_tensor(op, "q_THC", q_THC, (None, H, N + k_rope_TR.shape[1]), (k_nope_THN.dtype,))
    check_tensor(op, "v_THU", v_THU, (Tk, H, None), (k_nope_THN.dtype,))
    check_tensor(op, "cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    check_same_device(op, q_THC=q_THC, k_nope_THN=k_nope_THN, k_rope_TR=k_rope_TR, v_THU=v_THU, cu_seqlens=cu_seqlens)
    if cu_seqlens_k is not None:
        check_tensor(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), (torch.int32,))
        check_same_device(op, q_THC=q_THC, cu_seqlens_k=cu_seqlens_k)
    keys_ends = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    inputs = (q_THC, k_nope_THN, k_rope_TR, v_THU)
    if _has_kernel(list(inputs)):
        require(scale > 0, op, "scale", "be positive on CUDA", scale)
    else:
        _check_ends(op, "cu_seqlens", cu_seqlens.tolist(), q_THC.shape[0])
        _check_ends(op, "cu_seqlens" if cu_seqlens_k is None else "cu_seqlens_k", keys_ends.tolist(), Tk)
    return cast(tuple[Tensor, Tensor], _Prefill.apply((cu_seqlens, keys_ends), scale, causal, *inputs))


def _has_decode_kernel(q: Tensor, latent_dim: int) -> bool:
    return q.is_cuda and q.dtype == torch.bfloat16 and (latent_dim, q.shape[3]) == DECODE_KERNEL_DIMS


def _decode_by_reference(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float, latent_dim: int
) -> tuple[Tensor, Tensor]:
    return reference.mla_decode(q, cache, block_table, lengths, scale, latent_dim)


def _decode_on_cuda(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float, latent_dim: int
) -> tuple[Tensor, Tensor]:
    if not _has_decode_kernel(q, latent_dim):
        return _decode_by_reference(q, cache, block_table, lengths, scale, latent_dim)
    from dsv3rt.ops.cuda import attention as cuda

    return cuda.mla_decode(q, cache, block_table, lengths, scale=scale, latent_dim=latent_dim)


def _decode_fake(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float, latent_dim: int
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], latent_dim), q.new_empty(q.shape[:3], dtype=lse_dtype)


_mla_decode = register(
    "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor lengths, float scale, int latent_dim)"
    " -> (Tensor, Tensor)",
    cpu=_decode_by_reference,
    cuda=_decode_on_cuda,
    fake=_decode_fake,
)


def mla_decode(
    q_BLHC: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float, latent_dim: int
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of the last L tokens of each sequence over its paged latent cache.

    Args:
        q_BLHC: (B, L, H, C + R) bf16, fp32 or fp64: query in the latent space, then the turned rope part.
        cache: (pages, 64, C + R) of q's dtype: latent, then the turned rope key. Or (pages, 64, bytes) uint8, as
            `quantize_latents` makes them.
        block_table: (B, max_pages) int32: page of each 64 tokens of a sequence; entries past its length are not read.
        lengths: (B,) int32 tokens in the cache, the L queries being the last of them: query l sees lengths - L + l + 1.
        scale: factor of the scores.
        latent_dim: C; the first C entries of a cache row are the values as well.
    Returns:
        out_BLHC (B, L, H, C) in q's dtype; lse (B, L, H) fp32 (fp64 for fp64), natural logarithm. A query that sees no
        token gives 0 and -inf. Slots at or past `lengths` are never read.
    Raises:
        ValueError: shape, latent_dim, or a length or page outside the table or cache. On CUDA lengths and pages stay on
            the device and are not checked; for the kernel also a scale that is not positive, a cache not contiguous.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: fp32 scores, softmax and sums; the kernel rounds weights to bf16 (fp16 over an FP8 cache, where they carry
        the scales) before they meet the values. It runs on
        CUDA for bf16 with C, R = 512, 64, any L and H; everything else is the reference. Bitwise repeatable; a launch
        captured in a CUDA graph stays right when lengths, pages and the table's entries change.
    Source: DeepSeek-V2 report (arXiv 2405.04434) appendix C; FlashMLA flash_mla_with_kvcache.
    """
    op = "mla_decode"
    check_tensor(op, "q_BLHC", q_BLHC, (None, None, None, None), FLOATS)
    B, width = q_BLHC.shape[0], q_BLHC.shape[3]
    require(0 < latent_dim <= width, op, "latent_dim", f"be in 1..{width}", latent_dim)
    fp8 = cache.dtype == torch.uint8
    row = fp8_token_bytes(latent_dim, width - latent_dim) if fp8 else width
    check_tensor(op, "cache", cache, (None, reference.PAGE, row), (q_BLHC.dtype, torch.uint8))
    check_tensor(op, "block_table", block_table, (B, None), (torch.int32,))
    check_tensor(op, "lengths", lengths, (B,), (torch.int32,))
    check_same_device(op, q_BLHC=q_BLHC, cache=cache, block_table=block_table, lengths=lengths)
    if lengths.device.type == "cpu" and B > 0:
        capacity = block_table.shape[1] * reference.PAGE
        low, high = int(lengths.min()), int(lengths.max())
        require(low >= 0, op, "lengths", "not be negative", low)
        require(high <= capacity, op, "lengths", f"be at most the {capacity} tokens of block_table", high)
    if _has_decode_kernel(q_BLHC, latent_dim):
        require(scale > 0, op, "scale", "be positive on CUDA", scale)
    return cast(tuple[Tensor, Tensor], _mla_decode(q_BLHC, cache, block_table, lengths, scale, latent_dim))


def _inputs(tensors: list[Tensor]) -> reference.Inputs:
    q, k_nope, k_rope, v = tensors
    return q, k_nope, k_rope, v


def _ends(cu_seqlens: list[Tensor]) -> reference.Ends:
    q_ends, k_ends = cu_seqlens
    return q_ends.tolist(), k_ends.tolist()


def _check_ends(op: str, argument: str, ends: list[int], rows: int) -> None:
    rising = all(a <= b for a, b in pairwise(ends))
    require(bool(ends) and rising and ends[0] == 0 and ends[-1] == rows, op, argument, f"rise from 0 to {rows}", ends)
