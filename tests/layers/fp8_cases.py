"""What the tests of FP8 layers share, on the CPU and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3rt.layers import fp8, main_grad
from dsv3rt.layers.ledger import Ledger
from dsv3rt.layers.weights import WeightCast
from dsv3rt.ops.types import GroupLayout

# E4M3 keeps 3 bits behind the point: over numbers of one power of two the error is uniform in 2^-4 of the lower end,
# its mean square 2^-6 / 12, against a mean square of 7/3 of the numbers: 5.6e-4. Errors of random sign carry this ratio
# into a product from each operand; calc_diff is half of it.
CAST_DIFF = 2.8e-4


def bound(casts: int) -> float:
    """calc_diff that `casts` casts on the way to a tensor may make: twice what is expected."""
    return 2 * casts * CAST_DIFF


@dataclass
class Weights:
    """Gate and up (X, 2F, D), down (X, D, F), or without X."""

    up: nn.Parameter
    down: nn.Parameter

    @classmethod
    def draw(cls, dim: int, hidden: int, experts: int | None, dtype: torch.dtype) -> Weights:
        leading = () if experts is None else (experts,)
        up = torch.randn(*leading, 2 * hidden, dim, dtype=torch.float32) * dim**-0.5
        down = torch.randn(*leading, dim, hidden, dtype=torch.float32) * hidden**-0.5
        return cls(nn.Parameter(up.to(dtype)), nn.Parameter(down.to(dtype)))

    def to(self, device: str) -> Weights:
        return Weights(*(nn.Parameter(w.detach().to(device)) for w in (self.up, self.down)))

    def run(
        self,
        x: Tensor,
        dy: Tensor,
        layout: GroupLayout | None,
        ledger: Ledger | None = None,
        gather: fp8.Gather | None = None,
    ) -> list[Tensor]:
        """y, dx and, but where the ledger defers them, the gradients of both weights."""
        x = x.detach().requires_grad_()
        y = fp8.swiglu_mlp(x, (WeightCast(), (self.up,)), (WeightCast(), (self.down,)), ledger, layout, gather)
        y.backward(dy)
        assert x.grad is not None
        return [y.detach(), x.grad, *self.gradients()]

    def gradients(self) -> list[Tensor]:
        """Taken: the next ones start from nothing."""
        taken = [take(weight) for weight in (self.up, self.down)]
        return [gradient for gradient in taken if gradient is not None]


def take(weight: nn.Parameter) -> Tensor | None:
    one = main_grad.of(weight)
    gradient, one.grad = one.grad, None
    return gradient


def layout_of(counts: list[int], device: str = "cpu") -> tuple[GroupLayout, Tensor, int]:
    """Segments in multiples of 128 with a spare block after them; which rows hold data; the number of rows."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + -(-count // 128) * 128)
    num_rows = offsets[-1] + 128
    valid = torch.zeros(num_rows, dtype=torch.bool)
    for start, count in zip(offsets[:-1], counts, strict=True):
        valid[start : start + count] = True
    numbers = (torch.tensor(values, dtype=torch.int32, device=device) for values in (counts, offsets))
    return GroupLayout(*numbers), valid.to(device), num_rows
