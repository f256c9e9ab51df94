"""Device times by CUDA events, and the figures made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

FLUSH_BYTES = 2**30  # far more than the L2 cache of any GPU; writing it also takes longer than any op takes to launch
ROUNDS = 3
HEAD_START_CYCLES = 30_000_000  # some 20 ms

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is measured: `work` is FLOPs for "tflops", bytes read and written for "gbps", not looked at for "us"."""

    op: str
    shape: str
    metric: Literal["tflops", "gbps", "us"]
    work: float = 0.0

    def value(self, seconds: float, work: float | None = None) -> float:
        work = self.work if work is None else work
        return {"tflops": work / seconds / 1e12, "gbps": work / seconds / 1e9, "us": seconds * 1e6}[self.metric]


@dataclass(frozen=True)
class Peer:
    """What ours is measured against. `work` is given where it differs from the case's own."""

    name: str
    run: Run
    work: float | None = None


def sample_cuda(fn: Run, *, warmup: int = 5, reps: int = 30, flush_l2: bool = True) -> list[float]:
    """Seconds of `reps` calls of `fn` on the current device, each between two events.

    With `flush_l2` a large buffer is overwritten before every call, so that operands come from memory as they do in a
    training step. The device sleeps first and each write takes a while too: the host stays ahead, which keeps its own
    time, hiccups included, out of the figure.
    """
    for _ in range(warmup):
        fn()
    scratch = torch.empty(FLUSH_BYTES if flush_l2 else 0, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    for start, end in events:
        scratch.zero_()
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def time_cuda(fn: Run, *, warmup: int = 5, reps: int = 30, flush_l2: bool = True) -> float:
    """The median of `sample_cuda`, in seconds."""
    return median(sample_cuda(fn, warmup=warmup, reps=reps, flush_l2=flush_l2))


def kernel_seconds(fn: Run, kernel: str, *, reps: int = 10) -> float:
    """What the profiler says of the kernel alone: the median of its runs, with operands from memory.

    Raises:
        RuntimeError: no kernel with `kernel` in its name ran.
    """
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(reps):
            scratch.zero_()
            fn()
        torch.cuda.synchronize()
    times = [event.device_time for event in profile.events() if kernel in event.name]
    if not times:
        raise RuntimeError(f"no kernel named {kernel} ran")
    return median(times) * 1e-6


def sample_both(ours: Run, peer: Run, *, reps: int = 30) -> tuple[list[float], list[float]]:
    """Samples of both, taken in turns, so that a clock that drifts drifts for both."""
    our_samples: list[float] = []
    peer_samples: list[float] = []
    for _ in range(ROUNDS):
        our_samples += sample_cuda(ours, reps=-(-reps // ROUNDS))
        peer_samples += sample_cuda(peer, reps=-(-reps // ROUNDS))
    return our_samples, peer_samples


def copy_peer(num_bytes: int = 2**30) -> Peer:
    """The card's copy bandwidth, read plus write, over buffers far larger than its caches."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Peer("copy", lambda: target.copy_(source), work=2.0 * num_bytes)


def figures(case: Case, seconds: float, peer: Peer, peer_seconds: float) -> dict[str, str | float]:
    """One line of evidence: ours, the peer's, and their ratio, above 1 where ours is better."""
    value, peer_value = case.value(seconds), case.value(peer_seconds, peer.work)
    ratio = peer_value / value if case.metric == "us" else value / peer_value
    return {
        "op": case.op,
        "shape": case.shape,
        "metric": case.metric,
        "value": round(value, 3),
        "peer": peer.name,
        "peer_value": round(peer_value, 3),
        "ratio": round(ratio, 4),
    }


class DeviceClock:
    """A clock for pytest-benchmark that moves only by device times already measured, so its statistics are of those."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
