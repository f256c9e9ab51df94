"""Products in FP8: forward, input gradient and weight gradient, each with operands cast in tiles (docs/precision.md).

Of its input a product keeps the 128x1 tiles alone, in FP8; its weight gradient is added to an FP32 sum in place
(`layers/main_grad.py`), at once or, with a ledger that defers, later. Source: DeepSeek-V3 report (arXiv 2412.19437)
sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3rt import ops
from dsv3rt.layers import main_grad
from dsv3rt.layers.ledger import Ledger
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.weights import Cast, Stack, transposed
from dsv3rt.ops.norm import KERNEL_WIDTHS
from dsv3rt.ops.types import GroupLayout, Permutation, QuantTensor


def linear(x_TD: Tensor, stack: Stack, ledger: Ledger | None, *, keep_input: bool) -> Tensor:
    """x @ w^T for weights stacked along their rows, (T, D) -> (T, F) in x's dtype.

    keep_input: keep x itself for the weight gradient instead of its FP8 tiles, as somebody else keeps it anyway. For
        the output of attention (the paper's exception: it keeps more bits of that); scales are then powers of two.
    """
    job = _LinearJob.of(stack, ledger, keep_input=keep_input)
    return cast(Tensor, _Linear.apply(x_TD, job, *stack[1]))


def norm_linear(x_TD: Tensor, norm: RMSNorm, stack: Stack, ledger: Ledger | None) -> Tensor:
    """`linear` of norm(x), which is never written in more than FP8; to the bit the same numbers and gradients."""
    if x_TD.dtype != torch.bfloat16 or (x_TD.is_cuda and x_TD.shape[1] not in KERNEL_WIDTHS):
        return linear(norm(x_TD), stack, ledger, keep_input=False)
    job = _LinearJob.of(stack, ledger, keep_input=False)
    return cast(Tensor, _NormLinear.apply(x_TD, norm.weight, norm.eps, job, *stack[1]))


def swiglu_mlp(
    x_TD: Tensor,
    up: Stack,
    down: Stack,
    ledger: Ledger | None,
    layout: GroupLayout | None = None,
    gates: Gather | Weighed | None = None,
) -> Tensor:
    """down(silu(gate x) * up x), (T, D) -> (T, D) in x's dtype.

    The input of SwiGLU is kept in FP8, its output computed again in the backward.

    up: gate and up, stacked in this order: (2F, D) in all, or (X, 2F, D). down: (D, F) or (X, D, F).
    layout: of rows grouped by expert, in segments of multiples of 128; None: one expert for all. Padding rows of the
        result, and of the gradient, are unspecified on CUDA.
    gates: multiply the output of SwiGLU, so that no result of an expert is kept for their gradient. With a `Gather` x
        are tokens, of which the experts' rows are made, and so is the result, (T, D): no row is written in more than
        FP8.
    """
    weights = (*up[1], *down[1])
    job = _MlpJob(up[0].of(*up[1]), down[0].of(*down[1]), _trained(weights), ledger, layout, gates)
    return cast(Tensor, _SwigluMlp.apply(x_TD, None if gates is None else gates.values, job, *weights))


@dataclass(frozen=True)
class Gather:
    """Which tokens the rows of a layout are, and what each choice of an expert weighs: gate_TK FP32."""

    permutation: Permutation
    gate_TK: Tensor

    @property
    def values(self) -> Tensor:
        return self.gate_TK

    def by_rows(self) -> tuple[Tensor, Tensor]:
        """int32 (P,) and FP32 (P,): the token of each row and its gate; 0 for padding."""
        T, K = self.gate_TK.shape
        tokens = torch.arange(T, dtype=torch.int32, device=self.gate_TK.device).repeat_interleave(K)
        return self._by_rows(tokens), self._by_rows(self.gate_TK.detach().flatten())

    def room(self, backward: bool) -> None:
        """Rows may be anywhere: they are added up at once."""

    def of_tokens(self, rows_PD: Tensor) -> Tensor:
        """(T, D): each token's rows added up."""
        return ops.unpermute(rows_PD, self.permutation, None)

    def gradient(self, of_rows_P: Tensor) -> Tensor:
        """(T, K), as `values`."""
        return of_rows_P[self.permutation.row_of_TK]

    def _by_rows(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.permutation.num_rows).index_copy_(0, self.permutation.row_of_TK.flatten(), values)


@dataclass(frozen=True)
class Weighed:
    """What each row of a layout weighs: gate_P FP32.

    room: where results (False) or gradients of x (True) are to be written; None: anywhere.
    """

    gate_P: Tensor
    room: Callable[[bool], Tensor | None]

    @property
    def values(self) -> Tensor:
        return self.gate_P

    def by_rows(self) -> tuple[None, Tensor]:
        """The rows are there, so no tokens are gathered; and the gate of each."""
        return None, self.gate_P.detach()

    def of_tokens(self, rows_PD: Tensor) -> Tensor:
        """The rows, which the exchange adds up."""
        return rows_PD

    def gradient(self, of_rows_P: Tensor) -> Tensor:
        """(P,), as `values`."""
        return of_rows_P


@dataclass(frozen=True)
class _LinearJob:
    """weights: those that get a gradient; empty without a backward."""

    cast: Cast
    weights: tuple[nn.Parameter, ...]
    ledger: Ledger | None
    keep_input: bool

    @classmethod
    def of(cls, stack: Stack, ledger: Ledger | None, *, keep_input: bool) -> Self:
        cast_weight, weights = stack
        return cls(cast_weight.of(*weights), _trained(weights), ledger, keep_input)

    def backward(self, dy_TF: Tensor, x_t: QuantTensor | None, dtype: torch.dtype, *, wants_dx: bool) -> Tensor | None:
        """Send the weight gradient on its way; x_t may be None without weights. Returns the input's."""
        dy, dy_t = ops.quantize_1x128(_with_contiguous_rows(dy_TF), with_transpose=True)
        if self.weights:
            assert x_t is not None
            product = _product(dy_t, x_t, None, _sms(self.ledger))
            _later(self.ledger, lambda: main_grad.accumulate(self.weights, product))
        return self.product(dy, transposed(self.cast), dtype) if wants_dx else None

    def product(self, x: QuantTensor, w: QuantTensor, dtype: torch.dtype) -> Tensor:
        return _rows_product(x, w, None, dtype, _sms(self.ledger))


class _Linear(torch.autograd.Function):
    """Gradients of the weights go past autograd: for them it gets None."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, job: _LinearJob, *weights: nn.Parameter) -> Tensor:
        ctx.job, ctx.dtype = job, x_TD.dtype
        if job.keep_input:
            q = ops.quantize_1x128(x_TD, pow2_scales=True)
            ctx.save_for_backward(x_TD)
        else:
            q, q_t = _by_rows_and_columns(x_TD, None, bool(job.weights))
            ctx.save_for_backward(*_tensors(q_t))
        return job.product(q, job.cast[0], x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        job: _LinearJob = ctx.job
        x_t = None
        if job.weights:
            x_t = _columns_of(*ctx.saved_tensors) if job.keep_input else _quant(*ctx.saved_tensors)
        dx = job.backward(dy_TF, x_t, ctx.dtype, wants_dx=ctx.needs_input_grad[0])
        return dx, None, *(None for _ in range(len(ctx.needs_input_grad) - 2))


class _NormLinear(torch.autograd.Function):
    """Saves x, the root of each row, and the normed rows by columns in FP8."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, norm_weight: Tensor, eps: float, job: _LinearJob, *weights: nn.Parameter
    ) -> Tensor:
        ctx.job = job
        normed = ops.rms_norm_quantize_1x128(x_TD, norm_weight, eps, with_transpose=bool(job.weights))
        ctx.save_for_backward(x_TD, norm_weight, normed.rstd_T, *_tensors(normed.q_t))
        return job.product(normed.q, job.cast[0], x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        job: _LinearJob = ctx.job
        x_TD, norm_weight, rstd_T, *kept = ctx.saved_tensors
        x_t = _quant(*kept) if job.weights else None
        dnormed = job.backward(dy_TF, x_t, x_TD.dtype, wants_dx=True)
        assert dnormed is not None
        dx, dnorm_weight = ops.rms_norm_backward(dnormed, x_TD, norm_weight, rstd_T)
        return dx, dnorm_weight.to(norm_weight.dtype), None, None, *(None for _ in ctx.needs_input_grad[4:])


@dataclass(frozen=True)
class _MlpJob:
    """weights: those of gate and up, then down's; empty without a backward."""

    up: Cast
    down: Cast
    weights: tuple[nn.Parameter, ...]
    ledger: Ledger | None
    layout: GroupLayout | None
    gates: Gather | Weighed | None

    def by_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Each row's token, where rows are gathered, and its gate, where there are gates."""
        return (None, None) if self.gates is None else self.gates.by_rows()

    def last_product(self, x: QuantTensor, w: QuantTensor, dtype: torch.dtype, *, backward: bool) -> Tensor:
        """Rows in their room, or each token's rows added up where rows are gathered."""
        if self.gates is None:
            return self.product(x, w, dtype)
        return self.gates.of_tokens(self.product(x, w, dtype, self.gates.room(backward)))

    def product(self, x: QuantTensor, w: QuantTensor, dtype: torch.dtype, out_PF: Tensor | None = None) -> Tensor:
        return _rows_product(x, w, self.layout, dtype, _sms(self.ledger), out_PF)

    def weight_gradient(self, dy_t: QuantTensor, x_t: QuantTensor) -> main_grad.Contribution:
        return _product(dy_t, x_t, self.layout, _sms(self.ledger))

    def gate_gradient(self, of_rows_P: Tensor | None) -> Tensor | None:
        if self.gates is None:
            return None
        assert of_rows_P is not None
        return self.gates.gradient(of_rows_P)


class _SwigluMlp(torch.autograd.Function):
    """Saves x by columns and the input of SwiGLU by rows, both in FP8, and what says which tokens the rows are."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gates: Tensor | None, job: _MlpJob, *weights: nn.Parameter) -> Tensor:
        ctx.job, ctx.dtype = job, x_TD.dtype
        trains = bool(job.weights)
        tokens_P, gates_P = job.by_rows()
        x, x_t = _by_rows_and_columns(x_TD, job.layout, trains, tokens_P)
        gate_up = job.product(x, job.up[0], torch.bfloat16)
        hidden = ops.swiglu_quantize_1x128(gate_up, weight_T=gates_P, layout=job.layout)
        kept = _as_kept(gate_up, job.layout) if trains else None
        ctx.save_for_backward(*_tensors(x_t), *_tensors(kept), tokens_P, gates_P)
        return job.last_product(hidden, job.down[0], x_TD.dtype, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        job: _MlpJob = ctx.job
        layout = job.layout
        *kept, tokens_P, gates_P = ctx.saved_tensors
        x_t, gate_up = _quant(*kept[:2]), _quant(*kept[2:])
        dy, dy_t = ops.quantize_1x128(_with_contiguous_rows(dy_TD), layout=layout, rows_P=tokens_P, with_transpose=True)
        dhidden = job.product(dy, transposed(job.down), torch.bfloat16)
        grads = ops.swiglu_backward_quantize_1x128(gate_up, dhidden, weight_T=gates_P, layout=layout, with_product=True)
        assert grads.product_t is not None
        down_product, up_product = (
            job.weight_gradient(*pair) for pair in ((dy_t, grads.product_t), (grads.gate_up_t, x_t))
        )
        _later(job.ledger, lambda: main_grad.accumulate(job.weights[-1:], down_product))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = job.last_product(grads.gate_up, transposed(job.up), ctx.dtype, backward=True)
        _later(job.ledger, lambda: main_grad.accumulate(job.weights[:-1], up_product))
        return dx, job.gate_gradient(grads.weight_T), None, *(None for _ in range(len(ctx.needs_input_grad) - 3))


def _trained(weights: tuple[nn.Parameter, ...]) -> tuple[nn.Parameter, ...]:
    """All, or none where no gradient is wanted of any."""
    trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    return weights if trains else ()


def _by_rows_and_columns(
    x_TD: Tensor, layout: GroupLayout | None, with_columns: bool, rows_P: Tensor | None = None
) -> tuple[QuantTensor, QuantTensor | None]:
    if with_columns:
        return ops.quantize_1x128(x_TD, layout=layout, rows_P=rows_P, with_transpose=True)
    return ops.quantize_1x128(x_TD, layout=layout, rows_P=rows_P), None


def _as_kept(gate_up: Tensor, layout: GroupLayout | None) -> QuantTensor:
    """The input of SwiGLU for the backward."""
    return ops.quantize_1x128(gate_up, layout=layout)


def _columns_of(x_TD: Tensor) -> QuantTensor:
    return ops.quantize_1x128(x_TD, pow2_scales=True, with_transpose=True)[1]


def _sms(ledger: Ledger | None) -> int:
    return 0 if ledger is None else ledger.product_sms


def _rows_product(
    x: QuantTensor,
    w: QuantTensor,
    layout: GroupLayout | None,
    dtype: torch.dtype,
    num_sms: int,
    out_PF: Tensor | None = None,
) -> Tensor:
    if layout is None:
        return ops.fp8_gemm_nt(x, w, out_dtype=dtype, num_sms=num_sms)
    return ops.m_grouped_fp8_gemm_nt(x, w, layout, out_dtype=dtype, out_PF=out_PF, num_sms=num_sms)


def _product(dy_t: QuantTensor, x_t: QuantTensor, layout: GroupLayout | None, num_sms: int) -> main_grad.Contribution:
    """dy^T x as a contribution: (F, D), or of each group (X, F, D)."""

    def contribute(so_far: Tensor | None) -> Tensor:
        if layout is not None:
            return ops.k_grouped_fp8_gemm_nt(dy_t, x_t, layout, accumulate_into=so_far, num_sms=num_sms)
        return ops.fp8_gemm_nt(dy_t, x_t, out_dtype=torch.float32, accumulate_into=so_far, num_sms=num_sms)

    return contribute


def _later(ledger: Ledger | None, call: Callable[[], None]) -> None:
    if ledger is None:
        call()
    else:
        ledger.at_weight_gradients(call)


def _with_contiguous_rows(dy: Tensor) -> Tensor:
    """Gradients of sums and broadcasts have strides of 0."""
    return dy if dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()


def _tensors(q: QuantTensor | None) -> tuple[Tensor, ...]:
    return () if q is None else (q.data, q.scale)


def _quant(data: Tensor, scale: Tensor) -> QuantTensor:
    return QuantTensor(data, scale, (1, 128))
