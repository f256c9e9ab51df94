"""The checker accepts what can be run, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise, product
from random import Random

import pytest

from dsv3rt.parallel.pipeline.action import Action, Overlap, Step
from dsv3rt.parallel.pipeline.checker import check, execution_order
from dsv3rt.parallel.pipeline.schedule import KINDS, Kind, Schedule, generate

Rows = list[list[Step]]


def with_rows(schedule: Schedule, rows: Rows) -> Schedule:
    return replace(schedule, steps=tuple(map(tuple, rows)))


def rows_of(schedule: Schedule) -> Rows:
    return [list(row) for row in schedule.steps]


def possible(kind: Kind, **sizes: int) -> Schedule | None:
    try:
        return generate(kind, **sizes)
    except ValueError:
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_is_sound(kind: Kind) -> None:
    """Complete, in order and free of deadlock over a grid of sizes."""
    sizes = product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8, 11, 12, 16, 20), (1, 2, 3))
    made = [possible(kind, num_ranks=r, num_micro_batches=m, stages_per_rank=v) for r, m, v in sizes]
    schedules = [schedule for schedule in made if schedule]
    assert len(schedules) >= 15
    for schedule in schedules:
        report = check(schedule)
        assert report.num_steps == sum(map(len, schedule.steps))
        assert len(report.peak_in_flight) == schedule.num_ranks


def is_runnable(schedule: Schedule) -> bool:
    """Another way to ask: is the graph of needs and of orders on the ranks free of cycles?"""
    name = {part: step for row in schedule.steps for step in row for part in step.parts}
    by_key = {(part.stage, part.op, part.micro_batch): step for part, step in name.items()}

    def done_by(stage: int, ops: str, batch: int) -> Step:
        return next(by_key[stage, op, batch] for op in ops if (stage, op, batch) in by_key)

    graph: dict[Step, set[Step]] = {step: set() for row in schedule.steps for step in row}
    for row in schedule.steps:
        for before, after in pairwise(row):
            graph[after].add(before)
    for part, step in name.items():
        stages = next(chain.stages for chain in schedule.chains if part.stage in chain.stages)
        if part.op == "F" and part.stage > stages[0]:
            graph[step].add(done_by(part.stage - 1, "F", part.micro_batch))
        if part.op in "IB":
            graph[step].add(done_by(part.stage, "F", part.micro_batch))
            if part.stage < stages[-1]:
                graph[step].add(done_by(part.stage + 1, "IB", part.micro_batch))
        if part.op == "W":
            graph[step].add(done_by(part.stage, "I", part.micro_batch))
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError:
        return False
    return True


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", KINDS)
def test_swaps_are_judged_as_by_a_search_for_cycles(kind: Kind, seed: int) -> None:
    random = Random(seed)
    schedule = generate(kind, num_ranks=random.choice((2, 4)), num_micro_batches=8)
    rows = rows_of(schedule)
    for _ in range(random.randint(1, 3)):
        row = random.choice(rows)
        first = random.randrange(len(row) - 1)
        second = random.randint(first + 1, min(first + 4, len(row) - 1))
        row[first], row[second] = row[second], row[first]
    swapped = with_rows(schedule, rows)
    if is_runnable(swapped):
        check(swapped)
    else:
        with pytest.raises(ValueError, match=r"^schedule: (deadlock: )?rank \d+: "):
            check(swapped)


def test_swaps_include_good_and_bad_ones() -> None:
    """The property above is not empty on either side."""
    schedule = generate("dualpipev", num_ranks=4, num_micro_batches=8)
    verdicts = set()
    for rank, row in enumerate(schedule.steps):
        for index in range(len(row) - 1):
            rows = rows_of(schedule)
            rows[rank][index : index + 2] = rows[rank][index : index + 2][::-1]
            verdicts.add(is_runnable(with_rows(schedule, rows)))
    assert verdicts == {True, False}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_dropped_doubled_or_moved_is_rejected(kind: Kind, seed: int) -> None:
    random = Random(seed)
    schedule = generate(kind, num_ranks=4, num_micro_batches=8)
    rank = random.randrange(4)
    index = random.randrange(len(schedule.steps[rank]))
    step = schedule.steps[rank][index]
    dropped, doubled, moved = rows_of(schedule), rows_of(schedule), rows_of(schedule)
    del dropped[rank][index]
    doubled[rank].insert(random.randint(0, len(doubled[rank])), step)
    moved[(rank + 1) % 4].append(moved[rank].pop(index))
    for rows, message in (
        (dropped, rf"^schedule: rank {rank}: .* is missing$"),
        (doubled, rf"^schedule: rank {rank}: .* does .* a second time$"),
        (moved, rf"^schedule: rank {(rank + 1) % 4}: .* belongs to rank {rank}$"),
    ):
        with pytest.raises(ValueError, match=message):
            check(with_rows(schedule, rows))


def row_of(text: str) -> list[Step]:
    """`0F0 1B0`: actions of one-digit stages."""
    return [Action(int(word[0]), word[1], int(word[2:])) for word in text.split()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0F0 0B0", "1B0 1F0"), "rank 1: 1B0 comes before 1F0, which it needs"),
        (("0F0 0W0 0I0", "1F0 1B0"), "rank 0: 0W0 comes before 0I0, which it needs"),
        (("0F0 0B0", "1F0 1I0"), "rank 1: 1W0 is missing"),
        (("0F0 0B0", "1F0 1I0 1B0"), "rank 1: 1B0 does 1I0 a second time"),
        (("0F0 0B0", "1F0 1B0 1F1"), "rank 1: 1F1 names a micro-batch outside 0..0"),
        (("0F0 0B0", "1F0 1B0 2F0"), "rank 1: 2F0 names a stage that does not exist"),
        (("0F0 0B0 1F0", "1B0"), "rank 0: 1F0 belongs to rank 1"),
    ],
)
def test_check_names_rank_step_and_what_it_lacks(rows: tuple[str, ...], message: str) -> None:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        check(with_rows(schedule, [row_of(text) for text in rows]))
    assert str(error.value) == f"schedule: {message}"


def test_check_names_all_ranks_of_a_deadlock() -> None:
    """Every rank's own order is right, and yet each waits for the other."""
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=2)
    rows = [row_of("0F0 0B0 0F1 0B1"), row_of("1F0 1F1 1B0 1B1")]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        check(with_rows(schedule, rows))
    expected = "rank 0: 0B0 waits for 1I0 of rank 1; rank 1: 1F1 waits for 0F1 of rank 0"
    assert str(error.value) == f"schedule: deadlock: {expected}"


def test_parts_of_an_overlapped_step_do_not_feed_each_other() -> None:
    schedule = generate("1f1b", num_ranks=1, num_micro_batches=1)
    rows: Rows = [[Overlap(Action(0, "F", 0), Action(0, "B", 0))]]
    with pytest.raises(ValueError, match="comes before 0F0"):
        check(with_rows(schedule, rows))


def test_the_two_copies_of_dualpipe_are_not_chained() -> None:
    """Stage num_ranks starts the second copy: it waits for no stage of the first."""
    schedule = generate("dualpipe", num_ranks=4, num_micro_batches=8)
    assert not list(schedule.requirements(Action(4, "F", 4)))
    assert list(schedule.requirements(Action(3, "B", 0))) == [Action(3, "F", 0)]
    assert list(schedule.requirements(Action(4, "B", 4))) == [Action(4, "F", 4), Action(5, "I", 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_execution_order_has_every_step_once(kind: Kind) -> None:
    schedule = generate(kind, num_ranks=4, num_micro_batches=8)
    order = list(execution_order(schedule))
    for rank, row in enumerate(schedule.steps):
        assert tuple(step for owner, step in order if owner == rank) == row


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_pass_a_stage_in_order(kind: Kind) -> None:
    """So messages between two stages arrive in the order in which they were sent, and need no tags."""
    schedule = generate(kind, num_ranks=4, num_micro_batches=12)
    parts = [result for row in schedule.steps for step in row for part in step.parts for result in part.results]
    for stage, op in product(range(len(schedule.placement)), "FIW"):
        batches = [part.micro_batch for part in parts if (part.stage, part.op) == (stage, op)]
        assert batches == list(schedule.chain_of(stage).micro_batches)


def test_activations_are_held_until_the_weight_gradient() -> None:
    schedule = generate("1f1b", num_ranks=1, num_micro_batches=2)
    late, soon = row_of("0F0 0I0 0F1 0I1 0W0 0W1"), row_of("0F0 0I0 0W0 0F1 0I1 0W1")
    assert check(with_rows(schedule, [late])).peak_in_flight == (2,)
    assert check(with_rows(schedule, [soon])).peak_in_flight == (1,)
