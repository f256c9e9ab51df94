"""The simulated clock: bubbles and activations of the papers, exactly, where their assumptions hold."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from dsv3rt.parallel.pipeline import render
from dsv3rt.parallel.pipeline.action import Action
from dsv3rt.parallel.pipeline.report import compare, rank_costs
from dsv3rt.parallel.pipeline.schedule import KINDS, Kind, generate
from dsv3rt.parallel.pipeline.simulator import Costs, Timeline, simulate

SIZES = [(2, 4), (2, 10), (4, 8), (4, 16), (6, 12), (8, 16), (8, 40)]  # multiples of the ranks, as interleaved needs
# F, I, W, F&B; all but F and I may differ as long as W is the shortest.
EVEN = [(1, 1, 1, None), (3, 3, 1, None), (4, 4, 3, 11), (4, 4, 2, 7), (8, 8, 5, 13)]
UNEVEN = [(2, 5, 1, None), (7, 4, 3, None), (1, 9, 1, 10)]


def costs_of(times: tuple[int, int, int, int | None]) -> Costs:
    """Exact arithmetic: equality below means equality."""
    forward, input_grad, weight_grad, overlap = times
    pair = None if overlap is None else Fraction(overlap)
    return Costs(Fraction(forward), Fraction(input_grad), Fraction(weight_grad), pair, Fraction(0))


def run(kind: Kind, sizes: tuple[int, int], costs: Costs, stages: int | None = None) -> Timeline:
    schedule = generate(kind, num_ranks=sizes[0], num_micro_batches=sizes[1], stages_per_rank=stages)
    return simulate(schedule, rank_costs(schedule, costs))


def bubble(timeline: Timeline) -> float:
    return max(timeline.idle(rank) for rank in range(timeline.schedule.num_ranks))


@pytest.mark.parametrize("times", EVEN + UNEVEN)
@pytest.mark.parametrize("sizes", SIZES)
def test_one_way_bubbles_match_the_papers(sizes: tuple[int, int], times: tuple[int, int, int, int | None]) -> None:
    """Needs W <= F and W <= I for ZB1P, and nothing for the others."""
    ranks, costs = sizes[0], costs_of(times)
    both = costs.forward + costs.backward
    assert bubble(run("1f1b", sizes, costs)) == (ranks - 1) * both
    assert bubble(run("interleaved", sizes, costs, 2)) == (ranks - 1) * both / 2
    assert bubble(run("interleaved", sizes, costs, 3)) == (ranks - 1) * both / 3
    for stages in (1, 2, 3):
        expected = (ranks - 1) * (both - 2 * costs.weight_grad) / stages
        assert bubble(run("zb1p", sizes, costs, stages)) == expected


@pytest.mark.parametrize("times", EVEN)
@pytest.mark.parametrize("sizes", SIZES)
def test_dual_bubbles_match_the_paper(sizes: tuple[int, int], times: tuple[int, int, int, int | None]) -> None:
    """Needs F = I >= W, B = I + W; any overlapped time. The bubble is that of the rank that idles most."""
    ranks, costs = sizes[0], costs_of(times)
    pair = costs.overlapped + costs.backward - 3 * costs.weight_grad
    assert bubble(run("dualpipe", sizes, costs)) == (Fraction(ranks, 2) - 1) * pair
    # DualPipeV over R ranks is DualPipe over 2R stages half as long: (2R / 2 - 1) * pair / 2.
    assert bubble(run("dualpipev", sizes, costs)) == Fraction(ranks - 1, 2) * pair


def test_dualpipe_bubble_differs_where_the_paper_assumes() -> None:
    """Input gradients longer than forwards leave less bubble than the formula says, shorter ones more."""
    formula = 3 * (14 + 10 - 3 * 2)  # for B = 10 below
    assert bubble(run("dualpipe", (8, 16), costs_of((4, 8, 2, None)))) < formula
    formula = 3 * (14 + 6 - 3 * 2)  # for B = 6
    assert bubble(run("dualpipe", (8, 16), costs_of((8, 4, 2, None)))) > formula
    formula = 3 * (10 + 8 - 3 * 6)  # W > I: none is left, says the formula
    assert bubble(run("dualpipe", (8, 16), costs_of((2, 2, 6, None)))) > formula == 0


@pytest.mark.parametrize("sizes", SIZES)
def test_peak_activations_match_the_papers(sizes: tuple[int, int]) -> None:
    """In stages: PP for 1F1B and ZB1P, PP + 1 for DualPipe and, its PP being twice the ranks, for DualPipeV."""
    ranks, costs = sizes[0], costs_of((1, 1, 1, None))
    assert run("1f1b", sizes, costs).report.peak_in_flight == tuple(range(ranks, 0, -1))
    assert run("zb1p", sizes, costs).report.peak_in_flight == (ranks,) * ranks
    assert run("dualpipe", sizes, costs).report.peak_in_flight == (ranks + 1,) * ranks
    assert run("dualpipev", sizes, costs).report.peak_in_flight == (2 * ranks + 1,) * ranks
    interleaved = run("interleaved", sizes, costs, 2)
    assert Fraction(interleaved.peak_in_flight, 2) == ranks + Fraction(ranks - 1, 2)


@pytest.mark.parametrize("sizes", [(4, 8), (8, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_compare_reports_equal_columns(kind: Kind, sizes: tuple[int, int]) -> None:
    costs = Costs(2.0, 2.0, 1.0, 4.0)
    result = compare(run(kind, sizes, costs), costs)
    assert result.bubble == result.bubble_formula > 0
    assert result.activations == result.activations_formula
    assert result.parameters == (2 if kind == "dualpipe" else 1)
    assert result.duration >= result.bubble


@pytest.mark.parametrize("kind", KINDS)
def test_work_is_conserved(kind: Kind) -> None:
    """Without a gain from overlap every rank is as busy with the same model as with any other schedule."""
    timeline = run(kind, (4, 16), costs_of((3, 4, 2, None)))
    assert {timeline.busy(rank) for rank in range(4)} == {16 * (3 + 4 + 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_starts_before_what_it_needs(kind: Kind) -> None:
    timeline = run(kind, (4, 8), Costs(1.0, 2.0, 1.0, 3.5, 0.25))
    schedule = timeline.schedule
    ends = {}
    for row in timeline.spans:
        assert all(before.end <= after.start for before, after in pairwise(row))
        ends.update({result: span.end for span in row for part in span.step.parts for result in part.results})
    for rank, row in enumerate(timeline.spans):
        for span in row:
            for need in (need for part in span.step.parts for need in schedule.requirements(part)):
                assert span.start >= ends[need] + 0.25 * (schedule.placement[need.stage] != rank)


def test_messages_cost_their_way() -> None:
    """One micro-batch: every hop there and back is paid once."""
    costs = Costs(1.0, 1.0, 1.0, None, 0.5)
    assert run("1f1b", (4, 1), costs).duration == 4 * 3.0 + 6 * 0.5
    assert run("1f1b", (4, 1), replace(costs, comm=0.0)).duration == 4 * 3.0


def test_overlap_makes_steps_shorter() -> None:
    slow, fast = (run("dualpipev", (4, 16), Costs(1.0, 1.0, 1.0, overlap)) for overlap in (None, 2.0))
    pairs = slow.report.num_overlaps
    assert pairs == sum(len(step.parts) == 2 for row in slow.schedule.steps for step in row) > 0
    assert fast.duration < slow.duration
    assert sum(map(slow.busy, range(4))) - sum(map(fast.busy, range(4))) == pairs * 0.5  # a stage is half a share


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((0.0, 1.0, 1.0), "forward time must be positive and finite, got 0.0"),
        ((1.0, float("nan"), 1.0), "input_grad time must be positive and finite, got nan"),
        ((1.0, 1.0, float("inf")), "weight_grad time must be positive and finite, got inf"),
        ((1.0, 1.0, 1.0, -3.0), "overlap time must be positive and finite, got -3.0"),
        ((1.0, 1.0, 1.0, 1.5), "overlap time must be at least its longer part (2.0), got 1.5"),
        ((1.0, 1.0, 1.0, None, -1.0), "comm time must be finite and not negative, got -1.0"),
    ],
)
def test_costs_reject_impossible_times(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        Costs(*times)
    assert str(error.value) == f"schedule: {message}"


def test_simulate_rejects_unsound_schedules() -> None:
    schedule = generate("1f1b", num_ranks=1, num_micro_batches=1)
    broken = replace(schedule, steps=((Action(0, "B", 0), Action(0, "F", 0)),))
    with pytest.raises(ValueError, match="rank 0: 0B0 comes before 0F0"):
        simulate(broken, Costs(1.0, 1.0, 1.0))


def test_trace_has_every_span(tmp_path: Path) -> None:
    timeline = run("dualpipe", (4, 8), Costs(1.0, 1.0, 1.0, 2.5))
    render.save_trace(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [f"rank {rank}" for rank in range(4)]
    spans = [(event["tid"], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    expected = [
        (rank, str(span.step), span.start * 1000, (span.end - span.start) * 1000)
        for rank, row in enumerate(timeline.spans)
        for span in row
    ]
    assert spans == expected
