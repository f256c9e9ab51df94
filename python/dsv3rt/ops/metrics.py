"""Measures of how far two tensors are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import check_shape


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in fp64: 0 for equal tensors, 1 for orthogonal ones, 2 for opposite ones.

    Args:
        x: any shape and real dtype.
        y: of x's shape.
    Returns:
        a float; 0 when both are zero (or empty), NaN when either holds NaN or infinity.
    Raises:
        ValueError: shape.
    Source: DeepGEMM deep_gemm/testing/numeric.py calc_diff.
    """
    check_shape("calc_diff", "y", y, tuple(x.shape))
    x64, y64 = x.detach().to(torch.float64).flatten(), y.detach().to(torch.float64).flatten()
    total = float(x64 @ x64 + y64 @ y64)
    return 0.0 if total == 0 else 1.0 - 2.0 * float(x64 @ y64) / total
