"""`dsv3rt plan schedule`: the table, the files, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3rt import cli
from dsv3rt.parallel.pipeline.schedule import KINDS

SIZES = ["--ranks", "4", "--micro-batches", "8"]


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    code = cli.main(["plan", "schedule", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_plan_compares_all_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = plan(capsys, "--ranks", 8, "--micro-batches", 16, "--overlap", 2.5)
    assert code == 0
    rows = {cells[0]: cells for cells in (line.replace("*", " ").split() for line in lines[1:6])}
    assert tuple(rows) == KINDS
    assert {kind: cells[1] for kind, cells in rows.items()} == {
        "1f1b": "21", "interleaved": "10.5", "zb1p": "7", "dualpipev": "5.25", "dualpipe": "4.5",
    }  # fmt: skip
    assert all(cells[1] == cells[2] and cells[-2] == cells[-3] for cells in rows.values())
    assert [cells[-1] for cells in rows.values()] == ["1x", "1x", "1x", "1x", "2x"]
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["dualpipe"]


def test_plan_writes_picture_trace_and_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("png", "json", "csv")}
    outputs = ("--gantt", files["png"], "--trace", files["json"], f"--csv={files['csv']}")
    assert plan(capsys, *SIZES, "--kind", "dualpipev", *outputs)[0] == 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["json"].read_text())["traceEvents"]
    assert files["csv"].read_text().splitlines()[3].startswith("3F0,4F0,3F1,4F1")


def test_plan_says_why_a_schedule_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = plan(capsys, "--kind", "1f1b", "--ranks", 3, "--micro-batches", 6)
    assert code == 0
    assert lines[5].split(maxsplit=1)[1] == "num_ranks must be even for dualpipe, got 3"
    assert lines[4].split()[0] == "dualpipev"
    assert len(lines[4].split()) > 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", 3, "--micro-batches", 6), "schedule: num_ranks must be even for dualpipe, got 3"),
        ((*SIZES, "--kind", "gpipe"), "argument --kind: invalid choice: 'gpipe'"),
        ((*SIZES, "--kind"), "argument --kind: expected one argument"),
        (("--ranks", 4), "the following arguments are required: --micro-batches"),
        ((*SIZES, "--w", 2), "plan schedule: --b must be greater than --w, its part, got 2 and 2"),
        ((*SIZES, "--f", 0), "schedule: forward time must be positive and finite, got 0.0"),
        ((*SIZES, "--overlap", 1), "schedule: overlap time must be at least its longer part (2.0), got 1.0"),
        ((*SIZES, "--csv", "/nowhere/out.csv"), "/nowhere/out.csv: No such file or directory"),
        ((*SIZES, "--gantt", "/nowhere/out.png"), "/nowhere/out.png: No such file or directory"),
        ((*SIZES, "--train.steps", 3), "unrecognized arguments: --train.steps 3"),
    ],
)
def test_plan_rejects_in_one_line(
    arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = plan(capsys, *arguments)
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith(f"dsv3rt: error: {message}")
