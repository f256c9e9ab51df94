"""What kernels are measured against: copies, an empty kernel, and the chain of torch ops that they replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TypeVar

import torch

from benchmarks.shapes import Batch, Matrix
from benchmarks.timing import Peer

Shape = TypeVar("Shape")
Sized = TypeVar("Sized", bound=Matrix | Batch)
CHAINS = ["torch_eager", "torch_compile"]


def with_chains(shapes: Sequence[Shape]) -> list[tuple[Shape, str]]:
    """Every shape beside the copy and the eager chain, and the first beside the compiled one, which takes seconds."""
    peers = ("copy", *CHAINS)
    return [(shape, peer) for shape in shapes for peer in peers if peer != "torch_compile" or shape == shapes[0]]


def peer_of(name: str, copy_peer: Peer, chain: Callable[..., object], *arguments: object) -> Peer:
    """The peer of this name; the chain is compiled when it is first run, for these arguments' shapes alone."""
    if name == "copy":
        return copy_peer
    return Peer(name, chain_of(name, chain, *arguments))


def copy_of(num_bytes: float) -> Peer:
    """A copy that moves as many bytes: what launch, ramp and tail leave of the bandwidth at this size."""
    source = torch.randint(0, 256, (int(num_bytes) // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Peer("copy_of_this_size", lambda: target.copy_(source), work=2.0 * source.numel())


def beside_copies(shapes: Sequence[Sized]) -> list[tuple[Sized, str]]:
    """Every shape beside a long copy, and those of some hundred megabytes or less also beside one of their size."""
    small = [shape for shape in shapes if prod(shape.sizes) <= 2**25]
    return [*((shape, "copy") for shape in shapes), *((shape, "copy_of_this_size") for shape in small)]


def copy_beside(name: str, copy_peer: Peer, num_bytes: float) -> Peer:
    """The peer that `beside_copies` names."""
    return copy_peer if name == "copy" else copy_of(num_bytes)


def empty_kernel() -> Peer:
    """The launch of a kernel that does nothing."""
    return Peer("empty_kernel", lambda: torch.cuda._sleep(0))


def chain_of(name: str, chain: Callable[..., object], *arguments: object) -> Callable[[], object]:
    if name == "torch_compile":
        torch._dynamo.reset()
        chain = torch.compile(chain, dynamic=False)
    return lambda: chain(*arguments)
