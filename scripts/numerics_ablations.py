"""FP8 recipes for the numerics study that differ from the package's in one point each, made by replacing ops.

Only where scales are shared and how products add up changes: codes are E4M3, the kernels and the rest of a step are the
same. A coarser scale is written into each tile that it spans, in the layout of 1x128 tiles. What is quantised by rows
and by columns then has one set of codes for both. SwiGLU is computed by its reference, at most a BF16 step off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3rt import ops
from dsv3rt.layers.weights import Copies
from dsv3rt.ops.quant import quantize_128x128  # itself, whatever stands for it in ops
from dsv3rt.ops.reference import norm
from dsv3rt.ops.reference import swiglu_cast as reference
from dsv3rt.ops.reference.common import rows_with_data, segments
from dsv3rt.ops.reference.quant import E4M3_MAX
from dsv3rt.ops.types import TILE, GroupLayout, NormQuant, QuantTensor, SwigluGradients, empty_row_scales, round_up

# What each run name stands for, as docs/numerics.md says it.
ABLATIONS = {
    "block_128x128": "activations and gradients scaled by blocks of 128x128 as weights are, not by 1x128 and 128x1",
    "per_tensor": "one scale for each operand of a product (all experts' rows together, all experts' weights together)",
    "no_promotion": "`per_tensor`, and sums that stay in the tensor core (cuBLAS with fast accumulation)",
}

# Like ops.quantize_128x128: the tensor, then pow2_scales and with_transpose by name.
BlockCast = Callable[..., Any]


@contextmanager
def ablation(name: str) -> Iterator[None]:
    """Until the end of the block, `dsv3rt.ops` follows the recipe of this name, one of ABLATIONS. The weights of
    engines made before it are cast otherwise.

    no_promotion on CPU tensors is per_tensor: there is no tensor core whose sums could be kept.

    Raises:
        ValueError: another name.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation: name must be one of {', '.join(ABLATIONS)}, got '{name}'")
    replaced: dict[str, Callable[..., Any]] = {}
    if name == "block_128x128":
        rows = _by_rows(quantize_128x128)
    else:
        rows = _by_rows(quantize_per_tensor)
        replaced["quantize_128x128"] = quantize_per_tensor
    if name == "no_promotion":
        replaced |= _products_without_promotion()
    replaced |= {
        "quantize_1x128": lambda x_TD, **options: _pair_or_one(rows(x_TD, **options)),
        "rms_norm_quantize_1x128": _norm_quantize(rows),
        "swiglu_quantize_1x128": _swiglu_quantize,
        "swiglu_backward_quantize_1x128": _swiglu_backward_quantize,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(ops, **replaced))
        # SwiGLU's references, plain torch for every device, cast their values by this name.
        stack.enter_context(mock.patch.object(reference, "quantize_1x128", rows))
        if "quantize_128x128" in replaced:  # and not as the optimizer would cast weights
            stack.enter_context(mock.patch.object(Copies, "part", return_value=None))
        yield


def quantize_per_tensor(
    w: Tensor, *, pow2_scales: bool = False, with_transpose: bool = False
) -> QuantTensor | tuple[QuantTensor, QuantTensor]:
    """As `ops.quantize_128x128`, but all blocks, of all experts, share the scale of the largest magnitude."""
    *leading, F, D = w.shape
    # The scale of a tensor is that of its largest magnitude alone.
    scale = quantize_128x128(w.abs().amax().float().reshape(1, 1), pow2_scales=pow2_scales).scale.reshape(())
    codes = (w.float() * (torch.ones_like(scale) / scale)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    f, d = round_up(F, TILE) // TILE, round_up(D, TILE) // TILE
    q = QuantTensor(codes, scale.expand(*leading, f, d).contiguous(), (TILE, TILE))
    if not with_transpose:
        return q
    return q, QuantTensor(codes.mT.contiguous(), scale.expand(*leading, d, f).contiguous(), (TILE, TILE))


def _by_rows(cast: BlockCast) -> Callable[..., tuple[QuantTensor, ...]]:
    """The reference's quantize_1x128 with the scales of another cast, of 128x128 blocks."""

    def quantize(
        x_TD: Tensor,
        pow2_scales: bool = False,
        with_transpose: bool = False,
        layout: GroupLayout | None = None,
        rows_P: Tensor | None = None,
    ) -> tuple[QuantTensor, ...]:
        x = x_TD if rows_P is None else x_TD[rows_P.clamp(0, x_TD.shape[0] - 1)]
        T, D = x.shape
        if layout is not None:
            x = x.where(rows_with_data(layout, T).unsqueeze(1), torch.zeros_like(x))  # padding may hold anything
        x = pad(x, (0, 0, 0, round_up(T, TILE) - T)) if T % TILE else x
        if not with_transpose:
            return (_as_rows(cast(x, pow2_scales=pow2_scales), T),)
        q, q_t = cast(x, pow2_scales=pow2_scales, with_transpose=True)
        return _as_rows(q, T), _as_rows(q_t, D)

    return quantize


def _as_rows(blocks: QuantTensor, num_rows: int) -> QuantTensor:
    """The first rows of a tensor cast in 128x128 blocks as one in 1x128 tiles: each row has a copy of its scales."""
    scale = empty_row_scales(num_rows, blocks.scale.shape[1], blocks.device)
    scale.copy_(blocks.scale.repeat_interleave(TILE, dim=0)[:num_rows])
    return QuantTensor(blocks.data[:num_rows], scale, (1, TILE))


def _pair_or_one(quants: tuple[QuantTensor, ...]) -> Any:
    return quants if len(quants) > 1 else quants[0]


def _norm_quantize(rows: Callable[..., tuple[QuantTensor, ...]]) -> Callable[..., NormQuant]:
    """What MLA's latents need of the op: no residual, no output in BF16."""

    def quantize(
        x_TD: Tensor, weight_D: Tensor, eps: float, *, pow2_scales: bool = False, with_transpose: bool = False
    ) -> NormQuant:
        y_TD, rstd_T = norm.rms_norm(x_TD, weight_D, eps)
        q, *transposed = rows(y_TD, pow2_scales=pow2_scales, with_transpose=with_transpose)
        return NormQuant(None, None, q, transposed[0] if transposed else None, rstd_T)

    return quantize


def _swiglu_quantize(
    gate_up: Tensor | QuantTensor,
    *,
    weight_T: Tensor | None = None,
    layout: GroupLayout | None = None,
    pow2_scales: bool = False,
    with_transpose: bool = False,
) -> Any:
    parts = reference.swiglu_quantize_1x128(_wide(gate_up), weight_T, layout, pow2_scales, with_transpose)
    return _pair_or_one(parts)


def _swiglu_backward_quantize(
    gate_up: Tensor | QuantTensor,
    grad_TF: Tensor,
    *,
    weight_T: Tensor | None = None,
    layout: GroupLayout | None = None,
    pow2_scales: bool = False,
    with_product: bool = False,
) -> SwigluGradients:
    return reference.swiglu_backward_quantize_1x128(
        _wide(gate_up), grad_TF, weight_T, layout, pow2_scales, with_product
    )


def _wide(gate_up: Tensor | QuantTensor) -> Tensor:
    return ops.dequantize(gate_up) if isinstance(gate_up, QuantTensor) else gate_up


def _products_without_promotion() -> dict[str, Callable[..., Any]]:
    """The products of `layers/fp8.py` by cuBLAS, one call each or one for each expert, which the host waits for."""
    dense, by_rows, by_depth = ops.fp8_gemm_nt, ops.m_grouped_fp8_gemm_nt, ops.k_grouped_fp8_gemm_nt

    def fp8_gemm_nt(
        x: QuantTensor,
        w: QuantTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        accumulate_into: Tensor | None = None,
    ) -> Tensor:
        if not x.data.is_cuda:
            return dense(x, w, out_dtype=out_dtype, accumulate_into=accumulate_into)
        if accumulate_into is None:
            return _unpromoted(x.data, w.data, _scales(x, w), out_dtype)
        return accumulate_into.add_(_unpromoted(x.data, w.data, _scales(x, w), torch.float32))

    def m_grouped_fp8_gemm_nt(
        x: QuantTensor,
        w: QuantTensor,
        layout: GroupLayout,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        out_PF: Tensor | None = None,
    ) -> Tensor:
        if not x.data.is_cuda:
            return by_rows(x, w, layout, out_dtype=out_dtype, out_PF=out_PF)
        if out_PF is None:
            out_PF = torch.empty(x.data.shape[0], w.data.shape[1], dtype=out_dtype, device=x.device)
        y_PF = out_PF.zero_()
        for g, (start, _, end) in enumerate(segments(layout)):
            if end > start:  # padding rows are zeros, and fill the product up to whole tiles
                y_PF[start:end] = _unpromoted(x.data[start:end], w.data[g], _scales(x, w), out_dtype)
        return y_PF

    def k_grouped_fp8_gemm_nt(
        x: QuantTensor, y: QuantTensor, layout: GroupLayout, *, accumulate_into: Tensor | None = None
    ) -> Tensor:
        if not x.data.is_cuda:
            return by_depth(x, y, layout, accumulate_into=accumulate_into)
        if accumulate_into is None:
            shape = (layout.counts_X.numel(), x.data.shape[0], y.data.shape[0])
            accumulate_into = torch.zeros(shape, dtype=torch.float32, device=x.device)
        for g, (start, _, end) in enumerate(segments(layout)):
            if end > start:
                columns = x.data[:, start:end], y.data[:, start:end]
                accumulate_into[g] += _unpromoted(*columns, _scales(x, y), torch.float32)
        return accumulate_into

    return {
        "fp8_gemm_nt": fp8_gemm_nt,
        "m_grouped_fp8_gemm_nt": m_grouped_fp8_gemm_nt,
        "k_grouped_fp8_gemm_nt": k_grouped_fp8_gemm_nt,
    }


def _unpromoted(x_TD: Tensor, w_FD: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype) -> Tensor:
    """(T, F), of codes with one scale each; F and D must be multiples of 16, which `_scaled_mm` checks.

    Nothing is promoted but where cuBLAS splits a depth over several blocks, whose sums it adds in FP32.
    """
    scale_x, scale_w = scales
    return torch._scaled_mm(x_TD, w_FD.t(), scale_x, scale_w, out_dtype=out_dtype, use_fast_accum=True)


def _scales(x: QuantTensor, w: QuantTensor) -> tuple[Tensor, Tensor]:
    """Any tile's, as all tiles have the same."""
    return x.scale[0, 0], w.scale.flatten()[0]
