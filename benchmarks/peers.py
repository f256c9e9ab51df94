"""What kernels are measured against: the copy, and the chain of torch ops that they replace, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from benchmarks.timing import Peer

Shape = TypeVar("Shape")
CHAINS = ["torch_eager", "torch_compile"]


def with_chains(shapes: Sequence[Shape]) -> list[tuple[Shape, str]]:
    """Every shape beside the copy and the eager chain, and the first beside the compiled one, which takes seconds."""
    return [
        (shape, peer) for shape in shapes for peer in ("copy", *CHAINS) if peer != "torch_compile" or shape == shapes[0]
    ]


def peer_of(name: str, copy_peer: Peer, chain: Callable[..., object], *arguments: object) -> Peer:
    """The peer of this name; the chain is compiled when it is first run, for these arguments' shapes alone."""
    if name == "copy":
        return copy_peer
    return Peer(name, chain_of(name, chain, *arguments))


def chain_of(name: str, chain: Callable[..., object], *arguments: object) -> Callable[[], object]:
    if name == "torch_compile":
        torch._dynamo.reset()
        chain = torch.compile(chain, dynamic=False)
    return lambda: chain(*arguments)
