"""Traces: kernels go to the annotation that launched them, and what communication hides is counted on the device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import ROOT
from torch.profiler import ProfilerActivity, profile, record_function

from dsv3rt.parallel.pipeline import trace
from dsv3rt.parallel.pipeline.trace import Bar

COMPUTE, CARRY, NCCL = 7, 20, 28  # streams
MAIN, BACKWARD = 100, 200  # threads of the host


def event(category: str, name: str, ts: float, dur: float, tid: int, **arguments: Any) -> dict[str, Any]:
    shared = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur}
    return {**shared, "args": arguments}


def launched(
    name: str, number: int, at: float, thread: int, on: tuple[float, float, int], category: str = "kernel", **more: Any
) -> list[dict[str, Any]]:
    """A launch on the host, and its kernel on the device: start, duration, stream."""
    start, length, stream = on
    return [
        event("cuda_runtime", "cudaLaunchKernel", at, 1.0, thread, correlation=number),
        event(
            category, name, start, length, stream, correlation=number, stream=stream, device=0, grid=[1, 2, 3], **more
        ),
    ]


def of_a_gpu() -> dict[str, Any]:
    """A forward's attention and dispatch, a backward's experts beside the latter, W, a message and a bucket inside W;
    a kernel that nobody launched, two outside of all annotations."""
    group = {"Process Group Description": "zero"}
    return {"baseTimeNanoseconds": 5000, "schemaVersion": 1, "traceEvents": [
        event("user_annotation", "0F1 attention", 0, 10, MAIN),
        event("user_annotation", "0F1 dispatch", 10, 5, MAIN),
        event("user_annotation", "3B0 experts", 15, 10, MAIN),
        event("user_annotation", "messages", 26, 2, MAIN),
        event("user_annotation", "3W0 experts", 30, 10, MAIN),
        event("user_annotation", "buckets", 34, 2, MAIN),
        event("user_annotation", "Optimizer.step#AdamW.step", 50, 5, MAIN),
        event("cpu_op", "aten::mm", 1, 2, MAIN),
        *launched("attention", 1, 2, MAIN, (100, 40, COMPUTE)),
        *launched("pull", 2, 11, MAIN, (140, 60, CARRY)),
        *launched("Memset", 3, 17, BACKWARD, (150, 10, COMPUTE), "gpu_memset"),
        *launched("dgrad", 4, 18, BACKWARD, (160, 20, COMPUTE)),
        *launched("ncclDevKernel_SendRecv", 5, 26.5, MAIN, (200, 30, NCCL)),
        *launched("wgrad", 6, 31, MAIN, (220, 20, COMPUTE)),
        *launched("pack", 7, 34.5, MAIN, (240, 5, COMPUTE)),
        *launched("ncclDevKernel_SendRecv", 8, 39, MAIN, (245, 10, NCCL), **group),
        event("gpu_user_annotation", "3W0 experts", 218, 60, COMPUTE),
        event("kernel", "orphan", 260, 4, COMPUTE, stream=COMPUTE),
        *launched("adamw", 9, 51, MAIN, (300, 10, COMPUTE)),
        *launched("late", 10, 70, MAIN, (310, 10, COMPUTE)),
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "pid": 1, "tid": MAIN, "ts": 2, "id": 1},
    ]}  # fmt: skip


WANT = [
    Bar(105, 145, "attention F", "0F1 attention"), Bar(145, 205, "dispatch", "0F1 dispatch"),
    Bar(155, 165, "experts B", "3B0 experts"), Bar(165, 185, "experts B", "3B0 experts"),
    Bar(205, 235, "messages", "messages"), Bar(225, 245, "weight gradients", "3W0 experts"),
    Bar(245, 250, "buckets", "buckets"), Bar(250, 260, "buckets", "3W0 experts"),
    Bar(265, 269, "weight gradients", "3W0 experts"), Bar(305, 315, "other"), Bar(315, 325, "other"),
]  # fmt: skip


def test_kernels_belong_to_what_launched_them() -> None:
    assert trace.bars(of_a_gpu()) == WANT


def test_slim_traces_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rank-3.json.gz"
    slim = trace.slim(of_a_gpu())
    trace.save(slim, path)
    assert trace.bars(trace.load(path)) == WANT
    assert {e["cat"] for e in slim["traceEvents"]} == {
        "user_annotation", "gpu_user_annotation", "kernel", "gpu_memset", "cuda_runtime",
    }  # fmt: skip
    assert all("grid" not in e["args"] for e in slim["traceEvents"])


def test_overlap_is_what_lies_under_computation() -> None:
    """Of the dispatch the backward's 30 of 60, of the message 10 of 30, of the buckets nothing."""
    found = trace.overlap(WANT)
    assert (found.length, found.computing, found.carrying, found.both) == (220, 114, 105, 40)
    assert trace.overlap(WANT, trace.EXCHANGES).hidden == 0.5
    assert trace.overlap(WANT, (trace.BUCKETS,)).hidden == 0
    assert trace.overlap([]).hidden == 0


def test_inner_annotations_take_their_time_from_outer_ones() -> None:
    notes = [("0B0 attention", 0, 10), ("buckets", 2, 3), ("buckets", 5, 1), ("0F1 head", 12, 4)]
    events = [event("user_annotation", name, ts, dur, MAIN) for name, ts, dur in notes]
    found = [(bar.start, bar.end, bar.kind) for bar in trace.bars({"traceEvents": events})]
    assert found == [
        (0, 2, "attention B"), (2, 5, "buckets"), (5, 6, "buckets"), (6, 10, "attention B"), (12, 16, "head"),
    ]  # fmt: skip


def test_a_profile_of_a_cpu(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        for name in ("1F0 attention", "1F0 dispatch", "1W0 experts", "something else"):
            with record_function(name):
                torch.ones(100).sum()
    traced.export_chrome_trace(str(tmp_path / "whole.json"))
    found = trace.bars(trace.slim(trace.load(tmp_path / "whole.json")))
    assert [bar.kind for bar in found] == ["attention F", "dispatch", "weight gradients"]


def test_no_trace_is_one_line(tmp_path: Path) -> None:
    for name, text in (("a.json", "{}"), ("b.json", "[1]"), ("c.json.gz", "no"), ("d.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="must be a Chrome trace"):
            trace.load(tmp_path / name)


def test_picture_of_two_ranks(tmp_path: Path) -> None:
    for rank in (10, 9):
        trace.save(of_a_gpu(), tmp_path / f"rank-{rank}.json.gz")
    files = sorted(map(str, tmp_path.glob("*.gz")))
    command = [sys.executable, str(ROOT / "scripts" / "trace_picture.py"), *files, "--out", str(tmp_path / "step.png")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[:2] for line in printed[2:]] == [["rank", "9"], ["rank", "10"]]
    assert "50.0%" in printed[2]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
