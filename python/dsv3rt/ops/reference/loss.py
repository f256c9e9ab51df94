"""Reference linear + cross-entropy in chunks of tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 22  # logits alive at once: 16 MiB in FP32


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad, and gradients cost most of the work
        h_TD, w_VD = h_TD.detach(), w_VD.detach()
    return cast(Tensor, LinearCrossEntropy.apply(h_TD, w_VD, labels_T, ignore_index, z_loss))


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken chunk by chunk during forward, so that no logits outlive their chunk."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        wide = torch.promote_types(torch.promote_types(h_TD.dtype, w_VD.dtype), torch.float32)
        w = w_VD.to(wide)
        kept_T = labels_T != ignore_index
        target_T = torch.where(kept_T, labels_T, 0)
        count = kept_T.sum().clamp(min=1)
        dh = torch.empty_like(h_TD) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        loss = w.new_zeros(())
        for part in _chunks(h_TD.shape[0], w.shape[0]):
            h = h_TD[part].to(wide)
            logits = h @ w.t()
            lse = torch.logsumexp(logits, dim=1)
            losses = lse - logits.gather(1, target_T[part, None]).squeeze(1) + z_loss * lse.square()
            loss += torch.where(kept_T[part], losses, 0.0).sum()
            if dh is None and dw is None:
                continue
            dlogits = _gradient(logits, lse, target_T[part], z_loss).masked_fill_(~kept_T[part, None], 0.0).div_(count)
            if dh is not None:
                dh[part] = dlogits @ w
            if dw is not None:
                dw.addmm_(dlogits.t(), h)
        ctx.save_for_backward(dh, None if dw is None else dw.to(w_VD.dtype))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        return _scaled(dh, dloss), _scaled(dw, dloss), None, None, None


def _chunks(num_tokens: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // max(1, vocab))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _gradient(logits: Tensor, lse: Tensor, target: Tensor, z_loss: float) -> Tensor:
    """Of each token's loss to its logits, which it overwrites."""
    dlogits = logits.sub_(lse.unsqueeze(1)).exp_()
    if z_loss:
        dlogits *= (1 + 2 * z_loss * lse).unsqueeze(1)
    dlogits[torch.arange(len(target), device=target.device), target] -= 1.0
    return dlogits


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * factor.to(gradient.dtype)
