"""Decoding over a paged latent cache: against the copy bandwidth where the cache's bytes bound it (few heads), against
a square BF16 product where the tensor cores do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DECODES, Decode
from benchmarks.timing import Case, Peer
from dsv3rt import ops

Versus = Callable[..., dict[str, Any]]
PAGE, C, WIDTH = 64, 512, 576
SCALE = 192**-0.5


def lengths_of(shape: Decode) -> list[int]:
    """Lengths that vary are spread evenly between half and one and a half times the mean."""
    if not shape.varying:
        return [shape.length] * shape.batch
    step = shape.length / shape.batch
    return [int(shape.length / 2 + step * (row + 0.5)) for row in range(shape.batch)]


def draw(shape: Decode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, cache, table and lengths; every request's pages lie anywhere in the cache."""
    lengths = lengths_of(shape)
    counts = [-(-length // PAGE) for length in lengths]
    cache = torch.randn((sum(counts), PAGE, WIDTH), device="cuda", dtype=torch.bfloat16)
    table = torch.zeros((shape.batch, max(counts)), dtype=torch.int32)
    pages = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    for row, own in enumerate(pages):
        table[row, : len(own)] = own
    q = torch.randn((shape.batch, shape.queries, shape.heads, WIDTH), device="cuda", dtype=torch.bfloat16)
    return q, cache, table.cuda(), torch.tensor(lengths, dtype=torch.int32, device="cuda")


def bf16_matmul(size: int = 8192) -> Peer:
    x, y = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Peer("bf16_matmul", lambda: x @ y.t(), work=2.0 * size**3)


@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_bench_mla_decode(versus: Versus, copy_peer: Peer, shape: Decode) -> None:
    q, cache, table, lengths = draw(shape)
    tokens = int(lengths.sum())
    bound_by_bytes = shape.heads * shape.queries <= 64
    flops = 2.0 * shape.queries * shape.heads * tokens * (WIDTH + C)
    num_bytes = 2.0 * (tokens * WIDTH + shape.batch * shape.queries * shape.heads * (WIDTH + C))
    case = (
        Case("mla_decode", str(shape), "gbps", num_bytes)
        if bound_by_bytes
        else Case("mla_decode", str(shape), "tflops", flops)
    )
    peer = copy_peer if bound_by_bytes else bf16_matmul()
    versus(
        case,
        lambda: ops.mla_decode(q, cache, table, lengths, scale=SCALE, latent_dim=C),
        peer,
        kernel="sm90_mla_decode",
    )
