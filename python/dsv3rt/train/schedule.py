"""Schedules: a number as a function of the steps and tokens seen so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3rt.config import Segment


@dataclass(frozen=True)
class Schedule:
    """The value of consecutive segments (see `dsv3rt.config.Segment`); stateless, so a resumed run needs nothing."""

    segments: tuple[Segment, ...]

    def value(self, step: int, tokens: float) -> float:
        """The value after `step` steps and `tokens` tokens; past the last segment's end, that segment's value."""
        previous: Segment | None = None
        for segment in self.segments:
            position = step if segment.unit == "steps" else tokens
            if position < segment.end:
                return _inside(segment, previous, position)
            previous = segment
        assert previous is not None
        return previous.value


def _inside(segment: Segment, previous: Segment | None, position: float) -> float:
    if segment.shape == "constant":
        return segment.value
    start = segment.start if segment.start is not None else previous.value if previous is not None else segment.value
    # The configuration promises that a moving segment shares its unit with the one before it.
    begin = previous.end if previous is not None else 0.0
    progress = (position - begin) / (segment.end - begin)
    if segment.shape == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return start + (segment.value - start) * progress


def batch_sequences(schedule: Schedule, step: int, tokens: int, micro_batch_size: int) -> int:
    """Sequences in the next batch: the schedule's value rounded to the nearest multiple of the micro batch."""
    return max(1, round(schedule.value(step, tokens) / micro_batch_size)) * micro_batch_size
