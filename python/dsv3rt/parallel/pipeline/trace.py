"""Reads profiler's traces of a training step: what a rank computed and carried when, by kind of work.

On a CPU the times are those of the phases' annotations (`lanes.Walk`); on a GPU those of kernels and copies on the
device, each given to the innermost annotation that was open on the host when it was launched.
"""

from __future__ import annotations

import bisect
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MESSAGES, BUCKETS = "messages", "buckets"  # annotations beside the phases'

COMPUTES = ("attention F", "attention B", "experts F", "experts B", "weight gradients", "head", "other")
EXCHANGES = ("dispatch", "combine")
CARRIES = (*EXCHANGES, MESSAGES, BUCKETS)

_PHASE = re.compile(r"\d+([FBIW])\d+ (attention|dispatch|experts|combine|head)")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_NOTES, _DEVICE_NOTES = "user_annotation", "gpu_user_annotation"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ARGUMENTS = ("correlation", "stream", "device", "Process Group Description")
_GROUPS = {"zero": BUCKETS, "('activation": MESSAGES, "('gradient": MESSAGES}  # beginnings of descriptions, mesh.groups

Event = dict[str, Any]


@dataclass(frozen=True, order=True)
class Bar:
    """One stretch of work, in microseconds; `name` is its annotation's, "3B2 dispatch", empty without one."""

    start: float
    end: float
    kind: str
    name: str = ""


@dataclass(frozen=True)
class Overlap:
    """Of one rank, in microseconds: time in which it computes, in which it communicates, and in which it does both.
    A kernel that waits for a peer counts as communication, and receives are posted ahead: `messages` are mostly that.
    """

    length: float
    computing: float
    carrying: float
    both: float

    @property
    def hidden(self) -> float:
        """The part of the communication that lies under computation; 0 without any."""
        return self.both / self.carrying if self.carrying else 0.0


def kind_of(name: str) -> str | None:
    """What an annotation stands for; None: nothing of ours."""
    if name in (MESSAGES, BUCKETS):
        return name
    found = _PHASE.fullmatch(name)
    if found is None:
        return None
    op, phase = found.groups()
    if phase in ("dispatch", "combine", "head"):
        return phase
    return "weight gradients" if op == "W" else f"{phase} {'F' if op == 'F' else 'B'}"


def slim(trace: dict[str, Any]) -> dict[str, Any]:
    """The events that `bars` reads, without arguments that it doesn't."""
    events = []
    for event in trace["traceEvents"]:
        category = event.get("cat", "")
        launches = category in _LAUNCHES and "correlation" in event.get("args", {})
        is_note = category in (_NOTES, _DEVICE_NOTES)
        if not (category in _ON_DEVICE or is_note or launches) or event.get("ph") != "X":
            continue
        arguments = {key: value for key, value in event.get("args", {}).items() if key in _ARGUMENTS}
        kept = {key: event[key] for key in ("ph", "cat", "pid", "tid", "ts", "dur")}
        events.append({**kept, "name": event["name"][:80], "args": arguments})
    slimmed = {key: trace[key] for key in trace if key in ("baseTimeNanoseconds", "displayTimeUnit")}
    return {**slimmed, "traceEvents": events}


def load(path: Path) -> dict[str, Any]:
    """A trace file, gzipped or not.

    Raises:
        ValueError: it is none.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt") as file:
            trace: dict[str, Any] = json.load(file)
        assert isinstance(trace["traceEvents"], list)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError, gzip.BadGzipFile):
        raise ValueError(f"{path}: must be a Chrome trace of torch.profiler, got something else") from None
    return trace


def save(trace: dict[str, Any], path: Path) -> None:
    """Gzipped where the name ends so."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        json.dump(trace, file, separators=(",", ":"))


def bars(trace: dict[str, Any]) -> list[Bar]:
    """All work of a rank, by its start, on a clock that ranks of one host share."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    segments = _innermost(_notes(events, _NOTES))
    on_device = [event for event in events if event.get("cat") in _ON_DEVICE]
    found = list(_device_bars(events, on_device, segments)) if on_device else segments
    return sorted(Bar(base + bar.start, base + bar.end, bar.kind, bar.name) for bar in found)


def overlap(work: Sequence[Bar], kinds: Sequence[str] = CARRIES) -> Overlap:
    """Of communication of these kinds."""
    computing = _union(bar for bar in work if bar.kind in COMPUTES)
    carrying = _union(bar for bar in work if bar.kind in kinds)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in _meeting(computing, carrying))
    length = max((bar.end for bar in work), default=0.0) - min((bar.start for bar in work), default=0.0)
    return Overlap(length, _sum(computing), _sum(carrying), both)


def _notes(events: Iterable[Event], category: str) -> list[Bar]:
    named = ((event, kind_of(event["name"])) for event in events if event.get("cat") == category)
    return [_bar(event, kind, event["name"]) for event, kind in named if kind is not None]


def _bar(event: Event, kind: str, name: str = "") -> Bar:
    return Bar(event["ts"], event["ts"] + event["dur"], kind, name)


def _innermost(notes: Iterable[Bar]) -> list[Bar]:
    """Nested annotations as pieces that do not overlap: the inner one's time is not the outer one's."""
    pieces: list[Bar] = []
    open_notes: list[Bar] = []
    at = 0.0

    def upto(time: float) -> None:
        nonlocal at
        if open_notes and time > at:
            pieces.append(Bar(at, time, open_notes[-1].kind, open_notes[-1].name))
        at = max(at, time)

    for note in sorted(notes, key=lambda note: (note.start, -note.end)):
        while open_notes and open_notes[-1].end <= note.start:
            upto(open_notes[-1].end)
            open_notes.pop()
        upto(note.start)
        at = note.start
        open_notes.append(note)
    while open_notes:
        upto(open_notes[-1].end)
        open_notes.pop()
    return pieces


def _device_bars(events: Sequence[Event], on_device: Iterable[Event], segments: Sequence[Bar]) -> Iterator[Bar]:
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    by_stream: dict[Any, list[Bar]] = {}
    for stream in {event["tid"] for event in events if event.get("cat") == _DEVICE_NOTES}:
        here = [event for event in events if event["tid"] == stream]
        by_stream[stream] = _innermost(_notes(here, _DEVICE_NOTES))
    for event in on_device:
        arguments = event.get("args", {})
        launch = launches.get(arguments.get("correlation"))
        # Without a launch, by the device's own ranges: from an annotation's first to its last kernel on a stream.
        where = (by_stream.get(event["tid"], []), event["ts"]) if launch is None else (segments, launch)
        note = _at(*where)
        kind = _of_group(arguments.get("Process Group Description", "")) or (note.kind if note else "other")
        yield _bar(event, kind, note.name if note else "")


def _of_group(description: str) -> str | None:
    return next((kind for beginning, kind in _GROUPS.items() if description.startswith(beginning)), None)


def _at(pieces: Sequence[Bar], time: float) -> Bar | None:
    index = bisect.bisect_right(pieces, time, key=lambda piece: piece.start) - 1
    return pieces[index] if index >= 0 and time <= pieces[index].end else None


def _union(work: Iterable[Bar]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for bar in sorted(work):
        if joined and bar.start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], bar.end))
        else:
            joined.append((bar.start, bar.end))
    return joined


def _meeting(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """The pairs of stretches of both that may overlap."""
    i = j = 0
    while i < len(first) and j < len(second):
        yield first[i], second[j]
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1


def _sum(stretches: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in stretches)
