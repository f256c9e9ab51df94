"""An exponential moving average of the weights, in host memory, beside the training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier

import torch
from torch import Tensor

PIECE = 1 << 24  # elements that arrive and are averaged at a time: 64 MiB
MOST_WORKERS = 16  # memory, not cores, should be the limit then


class Average:
    """The average of FP32 masters; each `update` runs in threads while the next steps compute.

    Before the optimizer changes the masters: `release_masters` (DeepSeek-V3 report sec. 3.2.3). From a GPU they come
    over a stream of their own to pinned memory that holds them all, so that the GPU waits for these copies alone, and
    the host only where an update begins and the one before is not done.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        """masters: contiguous, all on one device. decay: of an update."""
        self._masters = masters
        self._decay = decay
        self._values = {name: master.detach().to("cpu", copy=True) for name, master in masters.items()}
        device = next((master.device for master in masters.values()), torch.device("cpu"))
        self._ferry = _Ferry(device, _pieces(masters.values())) if device.type == "cuda" else None
        self._num_workers = torch.get_num_threads() if self._ferry is None else _cores_of_a_gpu()
        self._pool = _start(self._num_workers)
        self._running: list[Future[None]] = []

    def update(self) -> None:
        """average = decay * average + (1 - decay) * master, begun now, of masters as the work queued so far leaves."""
        self.wait()
        masters: Iterable[tuple[Tensor, torch.cuda.Event | None]]
        if self._ferry is None:
            masters = [(piece, None) for piece in _pieces(self._masters.values())]
        else:
            masters = self._ferry.send(_pieces(self._masters.values()))
        pairs = iter(list(zip(_pieces(self._values.values()), masters, strict=True)))
        self._running = [self._pool.submit(self._follow, pairs) for _ in range(self._num_workers)]

    def release_masters(self) -> None:
        """What is queued on the current stream from now on may change the masters."""
        if self._ferry is None:
            self.wait()
        else:
            self._ferry.hold_current_stream()

    def wait(self) -> None:
        """Until the update that was begun is done."""
        for worker in self._running:
            worker.result()
        self._running = []

    def tensors(self) -> dict[str, Tensor]:
        """By the parameters' names, up to date; loading is in place."""
        self.wait()
        return self._values

    def _follow(self, pairs: Iterator[tuple[Tensor, tuple[Tensor, torch.cuda.Event | None]]]) -> None:
        """A worker takes the next piece, as long as there is one: none waits for a slower one."""
        for value, (master, arrival) in pairs:
            if arrival is not None:
                arrival.synchronize()
            value.lerp_(master, 1.0 - self._decay)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        if tensor.numel() > 0:
            yield from tensor.detach().view(-1).split(PIECE)


def _cores_of_a_gpu() -> int:
    """This process's share of them, less one for its main thread and one for its backward."""
    share = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
    return max(1, min(share - 2, MOST_WORKERS))


def _start(num_workers: int) -> ThreadPoolExecutor:
    """Threads that take one core each. So they are as many as we say: torchrun leaves all of torch's one core, and
    threads of OpenMP wait for each other in a loop, on cores that the training may need."""
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="average")
    all_there = Barrier(num_workers)

    def take_one_core() -> None:
        torch.get_num_threads()  # the first question settles a thread's number
        torch.set_num_threads(1)  # of this thread, and of all that start from now on
        all_there.wait()

    others = torch.get_num_threads()
    wait([pool.submit(take_one_core) for _ in range(num_workers)])
    torch.set_num_threads(others)
    return pool


class _Ferry:
    """Brings pieces of FP32 tensors from a GPU to pinned memory, all at once, on its own stream."""

    def __init__(self, device: torch.device, pieces: Iterable[Tensor]) -> None:
        self._stream = torch.cuda.Stream(device)
        self._places = [torch.empty(piece.shape, dtype=torch.float32, pin_memory=True) for piece in pieces]
        self._arrivals = [torch.cuda.Event(blocking=True) for _ in self._places]  # a wait sleeps, it does not spin

    def send(self, pieces: Iterable[Tensor]) -> list[tuple[Tensor, torch.cuda.Event]]:
        """What the device's current stream has written by then: each piece's place, and when it is there. The last
        ones must be used up."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for piece, place, arrival in zip(pieces, self._places, self._arrivals, strict=True):
                place.copy_(piece, non_blocking=True)
                arrival.record(self._stream)
        return list(zip(self._places, self._arrivals, strict=True))

    def hold_current_stream(self) -> None:
        """Until what was sent has left."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
