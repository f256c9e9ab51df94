"""The options of `dsv3rt plan`, for argparse."""

from __future__ import annotations

import argparse
from typing import Any

from dsv3rt.parallel.pipeline import report

_ANY_KEY = "Any key of the configuration can be given: --parallel.pp 16 --train.recompute '[\"norm\"]'"


def add_subjects(subjects: argparse._SubParsersAction[Any]) -> None:
    """schedule, stages, memory."""
    schedule = subjects.add_parser(
        "schedule",
        help="compare pipeline schedules, and draw one",
        description="Compare the bubble and the memory of pipeline schedules, simulated and by formula, on the same "
        "ranks and model. Times are those of a rank's share of the model for one micro-batch, in any unit.",
        allow_abbrev=False,
    )
    report.add_options(schedule)
    stages = subjects.add_parser(
        "stages",
        help="say how blocks are cut into stages, and measure what they take",
        description="Print the blocks of every stage and what they cost: in multiplications, in the times of "
        "parallel.layer_costs or, with --measure, in times measured on this machine.",
        epilog=_ANY_KEY,
        usage="dsv3rt plan stages CONFIG.toml [--measure] [--section.key value ...]",
        allow_abbrev=False,
    )
    stages.add_argument("config", metavar="CONFIG.toml")
    stages.add_argument("--measure", action="store_true", help="and print them as parallel.layer_costs")
    memory = subjects.add_parser(
        "memory",
        help="count the bytes of every rank",
        description="Count what each pipeline rank of a configuration needs, by kind. Nothing is allocated. The exit "
        "code is 1 where a rank does not fit.",
        epilog=_ANY_KEY,
        usage="dsv3rt plan memory CONFIG.toml [--gpu-gb GB] [--reserve-gb GB] [--section.key value ...]",
        allow_abbrev=False,
    )
    memory.add_argument("config", metavar="CONFIG.toml")
    memory.add_argument("--gpu-gb", type=float, default=80.0, metavar="GB", help="of a GPU (default: 80)")
    memory.add_argument("--reserve-gb", type=float, default=6.0, metavar="GB", help="for CUDA and NCCL (default: 6)")
