"""The language-model head and its loss in one op."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.checks import FLOATS, check_same_device, check_tensor, require
from dsv3rt.ops.reference import loss as reference
from dsv3rt.ops.registry import register

KERNEL_MAX_VOCAB = 262144


def _on_cpu(
    h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, z_loss: float, with_dh: bool, with_dw: bool
) -> list[Tensor]:
    return reference.linear_cross_entropy(h, w, labels, ignore_index, z_loss, with_dh=with_dh, with_dw=with_dw)


def _on_cuda(
    h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, z_loss: float, with_dh: bool, with_dw: bool
) -> list[Tensor]:
    if h.dtype != torch.bfloat16 or w.dtype != torch.bfloat16 or not 0 < w.shape[0] <= KERNEL_MAX_VOCAB:
        return _on_cpu(h, w, labels, ignore_index, z_loss, with_dh, with_dw)
    from dsv3rt.ops.cuda import loss as cuda

    return cuda.linear_cross_entropy(h, w, labels, ignore_index, z_loss, with_dh=with_dh, with_dw=with_dw)


def _fake(
    h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, z_loss: float, with_dh: bool, with_dw: bool
) -> list[Tensor]:
    wide = torch.promote_types(torch.promote_types(h.dtype, w.dtype), torch.float32)
    gradients = [torch.empty_like(x) for x, wanted in ((h, with_dh), (w, with_dw)) if wanted]
    return [h.new_empty((), dtype=wide), *gradients]


_linear_cross_entropy = register(
    "linear_cross_entropy(Tensor h, Tensor w, Tensor labels, int ignore_index, float z_loss, bool with_dh,"
    " bool with_dw) -> Tensor[]",
    cpu=_on_cpu,
    cuda=_on_cuda,
    fake=_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken in the forward pass, where the logits are."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        ctx.wanted = ctx.needs_input_grad[:2]
        loss, *gradients = _linear_cross_entropy(h_TD, w_VD, labels_T, ignore_index, z_loss, *ctx.wanted)
        ctx.save_for_backward(*gradients)
        return cast(Tensor, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # The weight gradient is the largest tensor of a step: the saved one is used up unless the graph stays.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = iter([_scaled(gradient, dloss, in_place=not keep) for gradient in ctx.saved_tensors])
        dh, dw = (next(scaled) if wanted else None for wanted in ctx.wanted)
        return dh, dw, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    factor = factor.to(gradient.dtype)
    return gradient.mul_(factor) if in_place else gradient * factor


def linear_cross_entropy(
    h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean over the kept labels of cross_entropy(h w^T, label) + z_loss * logsumexp^2. Differentiable to h and w.

    Args:
        h_TD: bf16, fp32 or fp64.
        w_VD: any of these dtypes.
        labels_T: int64 in 0..V, or ignore_index.
        ignore_index: tokens with this label count neither in the sum nor in the mean.
        z_loss: factor of the squared logsumexp, not negative.
    Returns:
        a scalar, fp32 (fp64 when h or w is fp64); 0 when every label is ignored.
    Raises:
        ValueError: shape, z_loss, or (CPU) a label outside the vocabulary.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: fp32 logits, a chunk of tokens at a time; gradients are computed in the forward pass and kept. The kernel
        runs on CUDA for h and w in bf16 and V up to 262144; it rounds the gradients of the logits to bf16, gives NaN
        for a label outside the vocabulary, and is bitwise repeatable. Everything else is the reference.
    """
    op = "linear_cross_entropy"
    check_tensor(op, "h_TD", h_TD, (None, None), FLOATS)
    check_tensor(op, "w_VD", w_VD, (None, h_TD.shape[1]), FLOATS)
    check_tensor(op, "labels_T", labels_T, (h_TD.shape[0],), (torch.int64,))
    check_same_device(op, h_TD=h_TD, w_VD=w_VD, labels_T=labels_T)
    require(z_loss >= 0, op, "z_loss", "not be negative", z_loss)
    if labels_T.device.type == "cpu":  # elsewhere looking at labels would wait for the device
        V = w_VD.shape[0]
        wrong = labels_T[((labels_T < 0) | (labels_T >= V)) & (labels_T != ignore_index)]
        require(wrong.numel() == 0, op, "labels_T", f"be in 0..{V - 1} or {ignore_index}", wrong[:1].tolist())
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad, and gradients cost most of the work
        h_TD, w_VD = h_TD.detach(), w_VD.detach()
    return cast(Tensor, _LinearCrossEntropy.apply(h_TD, w_VD, labels_T, ignore_index, z_loss))
