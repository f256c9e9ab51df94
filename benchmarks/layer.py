"""One MoE layer of one of 64 expert-parallel ranks, in the parts that pipelines schedule: F, I and W."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.slice_models import Slice, build
from benchmarks.timing import HEAD_START_CYCLES
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.main_grad import of
from dsv3rt.layers.precision import Precision, set_precision
from dsv3rt.layers.weights import release_copies
from dsv3rt.model.block import Block

Part = Literal["F", "I", "W"]
PARTS: tuple[Part, ...] = ("F", "I", "W")


class SplitLayer:
    """Forward, gradient of the input and gradients of the weights apart from each other; nothing travels.

    The weights' gradients are added to FP32 sums, as those of all micro-batches of a step but the first.
    """

    def __init__(self, shape: Slice, precision: Precision) -> None:
        self._model = build(shape)
        set_precision(self._model, precision)
        release_copies(self._model)
        block = self._model.layers[0]
        assert isinstance(block, Block)
        self._block = block
        self._sequences = self._model.sequences(shape.batch()[0])
        self._x_TD = torch.randn(shape.tokens, shape.config.dim, device="cuda", dtype=torch.bfloat16)
        self._dy_TD = torch.randn_like(self._x_TD)

    def sample(self, warmup: int = 4, reps: int = 12) -> dict[Part, list[float]]:
        """Seconds of each part; the device sleeps before each step, so that the host stays ahead."""
        found: dict[Part, list[float]] = {part: [] for part in PARTS}
        for index in range(warmup + reps):
            torch.cuda._sleep(2 * HEAD_START_CYCLES)
            times = self._step()
            if index >= warmup:
                for part, seconds in times.items():
                    found[part].append(seconds)
        return found

    def _step(self) -> dict[Part, float]:
        weight_grads = WeightGrads(_add)
        ledger = Ledger(weight_grads)
        x_TD = self._x_TD.detach().requires_grad_()
        marks = [_mark()]
        block = self._block
        routed = block.route(block.attention(x_TD, self._sequences, ledger), ledger)
        dispatched = block.dispatch(routed)
        y_TD = block.combine(routed, dispatched, block.experts(routed, dispatched, ledger))
        marks.append(_mark())
        y_TD.backward(self._dy_TD)
        marks.append(_mark())
        weight_grads.run()
        marks.append(_mark())
        torch.cuda.synchronize()
        pairs = zip(PARTS, marks[:-1], marks[1:], strict=True)
        return {part: start.elapsed_time(end) * 1e-3 for part, start, end in pairs}


@torch.no_grad()
def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    kept = of(parameter)
    kept.grad = gradient.float() if kept.grad is None else kept.grad.add_(gradient)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
