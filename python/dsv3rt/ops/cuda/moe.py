"""Kernels around experts on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.cuda.rows import VECTOR_BYTES
from dsv3rt.ops.types import ceil_div, empty_row_scales

TOKENS_OF_PART, MAX_PARTS = 64, 256  # of sequences, for the balance loss: a block takes a part


def route(logits_TE: Tensor, bias_E: Tensor, groups: tuple[int, int], top_k: int, *, scale: float,
          renormalize: bool) -> list[Tensor]:  # fmt: skip
    """[idx, weight, scores, counts]; `groups`: how many there are, and how many a token may use."""
    T, E = logits_TE.shape
    device = logits_TE.device
    idx_TK = torch.empty((T, top_k), dtype=torch.int64, device=device)
    weight_TK = torch.empty((T, top_k), dtype=torch.float32, device=device)
    scores_TE = torch.empty((T, E), dtype=torch.float32, device=device)
    counts_E = torch.empty(E, dtype=torch.int64, device=device)
    load().route(
        _packed(logits_TE),
        _packed(bias_E),
        idx_TK,
        weight_TK,
        scores_TE,
        counts_E,
        num_groups=groups[0],
        groups_kept=groups[1],
        scale=scale,
        renormalize=renormalize,
    )
    return [idx_TK, weight_TK, scores_TE, counts_E]


def route_backward(
    grads: tuple[Tensor, Tensor | None],
    scores_TE: Tensor,
    idx_TK: Tensor,
    dtype: torch.dtype,
    *,
    scale: float,
    renormalize: bool,
) -> Tensor:
    """The gradient of the logits, from those of weights and scores."""
    logits_grad = torch.empty(scores_TE.shape, dtype=dtype, device=scores_TE.device)
    weight_grad, scores_grad = (None if grad is None else _packed(grad) for grad in grads)
    load().route_backward(
        weight_grad,
        scores_grad,
        _packed(scores_TE),
        idx_TK.contiguous(),
        logits_grad,
        scale=scale,
        renormalize=renormalize,
    )
    return logits_grad


def balance_loss(scores_TE: Tensor, idx_TK: Tensor, cu_seqlens: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The loss, and its slope (B, E) by the normalised scores of a sequence's tokens."""
    T, E = scores_TE.shape
    num_sequences = cu_seqlens.shape[0] - 1
    sequences = max(num_sequences, 1)
    parts = max(min(ceil_div(T, TOKENS_OF_PART * sequences), MAX_PARTS // sequences), 1)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=scores_TE.device)

    loss, slope_BE = floats(1), floats(num_sequences, E)
    load_parts = torch.empty((num_sequences, parts, E), dtype=torch.int32, device=scores_TE.device)
    tickets = torch.empty(num_sequences + 1, dtype=torch.int32, device=scores_TE.device)
    load().balance_loss(
        _packed(scores_TE),
        idx_TK.contiguous(),
        cu_seqlens.contiguous(),
        loss,
        slope_BE,
        floats(num_sequences),
        floats(num_sequences, parts, E),
        load_parts,
        tickets,
        alpha=alpha,
    )
    return loss.squeeze(0), slope_BE


def balance_loss_backward(grad: Tensor, scores_TE: Tensor, slope_BE: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient of the scores."""
    scores_grad = torch.empty(scores_TE.shape, dtype=torch.float32, device=scores_TE.device)
    load().balance_loss_backward(
        grad.reshape(1), _packed(scores_TE), _packed(slope_BE), cu_seqlens.contiguous(), scores_grad
    )
    return scores_grad


def place(idx_TK: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts and offsets of the segments, and each choice's row."""
    kernels = load()
    device = idx_TK.device
    row_of_TK = torch.empty(idx_TK.shape, dtype=torch.int64, device=device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    partial = torch.empty(kernels.max_place_blocks * num_experts, dtype=torch.int32, device=device)
    kernels.place(idx_TK.contiguous(), row_of_TK, counts, offsets, partial, block=block)
    return counts, offsets, row_of_TK


def permute(
    x: Tensor, scale: Tensor | None, row_of_TK: Tensor, segments: tuple[Tensor, Tensor], num_rows: int
) -> list[Tensor]:
    """[rows] or [rows, their scales]; what lies behind the last segment is not written."""
    rows = torch.empty((num_rows, x.shape[1]), dtype=x.dtype, device=x.device)
    data, target = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (_packed(x), rows))
    row_of_TK = row_of_TK.contiguous()
    if scale is None:
        load().permute(data, row_of_TK, *segments, target)
        return [rows]
    rows_scale = empty_row_scales(num_rows, scale.shape[1], x.device)
    packed_scale = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
    token_of_row = torch.empty(num_rows, dtype=torch.int32, device=x.device)
    load().permute(
        data,
        row_of_TK,
        *segments,
        target,
        scale=scale,
        rows_scale=rows_scale,
        packed_scale=packed_scale,
        token_of_row=token_of_row,
    )
    return [rows, rows_scale]


def unpermute(rows_PD: Tensor, weight_TK: Tensor | None, row_of_TK: Tensor) -> Tensor:
    """(T, D)."""
    y_TD = torch.empty((row_of_TK.shape[0], rows_PD.shape[1]), dtype=rows_PD.dtype, device=rows_PD.device)
    weight_TK = None if weight_TK is None else weight_TK.contiguous()
    load().unpermute(_packed(rows_PD), weight_TK, row_of_TK.contiguous(), y_TD)
    return y_TD


def unpermute_backward(
    dy_TD: Tensor,
    rows_PD: Tensor | None,
    weight_TK: Tensor | None,
    row_of_TK: Tensor,
    segments: tuple[Tensor, Tensor],
    num_rows: int,
) -> list[Tensor]:
    """[gradient of the rows] and, where rows are given, that of the weights."""
    rows_grad = torch.empty((num_rows, dy_TD.shape[1]), dtype=dy_TD.dtype, device=dy_TD.device)
    weight_grad = None
    if rows_PD is not None:
        weight_grad = torch.empty(row_of_TK.shape, dtype=torch.float32, device=dy_TD.device)
        rows_PD = _packed(rows_PD)
    weight_TK = None if weight_TK is None else weight_TK.contiguous()
    load().unpermute_backward(
        _packed(dy_TD), rows_PD, weight_TK, row_of_TK.contiguous(), *segments, rows_grad, weight_grad
    )
    return [rows_grad] if weight_grad is None else [rows_grad, weight_grad]


def _packed(x: Tensor) -> Tensor:
    """Contiguous, on 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % VECTOR_BYTES == 0 else x.clone()
