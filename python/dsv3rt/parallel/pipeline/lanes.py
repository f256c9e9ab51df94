"""Phases on two streams of a GPU: what computes on one, what communicates on the other. On a CPU all run in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv3rt.config import ParallelConfig

MESSAGE_SMS = 1  # multiprocessors of a message under way; a phase takes far longer than its message does by one

Phase = Literal["attention", "dispatch", "experts", "combine", "head"]


@dataclass(frozen=True)
class OfChunk:
    """A phase of one chunk of a micro-batch's tokens. It waits for that chunk's phase before it alone, if there is one,
    or else for the last phase of the whole micro-batch, whose next one waits for all chunks'."""

    phase: Phase
    chunk: int


def product_sms(config: ParallelConfig, num_channels: int, device: torch.device) -> int:
    """How many multiprocessors products may take beside the messages of so many channels and rows of experts; 0: all.

    A product's blocks share its tiles out beforehand, so one that has to wait for its multiprocessor doubles the time;
    and a message that is awaited holds its own all the while.
    """
    if config.product_sms > 0 or num_channels == 0 or device.type != "cuda":
        return config.product_sms
    all_sms = torch.cuda.get_device_properties(device).multi_processor_count
    # Blocks come in clusters of two, so where one multiprocessor is taken, its neighbour may stay idle.
    taken = 2 * MESSAGE_SMS * num_channels + (config.expert_sms if config.ep > 1 else 0)
    return max(all_sms - taken, all_sms // 2)


class Lanes:
    """The two streams. Made once: autograd runs a backward on the stream that its forward ran on.

    product_sms: multiprocessors that products in FP8 may take on the one, so that the other has the rest; 0: all.
    """

    def __init__(self, device: torch.device, product_sms: int = 0) -> None:
        self.product_sms = product_sms
        self._streams: dict[bool, torch.cuda.Stream] = {}
        if device.type == "cuda":
            self._streams = {communicates: torch.cuda.Stream(device) for communicates in (False, True)}

    def of(self, phase: Phase) -> torch.cuda.Stream | None:
        return self._streams.get(_communicates(phase))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Keep memory that crosses from one stream to the other from being used again too early."""
        for tensor in tensors:
            for stream in self._streams.values():
                tensor.record_stream(stream)


class Walk:
    """One micro-batch's way through a stage, forward or backward, phase by phase.

    `phases` names each phase before it does it, so that the phase can be put on its stream. In a profiler's trace it
    has the walk's name before its own.
    """

    def __init__(self, phases: Iterator[Phase | OfChunk], lanes: Lanes, name: str = "") -> None:
        self._name = name
        self._phases = phases
        self._lanes = lanes
        self._next = next(phases, None)
        self._done: list[torch.cuda.Event] = []  # the last whole phase
        self._done_by_chunk: dict[int, torch.cuda.Event] = {}  # each chunk's last phase since then
        if lanes.of("attention") is not None:
            self._done = [torch.cuda.current_stream().record_event()]

    @property
    def upcoming(self) -> Phase | None:
        return self._next.phase if isinstance(self._next, OfChunk) else self._next

    def step(self) -> bool:
        """Do one phase; returns whether there was one."""
        now, phase = self._next, self.upcoming
        if now is None or phase is None:
            return False
        stream = self._lanes.of(phase)
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        with on_stream, torch.profiler.record_function(f"{self._name} {phase}"):
            if stream is not None:
                for event in self._awaited(now):
                    stream.wait_event(event)
            self._next = next(self._phases, None)
            if stream is not None and isinstance(now, OfChunk):
                self._done_by_chunk[now.chunk] = stream.record_event()
            elif stream is not None:
                self._done, self._done_by_chunk = [stream.record_event()], {}
        return True

    def finish(self) -> None:
        """Do the rest; what follows on the current stream comes after it."""
        while self.step():
            pass
        for event in (*self._done, *self._done_by_chunk.values()):
            torch.cuda.current_stream().wait_event(event)

    def _awaited(self, now: Phase | OfChunk) -> list[torch.cuda.Event]:
        if not isinstance(now, OfChunk):
            return [*self._done, *self._done_by_chunk.values()]
        before = self._done_by_chunk.get(now.chunk)
        return self._done if before is None else [before]


def run_into_each_other(first: Walk, second: Walk) -> None:
    """Phase by phase, computation and communication in turn as far as they come, so that one hides behind the other.

    A forward (attention, dispatch, experts, combine) and a backward (the reverse) of a block meet in the pairs of the
    DeepSeek-V3 report's figure 4: each phase of one that computes beside one of the other that communicates.
    """
    walks = [first, second]
    communicates = True
    while any(walk.upcoming for walk in walks):
        wanted = [walk for walk in walks if walk.upcoming and _communicates(walk.upcoming) != communicates]
        walk = (wanted or [walk for walk in walks if walk.upcoming])[0]
        communicates = walk.upcoming is not None and _communicates(walk.upcoming)
        walk.step()
        walks.sort(key=lambda other: other is walk)  # the other one's turn, where both could go
    first.finish()
    second.finish()


def _communicates(phase: Phase) -> bool:
    return phase in ("dispatch", "combine")
