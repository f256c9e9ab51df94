"""Values that ops exchange, and the layout of row-wise scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128


@dataclass(frozen=True)
class QuantTensor:
    """A block-scaled FP8 tensor: `x ~ data * scale`, one scale per `tile` of the last two dimensions.

    data: (..., r, c) float8_e4m3fn. scale: (..., ceil(r / tile[0]), ceil(c / tile[1])) float32.
    tile (1, 128): scales lie with rows contiguous, stride (1, round_up(r, 4)), which is the GEMM's layout.
    tile (128, 128): scales contiguous.
    """

    data: Tensor
    scale: Tensor
    tile: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device


@dataclass(frozen=True)
class GroupLayout:
    """Where each expert's rows lie in an expert-major buffer of P rows; both tensors int32 on the device.

    Group g owns rows offsets[g] .. offsets[g] + counts_X[g]; up to offsets[g + 1] is padding.
    """

    counts_X: Tensor
    offsets: Tensor

    @classmethod
    def of_capacity(cls, counts_X: Tensor, capacity: int) -> GroupLayout:
        """The masked layout of decoding: a buffer (X, capacity, ...) taken as X * capacity rows.

        Each expert fills the first counts_X[g] of its rows. Nothing is read back, so it suits a CUDA graph.

        Raises:
            ValueError: capacity that is no positive multiple of 128, the row block of the grouped products.
            TypeError: counts_X of another dtype than int32.
        """
        if capacity <= 0 or capacity % TILE:
            raise ValueError(f"GroupLayout: capacity must be a positive multiple of {TILE}, got {capacity}")
        if counts_X.dtype != torch.int32:
            raise TypeError(f"GroupLayout: counts_X must be int32, got {str(counts_X.dtype).removeprefix('torch.')}")
        offsets = torch.arange(counts_X.numel() + 1, dtype=torch.int32, device=counts_X.device) * capacity
        return cls(counts_X, offsets)


@dataclass(frozen=True)
class SwigluGradients:
    """What `swiglu_backward_quantize_1x128` returns; F is the width of gate and of up.

    gate_up: (T, 2F) by rows; gate_up_t: (2F, Tp), its columns. product_t: (F, Tp), silu(gate) * up by columns, or None.
    weight_T: float32 gradient of the row weights, or None.
    """

    gate_up: QuantTensor
    gate_up_t: QuantTensor
    product_t: QuantTensor | None
    weight_T: Tensor | None


@dataclass(frozen=True)
class NormQuant:
    """What `rms_norm_quantize_1x128` returns.

    sum_TD: x + residual, or None without a residual. y_TD: the normed rows, or None. q: them by rows; q_t: by columns,
    or None. rstd_T: float32 1 / sqrt(mean(square) + eps) of each row.
    """

    sum_TD: Tensor | None
    y_TD: Tensor | None
    q: QuantTensor
    q_t: QuantTensor | None
    rstd_T: Tensor


@dataclass(frozen=True)
class Permutation:
    """How `permute` placed rows: row_of_TK[t, k] is the row of token t's k-th choice; num_rows is P.

    layout: the segments they lie in, where there are any.
    """

    row_of_TK: Tensor
    num_rows: int
    layout: GroupLayout | None = None


@dataclass(frozen=True)
class Routing:
    """idx_TK int64 chosen experts; weight_TK float32 gates; scores_TE float32 sigmoid scores; counts_E int64 loads."""

    idx_TK: Tensor
    weight_TK: Tensor
    scores_TE: Tensor
    counts_E: Tensor


@dataclass(frozen=True)
class EpLimits:
    """What the window of an expert exchange is sized for: the most tokens of any rank, their choices and their width.

    num_sms: how many SMs a dispatch or a combine uses; 0: as many as the way between the ranks wants.
    timeout_s: after which a wait for a peer is an error.
    low_latency: with room for the form of that name, `ep_send` and what follows it; for ranks of one node.
    max_rows: of each of the two rooms that windows have for `ep_dispatch_with_weights`: the capacities of all such
        exchanges that are under way together; 0: it is not used. For ranks of one node.
    """

    max_tokens: int
    top_k: int
    num_columns: int
    num_sms: int = 0
    timeout_s: float = 100.0
    low_latency: bool = False
    max_rows: int = 0


@dataclass(frozen=True)
class EpRoute:
    """What `ep_dispatch` did with choices of shape (T, K), for its combine and for both backwards.

    layout: of the local experts' rows. Bodies of the op keep more in classes of their own.
    """

    layout: GroupLayout
    shape_TK: tuple[int, int]


@dataclass(frozen=True)
class AdamWHyper:
    """AdamW's numbers for one step of one parameter; weight decay is decoupled (lr * weight_decay * master)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class AdamWSlot:
    """One parameter in `adamw_step`: tensors of one shape, updated in place but for the gradient.

    master: float32. grad: bfloat16 or float32. m, v: the moments, both bfloat16 or both float32.
    param: the model's copy, bfloat16 or float32, overwritten with the new master; None where that is the master itself.
    cast: instead of `param`, what `quantize_128x128` makes of the new master, rounded to bfloat16: w of the master's
        shape, (R, C) or (X, R, C), contiguous, and w^T, columns of a wider matrix perhaps, or None; overwritten.
    seed: BF16 moments are rounded up or down at random, a function of (seed, step, element); None: to nearest even.
    """

    master: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    param: Tensor | None = None
    seed: int | None = None
    cast: tuple[QuantTensor, QuantTensor | None] | None = None


def ceil_div(value: int, unit: int) -> int:
    return (value + unit - 1) // unit


def round_up(value: int, unit: int) -> int:
    return ceil_div(value, unit) * unit


def empty_row_scales(rows: int, tiles: int, device: torch.device | str) -> Tensor:
    """Uninitialised (rows, tiles) float32 scales in the GEMM's layout: stride (1, round_up(rows, 4)), the pad zero.

    Four-row alignment of the leading dimension is what TMA asks of a float32 tensor (16 bytes).
    """
    padded = round_up(rows, 4)
    if rows == padded:
        return torch.empty_strided((rows, tiles), (1, rows), dtype=torch.float32, device=device)
    storage = torch.empty(tiles, padded, dtype=torch.float32, device=device)
    storage[:, rows:].zero_()
    return storage.t()[:rows]
