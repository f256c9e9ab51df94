"""Reference linear + cross-entropy in chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 22  # logits alive at once: 16 MiB in FP32


def linear_cross_entropy(
    h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore_index: int, z_loss: float, *, with_dh: bool, with_dw: bool
) -> list[Tensor]:
    """[loss], then the gradients of h and w that were asked for; no logits outlive their chunk."""
    wide = torch.promote_types(torch.promote_types(h_TD.dtype, w_VD.dtype), torch.float32)
    w = w_VD.to(wide)
    kept_T = labels_T != ignore_index
    target_T = torch.where(kept_T, labels_T, 0)
    count = kept_T.sum().clamp(min=1)
    dh = torch.empty_like(h_TD) if with_dh else None
    dw = torch.zeros_like(w) if with_dw else None
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
    return [loss / count, *([] if dh is None else [dh]), *([] if dw is None else [dw.to(w_VD.dtype)])]


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
