"""An exponential moving average of the weights, in host memory, beside the training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice, zip_longest
from threading import Barrier

import torch
from torch import Tensor

PIECE = 1 << 24  # elements that arrive and are averaged at a time: 64 MiB
MOST_WORKERS = 16  # memory, not cores, should be the limit then


class Average:
    """The average of FP32 masters; each `update` runs in threads while the next steps compute.

    Before the optimizer changes the masters: `release_masters` (DeepSeek-V3 report sec. 3.2.3). From a GPU they come
    over a stream of their own to pinned memory, so that the GPU waits for these copies alone, and the host only where
    an update begins and the one before is not done.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float, every: int = 1) -> None:
        """masters: contiguous, all on one device. decay: of one of the optimizer's updates. every: a piece of PIECE
        elements follows every so many of them, by decay ** every, and pieces take turns: each update brings as much.
        """
        self._masters = masters
        self._every, self._decay = every, decay**every
        self._values = {name: master.detach().to("cpu", copy=True) for name, master in masters.items()}
        device = next((master.device for master in masters.values()), torch.device("cpu"))
        turns = [self._in_turn(masters, number) for number in range(every)]
        self._ferry = _Ferry(device, turns) if device.type == "cuda" else None
        self._num_workers = torch.get_num_threads() if self._ferry is None else _cores_of_a_gpu()
        self._pool = _start(self._num_workers)
        self._running: list[Future[None]] = []

    def update(self, number: int) -> None:
        """average = decay * average + (1 - decay) * master for the pieces whose turn it is, begun now, of masters as
        the work queued so far leaves. number: of the optimizer's update, from 1."""
        self.wait()
        masters, values = self._in_turn(self._masters, number), self._in_turn(self._values, number)
        arriving: Iterable[tuple[Tensor, torch.cuda.Event | None]]
        arriving = [(piece, None) for piece in masters] if self._ferry is None else self._ferry.send(masters)
        pairs = iter(list(zip(values, arriving, strict=True)))
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

    def _in_turn(self, tensors: Mapping[str, Tensor], number: int) -> list[Tensor]:
        return list(islice(_pieces(tensors.values()), number % self._every, None, self._every))

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
    """Brings pieces of FP32 tensors from a GPU to pinned memory, a turn's at once, on its own stream."""

    def __init__(self, device: torch.device, turns: Iterable[Iterable[Tensor]]) -> None:
        self._stream = torch.cuda.Stream(device)
        sizes = [max(numbers) for numbers in zip_longest(*([x.numel() for x in turn] for turn in turns), fillvalue=0)]
        self._places = [torch.empty(size, dtype=torch.float32, pin_memory=True) for size in sizes]
        self._arrivals = [torch.cuda.Event(blocking=True) for _ in self._places]  # a wait sleeps, it does not spin

    def send(self, pieces: Sequence[Tensor]) -> list[tuple[Tensor, torch.cuda.Event]]:
        """What the device's current stream has written by then: each piece's place, and when it is there. The last
        ones must be used up."""
        places = [place[: piece.numel()] for piece, place in zip(pieces, self._places, strict=False)]
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for piece, place, arrival in zip(pieces, places, self._arrivals, strict=False):
                place.copy_(piece, non_blocking=True)
                arrival.record(self._stream)
        return list(zip(places, self._arrivals, strict=False))

    def hold_current_stream(self) -> None:
        """Until what was sent has left."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
