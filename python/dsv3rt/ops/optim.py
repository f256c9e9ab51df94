"""The optimizer's fused update."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.checks import check_same_device, check_tensor, require
from dsv3rt.ops.reference import optim as reference
from dsv3rt.ops.types import AdamWHyper

_STORED = (torch.bfloat16, torch.float32)


def adamw_step(
    master: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    hyper: AdamWHyper,
    step: int,
    grad_scale: Tensor | float = 1.0,
    param: Tensor | None = None,
) -> None:
    """One AdamW update of a parameter, in place: decoupled weight decay, bias correction.

    Args:
        master: fp32, any shape; updated.
        grad: bf16 or fp32 of master's shape; not changed.
        m: first moment, bf16 or fp32; updated.
        v: second moment, bf16 or fp32; updated.
        hyper: learning rate and the rest, for this step.
        step: number of this update, from 1.
        grad_scale: multiplies grad first; a number, or a tensor of one element on master's device.
        param: the model's copy, bf16 or fp32, of master's shape; overwritten with the new master. It may be master.
    Raises:
        ValueError: shape or step.
        TypeError: dtype outside the above.
    Numerics: fp32; this step uses the moments before they are rounded (to nearest even) to their own dtype.
    Source: arXiv 1711.05101; DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.3 for BF16 moments.
    """
    op = "adamw_step"
    shape = tuple(master.shape)
    check_tensor(op, "master", master, shape, (torch.float32,))
    for name, tensor in (("grad", grad), ("m", m), ("v", v)):
        check_tensor(op, name, tensor, shape, _STORED)
    if param is not None:
        check_tensor(op, "param", param, shape, _STORED)
    check_same_device(op, master=master, grad=grad, m=m, v=v, param=param)
    require(step >= 1, op, "step", "be at least 1", step)
    reference.adamw_step(master, grad, (m, v), hyper, step, grad_scale)
    if param is not None:
        param.detach().copy_(master)
