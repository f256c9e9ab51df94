"""A stored tensor to the dtype of a format, piece by piece so that temporaries stay small beside a shard."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.hf.layout import TensorSpec
from dsv3rt.ops.quant import BLOCK_TILE
from dsv3rt.ops.types import TILE, QuantTensor

FORMATS = ("bf16", "fp8")
_PIECE_ELEMENTS = 1 << 18


def check_format(op: str, fmt: str, pow2_scales: bool) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"{op}: fmt must be {' or '.join(map(repr, FORMATS))}, got {fmt!r}")
    if pow2_scales and fmt != "fp8":
        raise ValueError(f"{op}: pow2_scales must be False with fmt {fmt!r}, which has no scales")


def are_pow2(scale: Tensor) -> bool:
    """Whether every scale is a power of two, as E8M0 holds them."""
    return bool((torch.frexp(scale).mantissa == 0.5).all())


def stored_dtypes(spec: TensorSpec, fmt: str) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(key, shape, dtype) of what a checkpoint in `fmt` holds for a tensor: itself, and its scales where it is FP8."""
    if spec.role == "linear" and fmt == "fp8":
        return [
            (spec.key, spec.shape, torch.float8_e4m3fn),
            (spec.scale_key, spec.scale_shape, torch.float32),
        ]
    return [(spec.key, spec.shape, torch.float32 if spec.role == "bias" else torch.bfloat16)]


def encode(
    spec: TensorSpec, data: Tensor, scale: Tensor | None, fmt: str, pow2_scales: bool = False
) -> list[tuple[str, Tensor]]:
    """The tensors of `stored_dtypes`. FP8 data with its scales stays as it is in an FP8 checkpoint, bit for bit.

    Quantisation starts from the BF16 value, so that an FP8 checkpoint of a model is the FP8 conversion of its BF16
    checkpoint, and so that FP8, read back and quantised again, is the same FP8: the largest value of a block is a BF16
    number, which dequantises to itself. `pow2_scales`: scales are powers of two; FP8 whose scales are not is quantised
    anew.
    """
    dtypes = [dtype for _, _, dtype in stored_dtypes(spec, fmt)]
    if len(dtypes) == 1:
        return [(spec.key, data.to(dtypes[0]) if scale is None else _decode(data, scale, dtypes[0]))]
    if scale is not None:
        if not pow2_scales or are_pow2(scale):
            return [(spec.key, data), (spec.scale_key, scale)]
        data = _decode(data, scale, torch.bfloat16)
    quantized = torch.empty(spec.shape, dtype=dtypes[0])
    scales = torch.empty(spec.scale_shape, dtype=dtypes[1])
    for rows in _pieces(spec.shape):
        q = _quantize(data[rows].to(device="cpu", dtype=torch.bfloat16), pow2_scales)
        quantized[rows] = q.data
        scales[rows.start // TILE : rows.start // TILE + len(q.scale)] = q.scale
    return [(spec.key, quantized), (spec.scale_key, scales)]


def _quantize(w_FD: Tensor, pow2_scales: bool) -> QuantTensor:
    q = ops.quantize_128x128(w_FD, pow2_scales=pow2_scales)
    if not pow2_scales:
        return q
    # A block's largest value may round to 224, half of what E4M3 holds: half the scale then says the same numbers, and
    # is what quantising them again gives. Written this way from the start, they keep their bits when they come back.
    return ops.quantize_128x128(ops.dequantize(q, torch.bfloat16), pow2_scales=True)


def _decode(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(data.shape, dtype=dtype)
    decode_into(result, data, scale)
    return result


def decode_into(target: Tensor, data: Tensor, scale: Tensor | None) -> None:
    """Write what `data` (with its scales where it is FP8) stands for into `target`, cast to its dtype."""
    if scale is None:
        target.copy_(data)
        return
    dtype = target.dtype if target.dtype in (torch.bfloat16, torch.float64) else torch.float32
    for rows in _pieces(tuple(data.shape)):
        blocks = slice(rows.start // TILE, -(-rows.stop // TILE))
        target[rows] = ops.dequantize(QuantTensor(data[rows], scale[blocks], BLOCK_TILE), dtype).to(target.device)


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of whole blocks of rows, about _PIECE_ELEMENTS each."""
    rows, columns = shape
    step = max(_PIECE_ELEMENTS // columns // TILE, 1) * TILE
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
