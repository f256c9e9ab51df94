"""FP8 recipes for the numerics study that differ from the package's in one point each, made by replacing ops.

Some change where scales are shared or how products add up: codes are E4M3, the kernels and the rest of a step are the
same. A coarser scale is written into each tile that it spans, in the layout of 1x128 tiles. What is quantised by rows
and by columns then has one set of codes for both. SwiGLU is computed by its reference, at most a BF16 step off.

Others leave some casts out, and the products of what isn't cast are torch's, in the model's dtype with FP32 sums: a
`QuantTensor` whose data are no codes. All that is cast has FP8's bits. The rest are settings of a run (`settings`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3rt import ops
from dsv3rt.layers import fp8
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
    "wgrad_bf16": "weight gradients from operands in BF16 (SwiGLU's output from its input as kept, in FP8)",
    "dgrad_bf16": "input gradients from the result's gradient and the weight in BF16",
    "fprop_bf16": "forward products from the input and the weight in BF16",
    "swiglu_bf16": "SwiGLU's input kept for the backward in BF16",
    "attention_bf16": "all products of attention's linears in BF16, as the default of `train.bf16_modules` has it",
    "latents_bf16": "products into MLA's latents (`q_a_proj`, `kv_a_proj_with_mqa`) in BF16",
    "latents_out_bf16": "products into MLA's latents and out of attention (`o_proj`) in BF16",
    "experts_bf16": "all products of feed-forwards and experts in BF16, the shared ones' too",
}
# What a study without such a run says nothing of.
QUESTIONS = {
    "block_128x128": "the shape of tiles", "per_tensor": "fine scales", "no_promotion": "promotion",
    "wgrad_bf16": "casts for weight gradients", "dgrad_bf16": "casts for input gradients",
    "fprop_bf16": "casts of the forward", "swiglu_bf16": "the cast of SwiGLU's input", "experts_bf16": "experts' share",
    "attention_bf16": "attention's share", "latents_bf16": "the latents'", "latents_out_bf16": "theirs and `o_proj`'s",
}  # fmt: skip
# Products, and "swiglu" for what is kept of its input, that go without casts.
UNCAST = {"wgrad_bf16": "wgrad", "dgrad_bf16": "dgrad", "fprop_bf16": "fprop", "swiglu_bf16": "swiglu"}
BF16_MODULES = {
    "attention_bf16": ["*.self_attn.*"], "latents_bf16": ["*.q_a_proj", "*.kv_a_proj_with_mqa"],
    "latents_out_bf16": ["*.q_a_proj", "*.kv_a_proj_with_mqa", "*.o_proj"], "experts_bf16": ["*.mlp.*"],
}  # fmt: skip

# Like ops.quantize_128x128: the tensor, then pow2_scales and with_transpose by name.
BlockCast = Callable[..., Any]


@contextmanager
def ablation(name: str) -> Iterator[None]:
    """Until the end of the block, `dsv3rt.ops` follows the recipe of this name, one of ABLATIONS. The weights of
    engines made before it are cast otherwise.

    no_promotion on CPU tensors is per_tensor: there is no tensor core whose sums could be kept. For those that
    `settings` make nothing is replaced.

    Raises:
        ValueError: another name.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation: name must be one of {', '.join(ABLATIONS)}, got '{name}'")
    with nullcontext() if name in BF16_MODULES else without_casts(UNCAST[name]) if name in UNCAST else _coarse(name):
        yield


def settings(name: str) -> dict[str, Any]:
    """What the configuration of a run of this name has that FP8's has not, by key."""
    return {"train.bf16_modules": BF16_MODULES[name]} if name in BF16_MODULES else {}


@contextmanager
def _coarse(name: str) -> Iterator[None]:
    """block_128x128, per_tensor or no_promotion."""
    replaced: dict[str, Callable[..., Any]] = {}
    if name == "block_128x128":
        rows = _by_rows(quantize_128x128)
    else:
        rows = _by_rows(quantize_per_tensor)
        replaced["quantize_128x128"] = quantize_per_tensor
    if name == "no_promotion":
        replaced |= _products(_unpromoted_product)
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
        x = _rows(x_TD, layout, rows_P)
        T, D = x.shape
        x = pad(x, (0, 0, 0, round_up(T, TILE) - T)) if T % TILE else x
        if not with_transpose:
            return (_as_rows(cast(x, pow2_scales=pow2_scales), T),)
        q, q_t = cast(x, pow2_scales=pow2_scales, with_transpose=True)
        return _as_rows(q, T), _as_rows(q_t, D)

    return quantize


def _rows(x_TD: Tensor, layout: GroupLayout | None, rows_P: Tensor | None) -> Tensor:
    """What a cast reads: gathered, and zeros where there are no data, as padding may hold anything."""
    x = x_TD if rows_P is None else x_TD[rows_P.clamp(0, x_TD.shape[0] - 1)]
    return x if layout is None else x.where(rows_with_data(layout, len(x)).unsqueeze(1), torch.zeros_like(x))


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
    gate_up = _without_scales(gate_up)
    return ops.dequantize(gate_up) if isinstance(gate_up, QuantTensor) else gate_up


# A product of parts of the operands, by their indices, in this dtype.
Product = Callable[[Any, Any, torch.dtype], Tensor]


def _products(product_of: Callable[[QuantTensor, QuantTensor], Product | None]) -> dict[str, Callable[..., Any]]:
    """The products of `layers/fp8.py`, one call each or one for each expert, which the host waits for; the kernels
    where `product_of` gives none."""
    dense, by_rows, by_depth = ops.fp8_gemm_nt, ops.m_grouped_fp8_gemm_nt, ops.k_grouped_fp8_gemm_nt

    def fp8_gemm_nt(
        x: QuantTensor,
        w: QuantTensor,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        accumulate_into: Tensor | None = None,
        num_sms: int = 0,
    ) -> Tensor:
        product = product_of(x, w)
        if product is None:
            return dense(x, w, out_dtype=out_dtype, accumulate_into=accumulate_into, num_sms=num_sms)
        if accumulate_into is None:
            return product(..., ..., out_dtype)
        return accumulate_into.add_(product(..., ..., torch.float32))

    def m_grouped_fp8_gemm_nt(
        x: QuantTensor,
        w: QuantTensor,
        layout: GroupLayout,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        out_PF: Tensor | None = None,
        num_sms: int = 0,
    ) -> Tensor:
        product = product_of(x, w)
        if product is None:
            return by_rows(x, w, layout, out_dtype=out_dtype, out_PF=out_PF, num_sms=num_sms)
        if out_PF is None:
            out_PF = torch.empty(x.data.shape[0], w.data.shape[1], dtype=out_dtype, device=x.device)
        y_PF = out_PF.zero_()
        for g, (start, _, end) in enumerate(segments(layout)):
            if end > start:  # padding rows are zeros, and fill the product up to whole tiles
                y_PF[start:end] = product(slice(start, end), g, out_dtype)
        return y_PF

    def k_grouped_fp8_gemm_nt(
        x: QuantTensor, y: QuantTensor, layout: GroupLayout, *, accumulate_into: Tensor | None = None, num_sms: int = 0
    ) -> Tensor:
        product = product_of(x, y)
        if product is None:
            return by_depth(x, y, layout, accumulate_into=accumulate_into, num_sms=num_sms)
        if accumulate_into is None:
            shape = (layout.counts_X.numel(), x.data.shape[0], y.data.shape[0])
            accumulate_into = torch.zeros(shape, dtype=torch.float32, device=x.device)
        for g, (start, _, end) in enumerate(segments(layout)):
            if end > start:
                columns = (slice(None), slice(start, end))
                accumulate_into[g] += product(columns, columns, torch.float32)
        return accumulate_into

    return {
        "fp8_gemm_nt": fp8_gemm_nt,
        "m_grouped_fp8_gemm_nt": m_grouped_fp8_gemm_nt,
        "k_grouped_fp8_gemm_nt": k_grouped_fp8_gemm_nt,
    }


def _unpromoted_product(x: QuantTensor, w: QuantTensor) -> Product | None:
    """By cuBLAS; of any tile's scales, as all tiles have the same."""
    if not x.data.is_cuda:
        return None
    scales = x.scale[0, 0], w.scale.flatten()[0]
    return lambda of_x, of_w, dtype: _unpromoted(x.data[of_x], w.data[of_w], scales, dtype)


def _unpromoted(x_TD: Tensor, w_FD: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype) -> Tensor:
    """(T, F), of codes with one scale each; F and D must be multiples of 16, which `_scaled_mm` checks.

    Nothing is promoted but where cuBLAS splits a depth over several blocks, whose sums it adds in FP32.
    """
    scale_x, scale_w = scales
    return torch._scaled_mm(x_TD, w_FD.t(), scale_x, scale_w, out_dtype=out_dtype, use_fast_accum=True)


@dataclass(frozen=True)
class _Rows(QuantTensor):
    """Rows that are multiplied with casts of weights or, as they were (`uncast`), with weights that aren't cast."""

    uncast: Tensor


@contextmanager
def without_casts(*parts: str) -> Iterator[None]:
    """Until the end of the block, the products of `parts`, of "fprop", "dgrad" and "wgrad", have operands that are not
    cast; with "swiglu" neither is what is kept of SwiGLU's input. Weights must be kept in two orientations."""
    unknown = set(parts) - set(UNCAST.values())
    if unknown:
        raise ValueError(f"without_casts: parts must be of {', '.join(UNCAST.values())}, got {', '.join(unknown)}")
    cast, norm_cast = ops.quantize_1x128, ops.rms_norm_quantize_1x128
    swiglu_cast, swiglu_backward_cast = ops.swiglu_quantize_1x128, ops.swiglu_backward_quantize_1x128

    def columns(rows: Tensor, q_t: QuantTensor) -> QuantTensor:
        return _uncast(rows.t()) if "wgrad" in parts else q_t

    def quantize_1x128(
        x_TD: Tensor, *, layout: GroupLayout | None = None, rows_P: Tensor | None = None, **options: Any
    ) -> Any:
        found = cast(x_TD, layout=layout, rows_P=rows_P, **options)
        rows = _rows(x_TD.detach(), layout, rows_P)
        if isinstance(found, QuantTensor):
            return _both(found, rows)
        return _both(found[0], rows), columns(rows, found[1])

    def rms_norm_quantize_1x128(x_TD: Tensor, weight_D: Tensor, eps: float, **options: Any) -> NormQuant:
        found = norm_cast(x_TD, weight_D, eps, **options)
        rows = ops.rms_norm(x_TD.detach(), weight_D.detach(), eps)
        return replace(found, q=_both(found.q, rows), q_t=None if found.q_t is None else columns(rows, found.q_t))

    def swiglu_quantize_1x128(gate_up: Tensor, **options: Any) -> QuantTensor:
        with mock.patch.object(reference, "quantize_1x128", _itself):
            rows = _swiglu_quantize(gate_up, **options)
        return _both(swiglu_cast(gate_up, **options), rows.data)

    def swiglu_backward_quantize_1x128(gate_up: QuantTensor, grad_TF: Tensor, **options: Any) -> SwigluGradients:
        found = swiglu_backward_cast(_without_scales(gate_up), grad_TF, **options)
        with mock.patch.object(reference, "quantize_1x128", _itself):
            uncast = _swiglu_backward_quantize(gate_up, grad_TF, **options)
        rows = _both(found.gate_up, uncast.gate_up.data)
        of_weights = uncast if "wgrad" in parts else found
        return SwigluGradients(rows, of_weights.gate_up_t, of_weights.product_t, found.weight_T)

    def quantize_weight(w: Tensor, *, with_transpose: bool = False) -> Any:
        if not with_transpose:
            raise ValueError("without_casts: train.weight_orientations must be 2, got 1")
        w, (q, q_t) = w.detach(), quantize_128x128(w, with_transpose=True)
        return _uncast(w) if "fprop" in parts else q, _uncast(w.mT) if "dgrad" in parts else q_t

    replaced: dict[str, Callable[..., Any]] = {
        "quantize_1x128": quantize_1x128,
        "rms_norm_quantize_1x128": rms_norm_quantize_1x128,
        "swiglu_quantize_1x128": swiglu_quantize_1x128,
        "swiglu_backward_quantize_1x128": swiglu_backward_quantize_1x128,
        **_products(_uncast_product),
    }
    with ExitStack() as stack:
        if not {"fprop", "dgrad"}.isdisjoint(parts):  # weights are cast by no optimizer
            replaced["quantize_128x128"] = quantize_weight
            stack.enter_context(mock.patch.object(Copies, "part", return_value=None))
        if "swiglu" in parts:
            stack.enter_context(mock.patch.object(fp8, "_as_kept", lambda gate_up, layout: _uncast(gate_up)))
        stack.enter_context(mock.patch.multiple(ops, **replaced))
        yield


def _uncast(x: Tensor) -> QuantTensor:
    """What stands where a cast would; its data are the numbers themselves, and may be saved for a backward as such."""
    return QuantTensor(x, x.new_empty(0, dtype=torch.float32), (1, TILE))


def _is_cast(q: QuantTensor) -> bool:
    return q.data.dtype == torch.float8_e4m3fn


def _both(q: QuantTensor, rows: Tensor) -> QuantTensor:
    return _Rows(q.data, q.scale, q.tile, rows)


def _without_scales(gate_up: Tensor | QuantTensor) -> Tensor | QuantTensor:
    return gate_up if isinstance(gate_up, Tensor) or _is_cast(gate_up) else gate_up.data


def _itself(
    x_TD: Tensor, pow2_scales: bool, with_transpose: bool, layout: GroupLayout | None
) -> tuple[QuantTensor, ...]:
    """In the place of the reference's quantize_1x128."""
    rows = _rows(x_TD, layout, None)
    return (_uncast(rows), _uncast(rows.t()))[: 1 + with_transpose]


def _uncast_product(x: QuantTensor, w: QuantTensor) -> Product | None:
    """The second operand says whether this product goes without casts."""
    if _is_cast(w):
        return None
    rows = x.uncast if isinstance(x, _Rows) else x.data
    return lambda of_x, of_w, dtype: _product(rows[of_x], w.data[of_w], dtype)


def _product(x_TD: Tensor, w_FD: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(T, F), summed in FP32."""
    if not x_TD.is_cuda or {x_TD.dtype, w_FD.dtype} != {torch.bfloat16}:
        return (x_TD.float() @ w_FD.float().t()).to(out_dtype)
    return torch.mm(x_TD, w_FD.t()) if out_dtype == torch.bfloat16 else torch.mm(x_TD, w_FD.t(), out_dtype=out_dtype)
