"""A clock for schedules: when every step runs, given what its parts take."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3rt.parallel.pipeline.action import Action, Step
from dsv3rt.parallel.pipeline.checker import Report, check, execution_order
from dsv3rt.parallel.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Costs:
    """What one stage takes for one micro-batch, in any unit of time; fractions.Fraction gives exact results.

    A full backward takes `input_grad + weight_grad`. `overlap` is a forward and a full backward run into each other;
    without it nothing is gained: their sum. `comm` passes between the end of a step and the start of a step on another
    rank that needs its result; it costs neither rank any time of its own.
    """

    forward: float
    input_grad: float
    weight_grad: float
    overlap: float | None = None
    comm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "input_grad", "weight_grad", "overlap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"schedule: {name} time must be positive and finite, got {value}")
        if not 0 <= self.comm < float("inf"):
            raise ValueError(f"schedule: comm time must be finite and not negative, got {self.comm}")
        longest = max(self.forward, self.backward)
        if self.overlap is not None and self.overlap < longest:
            raise ValueError(f"schedule: overlap time must be at least its longer part ({longest}), got {self.overlap}")

    @property
    def backward(self) -> float:
        return self.input_grad + self.weight_grad

    @property
    def overlapped(self) -> float:
        return self.forward + self.backward if self.overlap is None else self.overlap

    def divided(self, by: int) -> Costs:
        """The same model cut into `by` times as many stages; messages stay as long as they were."""
        overlap = None if self.overlap is None else self.overlap / by
        return Costs(self.forward / by, self.input_grad / by, self.weight_grad / by, overlap, self.comm)

    def of(self, step: Step) -> float:
        if not isinstance(step, Action):
            return self.overlapped
        times = {"F": self.forward, "I": self.input_grad, "W": self.weight_grad, "B": self.backward}
        return times[step.op]


@dataclass(frozen=True)
class Span:
    """A step with its times."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule that was run on paper."""

    schedule: Schedule
    report: Report
    spans: tuple[tuple[Span, ...], ...]

    @property
    def duration(self) -> float:
        """From the first start to the last end of all ranks."""
        return max(row[-1].end for row in self.spans)

    def busy(self, rank: int) -> float:
        return sum(span.end - span.start for span in self.spans[rank])

    def idle(self, rank: int) -> float:
        return self.duration - self.busy(rank)

    @property
    def peak_in_flight(self) -> int:
        return max(self.report.peak_in_flight)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Start every step as soon as its rank is free and all that it needs has arrived.

    Raises:
        ValueError: the schedule is unsound.
    """
    report = check(schedule)
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
    for rank, step in execution_order(schedule):
        start = spans[rank][-1].end if spans[rank] else 0
        for need in (need for part in step.parts for need in schedule.requirements(part)):
            start = max(start, ends[need] + (0 if schedule.placement[need.stage] == rank else costs.comm))
        span = Span(step, start, start + costs.of(step))
        spans[rank].append(span)
        ends.update((result, span.end) for part in step.parts for result in part.results)
    return Timeline(schedule, report, tuple(map(tuple, spans)))
