"""Proves that a table of steps can be run: complete, in order, free of deadlock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3rt.parallel.pipeline.action import Action, Step
from dsv3rt.parallel.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Report:
    """What a sound schedule costs that needs no clock.

    `peak_in_flight[rank]` is the largest number of (stage, micro-batch) pairs of which the rank holds activations: from
    F until B or, where the backward is cut in two, until W, which still needs the inputs. In an overlapped step the
    forward counts before the backward gives anything back.
    """

    num_steps: int
    num_overlaps: int
    peak_in_flight: tuple[int, ...]


def check(schedule: Schedule) -> Report:
    """Prove a schedule sound.

    Every stage does F of every micro-batch of its chain once, and B, or I and W, once, on the stage's rank. F follows F
    of the stage before; B and I follow F of their own stage, and B or I of the stage after; W follows I. The steps
    of all ranks come to an end when a rank waits for what it receives but never for what it sends; messages are told
    apart by stage, micro-batch and direction.

    Raises:
        ValueError: it is not; one line names the rank, the step and what it lacks.
    """
    _check_places(schedule)
    _check_counts(schedule)
    for _ in execution_order(schedule):
        pass
    steps = [step for row in schedule.steps for step in row]
    overlaps = sum(len(step.parts) > 1 for step in steps)
    return Report(len(steps), overlaps, tuple(_peak_in_flight(row) for row in schedule.steps))


def execution_order(schedule: Schedule) -> Iterator[tuple[int, Step]]:
    """All (rank, step), each after everything that it needs.

    Raises:
        ValueError: some rank would wait for ever.
    """
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.steps):
            while position[rank] < len(row) and _missing(schedule, row[position[rank]], done) is None:
                step = row[position[rank]]
                done.update(result for part in step.parts for result in part.results)
                position[rank] += 1
                moved = True
                yield rank, step
    _check_finished(schedule, position, done)


def _missing(schedule: Schedule, step: Step, done: set[Action]) -> Action | None:
    """What the step still needs; the parts of an overlapped step start together, so neither can feed the other."""
    needs = (need for part in step.parts for need in schedule.requirements(part))
    return next((need for need in needs if need not in done), None)


def _check_finished(schedule: Schedule, position: list[int], done: set[Action]) -> None:
    stuck = [rank for rank in range(schedule.num_ranks) if position[rank] < len(schedule.steps[rank])]
    waits = []
    for rank in stuck:
        step = schedule.steps[rank][position[rank]]
        need = _missing(schedule, step, done)
        assert need is not None
        owner = schedule.placement[need.stage]
        if owner == rank:
            raise ValueError(f"schedule: rank {rank}: {step} comes before {need}, which it needs")
        waits.append(f"rank {rank}: {step} waits for {need} of rank {owner}")
    if waits:
        raise ValueError(f"schedule: deadlock: {'; '.join(waits)}")


def _check_places(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.steps):
        for action in (part for step in row for part in step.parts):
            if not 0 <= action.stage < len(schedule.placement):
                raise ValueError(f"schedule: rank {rank}: {action} names a stage that does not exist")
            home = schedule.placement[action.stage]
            if home != rank:
                raise ValueError(f"schedule: rank {rank}: {action} belongs to rank {home}")
            batches = schedule.chain_of(action.stage).micro_batches
            if action.micro_batch not in batches:
                raise ValueError(f"schedule: rank {rank}: {action} names a micro-batch outside {_span(batches)}")


def _span(numbers: range) -> str:
    return f"{numbers.start}..{numbers.stop - 1}"


def _check_counts(schedule: Schedule) -> None:
    """Places are known to be right, so that a duplicate is always on one rank."""
    seen: set[Action] = set()
    for rank, row in enumerate(schedule.steps):
        for action in (part for step in row for part in step.parts):
            for result in action.results:
                if result in seen:
                    raise ValueError(f"schedule: rank {rank}: {action} does {result} a second time")
                seen.add(result)
    for stage, rank in enumerate(schedule.placement):
        for batch in schedule.chain_of(stage).micro_batches:
            for wanted in (Action(stage, "F", batch), Action(stage, "I", batch), Action(stage, "W", batch)):
                if wanted not in seen:
                    raise ValueError(f"schedule: rank {rank}: {wanted} is missing")


def _peak_in_flight(row: tuple[Step, ...]) -> int:
    held = peak = 0
    for action in (part for step in row for part in step.parts):
        held += (action.op == "F") - (action.op in ("B", "W"))
        peak = max(peak, held)
    return peak
