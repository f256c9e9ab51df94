"""What a forward leaves for its backward to do beside autograd: weight gradients put off, and tensors to compute again;
and how much of a GPU its products may take.

Layers take a `Ledger` as an argument, or None, and then all is left to autograd. The numbers are the same either way,
to the bit but for sums over several uses of a recomputed call's input, which autograd then adds up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

Sink = Callable[[nn.Parameter, Tensor], None]


class WeightGrads:
    """A queue of weight gradients that backward left out; `run` computes them, in the order of the backward."""

    def __init__(self, sink: Sink) -> None:
        """sink: takes each parameter with its gradient."""
        self._sink = sink
        self._owed: list[Callable[[], None]] = []

    def put(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        self.put_call(lambda: self._sink(parameter, compute()))

    def put_call(self, call: Callable[[], None]) -> None:
        """`call` adds its gradient to a sum itself."""
        self._owed.append(call)

    @torch.no_grad()
    def run(self) -> None:
        owed, self._owed = self._owed[::-1], []
        while owed:  # each closure goes as soon as it has run, and what it holds with it
            owed.pop()()


class Ledger:
    """For one block and one micro-batch.

    weight_grads: where weight gradients go that are put off; None: autograd computes them with the rest.
    recompute: names of what `recomputed` does not keep: after `discard` such tensors hold no memory, and before the
    backward `restore` computes them again.
    product_sms: multiprocessors that products in FP8 may take, so that communication runs on the rest; 0: all.
    """

    def __init__(
        self,
        weight_grads: WeightGrads | None = None,
        recompute: frozenset[str] = frozenset(),
        product_sms: int = 0,
    ) -> None:
        self._weight_grads = weight_grads
        self._recompute = recompute
        self.product_sms = product_sms
        self._entries: list[_Entry] = []

    @property
    def defers(self) -> bool:
        return self._weight_grads is not None

    def recomputes(self, what: str) -> bool:
        return what in self._recompute

    def put_off(self, y: Tensor, parameter: nn.Parameter, weight_grad: Callable[[Tensor], Tensor]) -> Tensor:
        """y, which was computed without a graph to `parameter`; backward queues weight_grad(dy) as its gradient."""
        assert self._weight_grads is not None
        return cast(Tensor, _Tap.apply(y, self._weight_grads, parameter, weight_grad))

    def at_weight_gradients(self, call: Callable[[], None]) -> None:
        """From a backward: `call` adds a weight gradient to its sum, now or when those put off are computed."""
        if self._weight_grads is None:
            call()
        else:
            self._weight_grads.put_call(call)

    def recomputed(self, what: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), a tensor or a tuple of them; see `recomputed` below."""
        if what not in self._recompute or not torch.is_grad_enabled():
            return function(*inputs)
        entry = _Entry(function)
        self._entries.append(entry)
        outputs = _Recomputed.apply(entry, *inputs)
        return outputs if entry.is_tuple else outputs[0]

    def discard(self) -> bool:
        """Free what can be computed again: nobody reads it before the backward. Returns whether there was anything."""
        for entry in self._entries:
            entry.discard()
        return bool(self._entries)

    def restore(self) -> None:
        """Compute again what was discarded, in the old tensors' places."""
        for entry in self._entries:
            entry.restore()
        self._entries.clear()


def recomputed(ledger: Ledger | None, what: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
    """function(*inputs), which the ledger may drop after the forward and compute again. The inputs are kept.

    `function` may use parameters, and the ledger; it must give the same numbers each time.
    """
    return function(*inputs) if ledger is None else ledger.recomputed(what, function, *inputs)


class _Tap(torch.autograd.Function):
    """The identity; its backward puts a weight gradient into the queue."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, queue: WeightGrads, parameter: nn.Parameter, weight_grad: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.owed = (queue, parameter, weight_grad)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        queue, parameter, weight_grad = ctx.owed
        queue.put(parameter, lambda: weight_grad(dy))
        return dy, None, None, None


class _Entry:
    """One call whose outputs are dropped and computed again."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.is_tuple = False
        self._inputs: tuple[Tensor, ...] = ()
        self._places: list[tuple[Tensor, int]] = []  # each output's memory, and its size in bytes
        self._leaves: list[Tensor] = []
        self._edges: list[GradientEdge | None] = []

    def call(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = self._function(*inputs)
        self.is_tuple = isinstance(outputs, tuple)
        return outputs if self.is_tuple else (outputs,)

    def first_call(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._inputs = tuple(x.detach() for x in inputs)
        outputs = self.call(self._inputs)
        # `.data` has a version counter of its own: filling the memory again is no change of the output to autograd.
        self._places = [(y.data, y.untyped_storage().nbytes()) for y in outputs]
        return outputs

    def discard(self) -> None:
        for place, _ in self._places:
            place.untyped_storage().resize_(0)

    def restore(self) -> None:
        self._leaves = [x.requires_grad_() for x in (x.detach() for x in self._inputs)]
        with torch.enable_grad():
            outputs = self.call(tuple(self._leaves))
        for (place, num_bytes), y in zip(self._places, outputs, strict=True):
            place.untyped_storage().resize_(num_bytes)
            place.copy_(y.detach())
        # Not the outputs, which would be there twice until the backward comes here.
        self._edges = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        self._places = []

    def backward(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        pairs = zip(self._edges, grads, strict=True)
        reached = [(edge, dy) for edge, dy in pairs if edge is not None and dy is not None]
        torch.autograd.backward([edge for edge, _ in reached], [dy for _, dy in reached])
        dx = tuple(leaf.grad for leaf in self._leaves)
        self._inputs, self._leaves, self._edges = (), [], []
        return dx


class _Recomputed(torch.autograd.Function):
    """A call without a graph; the backward uses the graph of the second call."""

    @staticmethod
    def forward(ctx: Any, entry: _Entry, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        return entry.first_call(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.entry.backward(grads)
