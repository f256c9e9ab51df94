"""Pictures of a simulated schedule: a Gantt chart, and a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
from pathlib import Path

from dsv3rt.parallel.pipeline.action import Action
from dsv3rt.parallel.pipeline.simulator import Span, Timeline

_COLORS = {"F": ("#4c72b0", "#9db4d8"), "B": ("#3a7d44", "#93c29b"), "I": ("#2a8c8c", "#8fcaca"), "W": ("#dd8452",) * 2}
_NAMES = {"F": "forward", "B": "backward", "I": "gradient of inputs", "W": "gradient of weights"}
_INK = "#333333"
_US_PER_UNIT = 1000.0
_MIN_WIDTH, _MAX_WIDTH, _INCHES_PER_STEP = 8.0, 40.0, 0.2
_LABEL_POINTS = 6


def save_trace(timeline: Timeline, path: Path) -> None:
    """Write Chrome trace events, a thread per rank; one unit of time becomes a millisecond."""
    events: list[dict[str, object]] = []
    for rank, row in enumerate(timeline.spans):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        for span in row:
            category = "+".join(part.op for part in span.step.parts)
            start, length = float(span.start) * _US_PER_UNIT, float(span.end - span.start) * _US_PER_UNIT
            event = {"ph": "X", "name": str(span.step), "cat": category, "pid": 0, "tid": rank}
            events.append({**event, "ts": start, "dur": length})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def save_gantt(timeline: Timeline, path: Path) -> None:
    """Draw one row per rank as PNG.

    Boxes bear their micro-batch; the rank's second stage is paler; overlapped pairs are stacked in one frame.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    shortest = min(span.end - span.start for row in timeline.spans for span in row)
    width = min(_MAX_WIDTH, max(_MIN_WIDTH, _INCHES_PER_STEP * timeline.duration / shortest))
    figure = Figure(figsize=(width, 1.1 + 0.32 * schedule.num_ranks), dpi=150, layout="constrained")
    axes = figure.subplots()
    for rank, row in enumerate(timeline.spans):
        first_stage = schedule.stages_of(rank)[0]
        for span in row:
            _draw(axes, span, rank, first_stage)
    axes.set_xlim(0, timeline.duration)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.tick_params(colors=_INK, length=0)
    axes.set_xlabel("time", color=_INK)
    sizes = f"{schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"
    axes.set_title(f"{schedule.kind}: {sizes}, {timeline.duration:g} units of time", loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    used = {part.op for row in timeline.spans for span in row for part in span.step.parts}
    handles = [Patch(facecolor=_COLORS[op][0], label=_NAMES[op]) for op in _NAMES if op in used]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, labelcolor=_INK)
    figure.savefig(path, format="png")


def _draw(axes, span: Span, rank: int, first_stage: int) -> None:  # type: ignore[no-untyped-def]
    parts = span.step.parts
    height = 0.8 / len(parts)
    for index, part in enumerate(parts):
        bottom = rank - 0.4 + index * height
        _draw_part(axes, part, (span.start, span.end), (bottom, height), part.stage != first_stage)
    if len(parts) > 1:
        frame = (span.start, span.end - span.start), (rank - 0.4, 0.8)
        axes.broken_barh([frame[0]], frame[1], facecolor="none", edgecolor="black", linewidth=0.8, zorder=3)


def _draw_part(  # type: ignore[no-untyped-def]
    axes, part: Action, times: tuple[float, float], place: tuple[float, float], pale: bool
) -> None:
    (start, end), (bottom, height) = times, place
    color = _COLORS[part.op][pale]
    axes.broken_barh([(start, end - start)], (bottom, height), facecolor=color, edgecolor="white", linewidth=0.4)
    style = {"fontsize": _LABEL_POINTS, "color": _INK if pale else "white", "ha": "center", "va": "center"}
    axes.text((start + end) / 2, bottom + height / 2, str(part.micro_batch), **style)
