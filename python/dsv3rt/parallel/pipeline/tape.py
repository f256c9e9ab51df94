"""A forward cut into pieces, so that its backward can be run piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv3rt.parallel.pipeline.lanes import Lanes, OfChunk, Phase


class Tape:
    """The pieces of one micro-batch's forward through one stage. Without grad nothing is remembered."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self._pieces: list[Callable[[], Iterator[Phase | OfChunk]]] = []

    def cut(self, phase: Phase | OfChunk, *outputs: Tensor) -> list[Tensor]:
        """End a piece; what comes next uses the tensors returned, new leaves with the outputs' values."""
        leaves = [y.detach() for y in outputs]
        self.lanes.share(leaves)
        if torch.is_grad_enabled():
            pairs = [(y, leaf.requires_grad_()) for y, leaf in zip(outputs, leaves, strict=True) if y.requires_grad]
            self._pieces.append(lambda: self._backward(phase, pairs))
        return leaves

    def add(self, piece: Callable[[], Iterator[Phase | OfChunk]]) -> None:
        """Let the backward do `piece`, which names its phases, before it comes to the pieces so far."""
        if torch.is_grad_enabled():
            self._pieces.append(piece)

    def backward(self) -> Iterator[Phase | OfChunk]:
        """The pieces' backwards, last piece first, each after its phase was named. The last leaves have gradients."""
        while self._pieces:
            yield from self._pieces.pop()()

    def _backward(self, phase: Phase | OfChunk, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[Phase | OfChunk]:
        yield phase
        reached = [(y, leaf.grad) for y, leaf in pairs if leaf.grad is not None]
        pairs.clear()
        if reached:
            gradients = [dy for _, dy in reached]
            self.lanes.share(dy for dy in gradients if dy is not None)
            torch.autograd.backward([y for y, _ in reached], gradients)
