"""Linear and cross-entropy on the GPU: the products are torch's (cuBLAS), what lies between them is one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.types import ceil_div, round_up

DLOGITS_BYTES = 1 << 30  # of the BF16 gradients alive at once; 4152 tokens of a vocabulary of 129280
SCRATCH_BYTES = 1 << 28  # of the FP32 logits alive at once, where the weight gradient's own memory is too small
FEW_ROWS = 512  # products of fewer tokens are slow

_mm_into = torch.ops.aten.mm.dtype_out  # FP32 sums of BF16 products


def linear_cross_entropy(
    h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore_index: int, z_loss: float, *, with_dh: bool, with_dw: bool
) -> list[Tensor]:
    """[loss], then the gradients of h and w that were asked for.

    Tokens are taken in groups, whose BF16 gradients are alive together so that one product makes of them a part of the
    weight gradient; inside a group in pieces, whose FP32 logits lie where the weight gradient is written afterwards.
    Only with several groups is there an FP32 weight gradient beside.
    """
    (T, D), V, width = h_TD.shape, w_VD.shape[0], round_up(w_VD.shape[0], 8)
    h_TD, w_VD = h_TD.contiguous(), w_VD.contiguous()
    count = (labels_T != ignore_index).sum().clamp(min=1)
    factor = count.float().reciprocal()
    losses = h_TD.new_empty(T, dtype=torch.float32)
    dh = torch.empty_like(h_TD) if with_dh else None
    group = _balanced(T, max(1, DLOGITS_BYTES // (2 * width))) if with_dw else max(1, T)
    storage = h_TD.new_empty(w_VD.numel() // 2 + 1 if with_dw else 0, dtype=torch.float32)
    scratch = _scratch(storage, min(group, FEW_ROWS), group, max(width, D))
    piece = _balanced(group, scratch.numel() // max(width, D))
    dlogits = h_TD.new_empty(group if with_dw else piece if with_dh else 0, width)
    gradient = _WeightGradient(storage, scratch, (V, D), groups=ceil_div(T, group)) if with_dw else None

    for start in range(0, T, group):
        end = min(start + group, T)
        for first in range(start, end, piece):
            rows = slice(first, min(first + piece, end))
            size = rows.stop - first
            logits = scratch[: size * width].view(size, width)[:, :V]
            _mm_into(h_TD[rows], w_VD.t(), torch.float32, out=logits)
            place = first - start if with_dw else 0
            out = dlogits[place : place + size, :V] if with_dh or with_dw else None
            load().softmax_loss(
                logits, labels_T[rows], factor, losses[rows], dlogits=out, ignore_index=ignore_index, z_loss=z_loss
            )
            if dh is not None:
                wide = scratch[: size * D].view(size, D)
                _mm_into(out, w_VD, torch.float32, out=wide)
                dh[rows] = wide
        if gradient is not None:
            gradient.add(dlogits[: end - start, :V], h_TD[start:end])
    loss = losses.sum() / count
    return [loss, *([] if dh is None else [dh]), *([] if gradient is None else [gradient.finish()])]


class _WeightGradient:
    """BF16 in `storage`. The scratch may be the same memory: it is written last."""

    def __init__(self, storage: Tensor, scratch: Tensor, shape: tuple[int, int], groups: int) -> None:
        V, D = shape
        self._result = storage.view(torch.bfloat16)[: V * D].view(V, D)
        self._scratch = scratch
        self._total = storage.new_empty(V, D) if groups > 1 else None
        self._parts = 0
        if groups == 0:
            self._result.zero_()

    def add(self, dlogits: Tensor, h: Tensor) -> None:
        self._parts += 1
        if self._total is None:
            torch.mm(dlogits.t(), h, out=self._result)
        elif self._parts == 1:
            _mm_into(dlogits.t(), h, torch.float32, out=self._total)
        else:
            self._add_in_pieces(self._total, dlogits, h)

    def finish(self) -> Tensor:
        if self._total is not None:
            self._result.copy_(self._total)
        return self._result

    def _add_in_pieces(self, total: Tensor, dlogits: Tensor, h: Tensor) -> None:
        V, D = total.shape
        piece = max(8, self._scratch.numel() // max(1, D) // 8 * 8)
        for first in range(0, V, piece):
            size = min(piece, V - first)
            part = self._scratch[: size * D].view(size, D)
            _mm_into(dlogits[:, first : first + size].t(), h, torch.float32, out=part)
            total[first : first + size] += part


def _balanced(total: int, limit: int) -> int:
    """The size of equal parts of `total` of at most `limit` each; at least 1."""
    return max(1, ceil_div(total, max(1, ceil_div(total, limit))))


def _scratch(storage: Tensor, least_rows: int, most_rows: int, width: int) -> Tensor:
    """FP32 scratch for rows of `width`: the storage itself if that is enough, else memory of its own."""
    if storage.numel() >= max(8, least_rows) * width:
        return storage
    rows = min(most_rows, SCRATCH_BYTES // (4 * width))
    return storage.new_empty(max(8, rows) * width)
