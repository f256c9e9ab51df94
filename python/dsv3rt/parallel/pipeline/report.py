"""`dsv3rt plan schedule`: what the schedules cost, side by side, and one of them as picture, trace or table.

All are compared on the same ranks and the same model. Times are those of a rank's share of the model (one stage of
1F1B); a schedule that cuts the model into more stages has shorter ones.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from dsv3rt.parallel.pipeline import render
from dsv3rt.parallel.pipeline.schedule import KINDS, Kind, Schedule, generate
from dsv3rt.parallel.pipeline.simulator import Costs, Timeline, simulate

_HEADER = ("schedule", "bubble", "by formula", "formula", "duration", "activations", "by formula", "parameters")
_FORMULAS = {
    "1f1b": "(R-1)(F+B)",
    "interleaved": "(R-1)(F+B)/V",
    "zb1p": "(R-1)(F+B-2W)",
    "dualpipev": "(R-1)/2 (F&B+B-3W)",
    "dualpipe": "(R/2-1)(F&B+B-3W)",
}
_LEGEND = """\
bubble: idle time of the rank that idles most. activations: peak on a rank, in micro-batches of its share of the model.
R ranks, V stages a rank, F forward, B backward, W its weight part, F&B both overlapped. The formulas assume that W is
no longer than F and than B-W (for DualPipe F = B-W), that messages take no time, that there are micro-batches enough
(for interleaved, a multiple of R)."""


@dataclass(frozen=True)
class Comparison:
    """A schedule's simulated cost beside the papers' formulas; all of it per rank, in times of a rank's share."""

    kind: Kind
    bubble: float
    bubble_formula: float
    duration: float
    activations: float
    activations_formula: float
    parameters: int


def compare(timeline: Timeline, costs: Costs) -> Comparison:
    """Set a timeline, simulated with `rank_costs(schedule, costs)`, beside the formulas for `costs`."""
    schedule = timeline.schedule
    ranks = range(schedule.num_ranks)
    return Comparison(
        kind=schedule.kind,
        bubble=max(timeline.idle(rank) for rank in ranks),
        bubble_formula=bubble_formula(schedule, costs),
        duration=timeline.duration,
        activations=timeline.peak_in_flight / _stages_per_share(schedule),
        activations_formula=activations_formula(schedule),
        parameters=len(schedule.chains),
    )


def rank_costs(schedule: Schedule, costs: Costs) -> Costs:
    """What one stage takes when a rank's share of the model takes `costs`."""
    return costs.divided(_stages_per_share(schedule))


def bubble_formula(schedule: Schedule, costs: Costs) -> float:
    """The papers' bubble. DualPipeV's is that of DualPipe over twice as many, half as long stages.

    Sources: DeepSeek-V3 report, table 2; Zero Bubble (arXiv 2401.10241); interleaved: arXiv 2104.04473, section 2.2.
    """
    ranks, both = schedule.num_ranks, costs.forward + costs.backward
    if schedule.kind == "zb1p":
        return (ranks - 1) * (both - 2 * costs.weight_grad) / _stages_per_share(schedule)
    if schedule.kind in ("1f1b", "interleaved"):
        return (ranks - 1) * both / _stages_per_share(schedule)
    pair = costs.overlapped + costs.backward - 3 * costs.weight_grad
    return (ranks - 1) * pair / 2 if schedule.kind == "dualpipev" else (ranks / 2 - 1) * pair


def activations_formula(schedule: Schedule) -> float:
    """Peak activations of a rank in micro-batches of its share of the model, given enough micro-batches.

    Sources: DeepSeek-V3 report, table 2 (DualPipeV: its PP + 1 half shares); interleaved: arXiv 2205.05198, section 4.
    """
    ranks = schedule.num_ranks
    extra = {"interleaved": (ranks - 1) / _stages_per_share(schedule), "dualpipe": 1.0, "dualpipev": 0.5}
    return ranks + extra.get(schedule.kind, 0.0)


def _stages_per_share(schedule: Schedule) -> int:
    return schedule.stages_per_copy // schedule.num_ranks


def add_options(parser: argparse.ArgumentParser) -> None:
    """Tell argparse what `run` reads."""
    parser.add_argument("--kind", choices=KINDS, default="dualpipe", help="the schedule to write out")
    parser.add_argument("--ranks", type=int, required=True, help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, required=True, help="micro-batches of a step")
    parser.add_argument("--stages-per-rank", type=int, default=2, metavar="V", help="of interleaved (default 2)")
    parser.add_argument("--put-off", type=int, default=0, metavar="N", help="most W owed at a time (default: any)")
    parser.add_argument("--f", type=float, default=1.0, help="time of a forward (default 1)")
    parser.add_argument("--b", type=float, default=2.0, help="time of a full backward (default 2)")
    parser.add_argument("--w", type=float, default=1.0, help="the part of --b for weight gradients (default 1)")
    parser.add_argument("--overlap", type=float, help="time of an overlapped forward and backward (default --f + --b)")
    parser.add_argument("--comm", type=float, default=0.0, help="time of a message between ranks (default 0)")
    parser.add_argument("--gantt", type=Path, metavar="PNG", help="draw the schedule")
    parser.add_argument("--trace", type=Path, metavar="JSON", help="write it as a Chrome trace")
    parser.add_argument("--csv", type=Path, metavar="CSV", help="write its table, a line per rank, in torch's words")


def run(options: argparse.Namespace) -> int:
    """Print the comparison, write the files asked for; returns the exit code."""
    if options.put_off < 0:
        raise ValueError(f"plan schedule: --put-off must not be negative, got {options.put_off}")
    if not options.b > options.w:
        raise ValueError(f"plan schedule: --b must be greater than --w, its part, got {options.b:g} and {options.w:g}")
    costs = Costs(options.f, options.b - options.w, options.w, options.overlap, options.comm)
    chosen = _timeline(options.kind, options, costs)
    print(_table([_row(kind, options, costs) for kind in KINDS], options.kind))
    print(_LEGEND)
    if options.gantt:
        render.save_gantt(chosen, options.gantt)
    if options.trace:
        render.save_trace(chosen, options.trace)
    if options.csv:
        chosen.schedule.save_csv(options.csv)
    return 0


def _timeline(kind: Kind, options: argparse.Namespace, costs: Costs) -> Timeline:
    stages = options.stages_per_rank if kind == "interleaved" else None
    schedule = generate(
        kind,
        num_ranks=options.ranks,
        num_micro_batches=options.micro_batches,
        stages_per_rank=stages,
        put_off=options.put_off,
    )
    return simulate(schedule, rank_costs(schedule, costs))


def _row(kind: Kind, options: argparse.Namespace, costs: Costs) -> tuple[str, ...]:
    """A line of the table; a schedule that these sizes do not allow says why instead."""
    try:
        result = compare(_timeline(kind, options, costs), costs)
    except ValueError as error:
        return (kind, str(error).removeprefix("schedule: "))
    bubble = (f"{result.bubble:.4g}", f"{result.bubble_formula:.4g}", _FORMULAS[kind], f"{result.duration:.5g}")
    return (kind, *bubble, f"{result.activations:g}", f"{result.activations_formula:g}", f"{result.parameters}x")


def _table(rows: list[tuple[str, ...]], chosen: Kind) -> str:
    whole = [_HEADER, *(row for row in rows if len(row) == len(_HEADER))]
    widths = [max(len(row[column]) for row in whole) for column in range(1, len(_HEADER))]
    margin = max(len(name) for name in (*KINDS, _HEADER[0]))
    lines = []
    for name, *cells in (_HEADER, *rows):
        if len(cells) == len(widths):
            cells = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join(["*" if name == chosen else " ", name.ljust(margin), *cells]))
    return "\n".join(lines)
