"""Rows as kernels read them: columns contiguous, each row's start on 16 bytes."""

from __future__ import annotations

from torch import Tensor

VECTOR_BYTES = 16


def aligned(x: Tensor) -> Tensor:
    """x itself where it is laid out so, also as a slice of wider rows; else a copy."""
    fits = x.data_ptr() % VECTOR_BYTES == 0 and (x.shape[-1] <= 1 or x.stride(-1) == 1)
    strides = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    if fits and all(stride * x.element_size() % VECTOR_BYTES == 0 for stride in strides):
        return x
    return x.clone() if x.is_contiguous() else x.contiguous()
