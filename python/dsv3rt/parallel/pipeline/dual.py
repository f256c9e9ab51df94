"""DualPipe (DeepSeek-V3 report, section 3.2.1) and DualPipeV, its folded form.

Either way a rank holds two stages, and micro-batches enter it from two sides. DualPipe over 2D ranks lays two copies of
the model over the ranks, in opposite directions; the two halves of the ranks mirror each other, and either half does
what DualPipeV does over D ranks, where the second side is the way back of a model folded in the middle. One class
therefore writes both: seen from a rank, `near` is the stage that micro-batches meet on their way in (to the middle, or
to the fold) and `far` the one on their way out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dsv3rt.parallel.pipeline.action import Action, Op, Overlap, Step


def folded(num_ranks: int, num_micro_batches: int) -> list[list[Step]]:
    """DualPipeV: rank r holds stages r and 2 * num_ranks - 1 - r."""
    tables = []
    for rank in range(num_ranks):
        near, far = _Side(rank), _Side(2 * num_ranks - 1 - rank)
        tables.append(_Writer(near, far).write(num_ranks, rank, num_micro_batches))
    return tables


def bidirectional(num_ranks: int, num_micro_batches: int) -> list[list[Step]]:
    """DualPipe: rank r holds stage r of the first copy, and of the second, whose stages count on from num_ranks, the
    stage 2 * num_ranks - 1 - r."""
    half_ranks, half_batches = num_ranks // 2, num_micro_batches // 2
    tables = []
    for rank in range(num_ranks):
        sides = _Side(rank), _Side(2 * num_ranks - 1 - rank, first=half_batches)
        near, far = sides if rank < half_ranks else sides[::-1]
        distance = min(rank, num_ranks - 1 - rank)
        tables.append(_Writer(near, far).write(half_ranks, distance, half_batches))
    return tables


@dataclass
class _Side:
    """One of a rank's two stages, and how far its micro-batches have come."""

    stage: int
    first: int = 0
    num_forwards: int = 0
    num_backwards: int = 0

    def forward(self) -> Action:
        self.num_forwards += 1
        return Action(self.stage, "F", self.first + self.num_forwards - 1)

    def backward(self, op: Op = "B") -> Action:
        self.num_backwards += 1
        return Action(self.stage, op, self.first + self.num_backwards - 1)


@dataclass
class _Writer:
    """Writes one rank's table."""

    near: _Side
    far: _Side
    steps: list[Step] = field(default_factory=list)
    owed: deque[Action] = field(default_factory=deque)  # weight gradients put off

    def write(self, depth: int, distance: int, num_micro_batches: int) -> list[Step]:
        """All steps of the rank at `distance` from the outer end of a half of `depth` ranks."""
        inner = depth - 1 - distance  # ranks between this one and the middle
        self._warm_up(inner, distance)
        for index in range(num_micro_batches - 2 * depth + distance + 1):
            if index == 0 and inner == 0:  # nothing would hide behind this pair: apart, its parts pass on sooner
                self.steps += [self.near.forward(), self.far.backward()]
            else:
                self._overlap(self.near, self.far)
            self._overlap(self.far, self.near)
        for _ in range(inner):
            self.steps.append(self.far.backward())
            self._overlap(self.far, self.near)
        self._cool_down(inner, distance)
        return self.steps

    def _warm_up(self, inner: int, distance: int) -> None:
        self.steps += [self.near.forward() for _ in range(2 * inner)]
        for _ in range(distance + 1):
            self.steps += [self.near.forward(), self.far.forward()]
        for _ in range(inner):
            self._input_gradient(self.far)
            self._weight_gradient()
            self.steps.append(self.far.forward())

    def _cool_down(self, inner: int, distance: int) -> None:
        """No forwards are left: the later half of the backwards put their weight gradients off to fill the gaps."""
        for index in range(2 * (distance + 1)):
            side = self.near if index % 2 else self.far
            if index > distance:
                self._input_gradient(side)
            else:
                self.steps.append(side.backward())
        for _ in range(inner):
            self._weight_gradient()
            self._input_gradient(self.near)
        while self.owed:
            self._weight_gradient()

    def _overlap(self, forward: _Side, backward: _Side) -> None:
        self.steps.append(Overlap(forward.forward(), backward.backward()))

    def _input_gradient(self, side: _Side) -> None:
        action = side.backward("I")
        self.steps.append(action)
        self.owed.append(Action(action.stage, "W", action.micro_batch))

    def _weight_gradient(self) -> None:
        self.steps.append(self.owed.popleft())
