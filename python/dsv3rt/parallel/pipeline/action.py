"""The words that pipeline tables are written in; printed, they read as torch.distributed.pipelining prints its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Op = Literal["F", "I", "W", "B"]


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work on one micro-batch in one stage.

    F is the forward pass, I the gradient of the inputs, W the gradient of the weights, B is I and W at once.
    """

    stage: int
    op: Op
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.micro_batch}"

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self,)

    @property
    def results(self) -> tuple[Action, ...]:
        """What is there once this is done, in terms of F, I and W alone."""
        if self.op == "B":
            return (Action(self.stage, "I", self.micro_batch), Action(self.stage, "W", self.micro_batch))
        return (self,)


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a full backward of different micro-batches, run into each other on one rank."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self.forward, self.backward)


Step = Action | Overlap
