"""Pipeline schedules as data: for every rank the list of what it computes, in order.

Communication is not written down: it follows from the tables. `checker.check` proves a table sound,
`simulator.simulate` gives it a clock.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dsv3rt.parallel.pipeline import dual, one_way
from dsv3rt.parallel.pipeline.action import Action, Step

Kind = Literal["1f1b", "interleaved", "zb1p", "dualpipev", "dualpipe"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Chain:
    """One copy of the model: its stages from input to loss, and the micro-batches that go through them."""

    stages: range
    micro_batches: range


@dataclass(frozen=True)
class Schedule:
    """A table of steps per rank, with the stages' places.

    `placement[stage]` is the stage's rank. There is one chain, but for DualPipe, where stages `num_ranks ..
    2 * num_ranks - 1` are a second copy of the model that lies on the ranks in opposite order and takes the second half
    of the micro-batches.
    """

    kind: Kind
    num_ranks: int
    num_micro_batches: int
    placement: tuple[int, ...]
    chains: tuple[Chain, ...]
    steps: tuple[tuple[Step, ...], ...]

    @property
    def stages_per_copy(self) -> int:
        return len(self.chains[0].stages)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, place in enumerate(self.placement) if place == rank)

    def chain_of(self, stage: int) -> Chain:
        return next(chain for chain in self.chains if stage in chain.stages)

    def requirements(self, action: Action) -> Iterator[Action]:
        """The F, I and W that must be done before `action` can start."""
        stage, batch = action.stage, action.micro_batch
        stages = self.chain_of(stage).stages
        if action.op == "F":
            if stage > stages.start:
                yield Action(stage - 1, "F", batch)
        elif action.op == "W":
            yield Action(stage, "I", batch)
        else:
            yield Action(stage, "F", batch)
            if stage < stages.stop - 1:
                yield Action(stage + 1, "I", batch)

    def save_csv(self, path: Path) -> None:
        """One line per rank, one cell per step: the compute-only form that torch's schedules load."""
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(self.steps)


def generate(
    kind: Kind, *, num_ranks: int, num_micro_batches: int, stages_per_rank: int | None = None, put_off: int = 0
) -> Schedule:
    """Write the table of a schedule.

    Args:
        kind: `1f1b`; `interleaved` 1F1B; `zb1p`, zero bubble at the memory of 1F1B (ZB-H1), also interleaved;
            `dualpipev`, DualPipe folded so that each rank holds two different stages; `dualpipe`, bidirectional, each
            rank holding one stage of either copy of the model.
        num_ranks: pipeline ranks.
        num_micro_batches: micro-batches of a step, over both directions.
        stages_per_rank: 1 for 1f1b, 2 for dualpipev and dualpipe, any number for zb1p (1 if not given), at least 2 for
            interleaved (2 if not given).
        put_off: how many W of a rank may be owed at a time, which costs memory and saves bubble; 0: the schedule's own.

    Raises:
        ValueError: the combination does not exist.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if stages_per_rank is None:
        stages_per_rank = 1 if kind in ("1f1b", "zb1p") else 2
    _check_sizes(kind, num_ranks, num_micro_batches, stages_per_rank)
    steps: list[list[Step]]
    num_stages = num_ranks * stages_per_rank
    chains: tuple[Chain, ...] = (Chain(range(num_stages), range(num_micro_batches)),)
    if kind in ("dualpipev", "dualpipe"):
        placement = (*range(num_ranks), *reversed(range(num_ranks)))
        if kind == "dualpipe":
            half = num_micro_batches // 2
            first = Chain(range(num_ranks), range(half))
            chains = (first, Chain(range(num_ranks, num_stages), range(half, num_micro_batches)))
            steps = dual.bidirectional(num_ranks, num_micro_batches)
        else:
            steps = dual.folded(num_ranks, num_micro_batches)
    else:
        placement = tuple(stage % num_ranks for stage in range(num_stages))
        steps = one_way.table(kind, num_ranks, num_micro_batches, stages_per_rank)
    if put_off:
        steps = [_owing_at_most(put_off, row) for row in steps]
    return Schedule(kind, num_ranks, num_micro_batches, placement, chains, tuple(map(tuple, steps)))


def _owing_at_most(limit: int, row: Sequence[Step]) -> list[Step]:
    """The row with the oldest W sooner wherever an I would leave more than `limit` of them owed.

    It stays sound: each W still follows its I, nothing else waits for a W, and the other steps keep their order.
    """
    steps: list[Step] = []
    owed: deque[Step] = deque()
    early: set[Step] = set()
    for step in row:
        if step in early:
            continue
        steps.append(step)
        if isinstance(step, Action) and step.op == "I":
            owed.append(Action(step.stage, "W", step.micro_batch))
            while len(owed) >= limit:
                early.add(owed[0])
                steps.append(owed.popleft())
        elif step in owed:
            owed.remove(step)
    return steps


def _check_sizes(kind: Kind, ranks: int, batches: int, stages: int) -> None:
    for name, value in (("num_ranks", ranks), ("num_micro_batches", batches), ("stages_per_rank", stages)):
        if value < 1:
            raise ValueError(f"schedule: {name} must be positive, got {value}")
    exact = {"1f1b": 1, "dualpipev": 2, "dualpipe": 2}.get(kind)
    if exact is not None and stages != exact:
        raise ValueError(f"schedule: stages_per_rank must be {exact} for {kind}, got {stages}")
    if kind == "interleaved" and stages < 2:
        raise ValueError(f"schedule: stages_per_rank must be at least 2 for interleaved, got {stages}")
    if kind == "dualpipe" and ranks % 2:
        raise ValueError(f"schedule: num_ranks must be even for dualpipe, got {ranks}")
    if kind == "dualpipe" and batches % 2:
        raise ValueError(f"schedule: num_micro_batches must be even for dualpipe, got {batches}")
    if kind in ("dualpipev", "dualpipe") and batches < 2 * ranks:
        least = f"at least {2 * ranks} (twice num_ranks) for {kind}"
        raise ValueError(f"schedule: num_micro_batches must be {least}, got {batches}")
    if stages > 1 and kind in ("interleaved", "zb1p") and batches % one_way.num_rounds(ranks, batches):
        rounds = f"a multiple of {one_way.num_rounds(ranks, batches)} (num_micro_batches // num_ranks)"
        raise ValueError(
            f"schedule: num_micro_batches must be {rounds} for {kind} with {stages} stages a rank, got {batches}"
        )
