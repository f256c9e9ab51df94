"""Argument checks of the op surface: one line that names op, argument, rule and what was got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3rt.ops.types import GroupLayout, QuantTensor, ceil_div, round_up

FLOATS = (torch.bfloat16, torch.float32, torch.float64)
Shape = Sequence[int | None]


def require(condition: bool, op: str, argument: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {got}")


def check_dtype(op: str, argument: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{op}: {argument} must be {names}, got {dtype_name(tensor.dtype)}")


def check_shape(op: str, argument: str, tensor: Tensor, shape: Shape) -> None:
    """Every dimension equals its entry of `shape`; None stands for any size."""
    got = tuple(tensor.shape)
    if len(got) == len(shape) and all(want is None or want == size for want, size in zip(shape, got, strict=True)):
        return
    wanted = ", ".join("*" if want is None else str(want) for want in shape)
    if len(shape) == 1:
        wanted += ","
    raise ValueError(f"{op}: {argument} must have shape ({wanted}), got {got}")


def check_tensor(op: str, argument: str, tensor: Tensor, shape: Shape, dtypes: Sequence[torch.dtype]) -> None:
    check_dtype(op, argument, tensor, dtypes)
    check_shape(op, argument, tensor, shape)


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All of the named tensors lie on the device of the first."""
    first: tuple[str, torch.device] | None = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (argument, tensor.device)
        require(tensor.device == first[1], op, argument, f"be on {first[1]} like {first[0]}", tensor.device)


def check_quant(op: str, argument: str, q: QuantTensor, shape: Shape, tiles: Sequence[tuple[int, int]]) -> None:
    """Data E4M3 of `shape` and contiguous, one of the given tiles, scales of that tile's shape and layout."""
    check_tensor(op, f"{argument}.data", q.data, shape, (torch.float8_e4m3fn,))
    require(q.data.is_contiguous(), op, f"{argument}.data", "be contiguous", f"stride {q.data.stride()}")
    require(q.tile in tiles, op, f"{argument}.tile", "be " + " or ".join(map(str, tiles)), q.tile)
    *leading, rows, columns = q.data.shape
    scale_shape = (*leading, ceil_div(rows, q.tile[0]), ceil_div(columns, q.tile[1]))
    check_tensor(op, f"{argument}.scale", q.scale, scale_shape, (torch.float32,))
    if q.tile[0] == 1:
        _check_row_scale_stride(op, f"{argument}.scale", q.scale)
    else:
        require(q.scale.is_contiguous(), op, f"{argument}.scale", "be contiguous", f"stride {q.scale.stride()}")


def _check_row_scale_stride(op: str, argument: str, scale: Tensor) -> None:
    rows, tiles = scale.shape[-2:]
    want = (1, round_up(rows, 4))
    got = scale.stride()[-2:]
    # The stride of a dimension of size 1 (or of an empty tensor) addresses nothing.
    good = scale.numel() == 0 or ((rows == 1 or got[0] == want[0]) and (tiles == 1 or got[1] == want[1]))
    require(good, op, argument, f"have stride {want}", got)


def check_layout(op: str, layout: GroupLayout, num_groups: int) -> None:
    check_tensor(op, "layout.counts_X", layout.counts_X, (num_groups,), (torch.int32,))
    check_tensor(op, "layout.offsets", layout.offsets, (num_groups + 1,), (torch.int32,))


def check_optional_layout(
    op: str, layout: GroupLayout | None, **tensors: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """counts and offsets, on the device of the tensors; (None, None) without a layout."""
    if layout is None:
        return None, None
    check_layout(op, layout, layout.counts_X.numel())
    check_same_device(op, **tensors, **{"layout.counts_X": layout.counts_X, "layout.offsets": layout.offsets})
    return layout.counts_X, layout.offsets


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
