"""FP32 gradient sums of parameters whose products add their weight gradients in place: autograd sees none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

# Takes the sum so far and adds to it in place, or None and makes a new one; returns the sum.
Contribution = Callable[[Tensor | None], Tensor]


class MainGrad:
    """The sum of one parameter. `grad` is FP32 and of the parameter's shape, None before the first contribution."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None

    def added(self) -> None:
        """Called after each contribution; who waits for them overrides it."""


def attach(parameter: nn.Parameter, main_grad: MainGrad) -> None:
    """From now on contributions to `parameter` go to `main_grad`."""
    setattr(parameter, "main_grad", main_grad)  # noqa: B010  (mypy knows no attributes of parameters)


def of(parameter: nn.Parameter) -> MainGrad:
    """Where contributions to `parameter` go: what was attached, else a sum of its own, `parameter.main_grad`."""
    found = getattr(parameter, "main_grad", None)
    if found is None:
        found = MainGrad()
        attach(parameter, found)
    return cast(MainGrad, found)


@torch.no_grad()
def accumulate(parameters: Sequence[nn.Parameter], contribute: Contribution) -> None:
    """One contribution to parameters that lie on top of each other (along dimension 0) in one product.

    Their sums start as views of one tensor, so that later contributions add to all of them in one product as well.
    """
    sums = [of(parameter) for parameter in parameters]
    joined = _joined([one.grad for one in sums])
    if joined is not None:
        contribute(joined)
    else:
        parts = contribute(None).split([parameter.shape[0] for parameter in parameters])
        for one, part in zip(sums, parts, strict=True):
            one.grad = part if one.grad is None else one.grad.add_(part)
    for one in sums:
        one.added()


def _joined(grads: Sequence[Tensor | None]) -> Tensor | None:
    """The sums as one tensor, if they follow each other in memory."""
    found = [grad for grad in grads if grad is not None]
    if len(found) < len(grads):
        return None
    first = found[0]
    end = first.storage_offset()
    for grad in found:
        is_next = grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (is_next and grad.storage_offset() == end and grad.is_contiguous()):
            return None
        end += grad.numel()
    rows = sum(grad.shape[0] for grad in found)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
