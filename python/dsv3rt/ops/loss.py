"""The language-model head and its loss in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import FLOATS, check_same_device, check_tensor, require
from dsv3rt.ops.reference import loss as reference


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
    Numerics: fp32 logits, a chunk of tokens at a time; gradients are computed in the forward pass and kept.
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
    return reference.linear_cross_entropy(h_TD, w_VD, labels_T, ignore_index, z_loss)
