"""Decoding over a paged latent cache: against the copy bandwidth where the cache's bytes bound it (few heads), against
a square BF16 product where the tensor cores do; and the FP8 cache against the BF16 one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
FP8_CHUNK = 2048  # pages that are quantised at a time, by plain torch
LARGEST = max(DECODES, key=lambda shape: shape.batch * shape.length)


def lengths_of(shape: Decode) -> list[int]:
    """Lengths that vary are spread evenly between half and one and a half times the mean."""
    if not shape.varying:
        return [shape.length] * shape.batch
    step = shape.length / shape.batch
    return [int(shape.length / 2 + step * (row + 0.5)) for row in range(shape.batch)]


@pytest.fixture(scope="module")
def bf16_pages() -> Tensor:
    """Enough for every shape, 2.4 GB, drawn once."""
    return torch.randn((LARGEST.batch * LARGEST.length // PAGE, PAGE, WIDTH), device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def fp8_pages(bf16_pages: Tensor) -> Tensor:
    """The same in FP8."""
    return torch.cat([ops.quantize_latents(pages, latent_dim=C) for pages in bf16_pages.split(FP8_CHUNK)])


@pytest.fixture(scope="module")
def square_matmul() -> Peer:
    size = 8192
    x, y = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Peer("bf16_matmul", lambda: x @ y.t(), work=2.0 * size**3)


@dataclass(frozen=True)
class Requests:
    q: Tensor
    block_table: Tensor
    lengths: Tensor

    def decode(self, pages: Tensor) -> Callable[[], object]:
        return lambda: ops.mla_decode(self.q, pages, self.block_table, self.lengths, scale=SCALE, latent_dim=C)


def draw(shape: Decode) -> Requests:
    """Every request's pages lie anywhere among the first ones of the cache, none in two requests."""
    lengths = lengths_of(shape)
    counts = [-(-length // PAGE) for length in lengths]
    table = torch.zeros((shape.batch, max(counts)), dtype=torch.int32)
    for row, own in enumerate(torch.randperm(sum(counts), dtype=torch.int32).split(counts)):
        table[row, : len(own)] = own
    q = torch.randn((shape.batch, shape.queries, shape.heads, WIDTH), device="cuda", dtype=torch.bfloat16)
    return Requests(q, table.cuda(), torch.tensor(lengths, dtype=torch.int32, device="cuda"))


def case_of(shape: Decode, bound_by_bytes: bool) -> Case:
    """Bytes: of the cache, read once, and of queries and results. FLOPs: of all scores and values; the half page at
    most that later queries of a request see and earlier ones do not is counted as seen."""
    tokens, rows = sum(lengths_of(shape)), shape.queries * shape.heads
    if bound_by_bytes:
        return Case("mla_decode", str(shape), "gbps", 2.0 * (tokens * WIDTH + shape.batch * rows * (WIDTH + C)))
    return Case("mla_decode", str(shape), "tflops", 2.0 * rows * tokens * (WIDTH + C))


@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_bench_mla_decode(
    versus: Versus, copy_peer: Peer, square_matmul: Peer, bf16_pages: Tensor, shape: Decode
) -> None:
    bound_by_bytes = shape.heads * shape.queries <= 64
    peer = copy_peer if bound_by_bytes else square_matmul
    versus(case_of(shape, bound_by_bytes), draw(shape).decode(bf16_pages), peer, kernel="sm90_mla_decode")


@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_bench_mla_decode_fp8(versus: Versus, bf16_pages: Tensor, fp8_pages: Tensor, shape: Decode) -> None:
    """The ratio of times is that of tokens a second."""
    requests = draw(shape)
    peer = Peer("mla_decode_bf16", requests.decode(bf16_pages))
    versus(
        Case("mla_decode, FP8 cache", str(shape), "us"),
        requests.decode(fp8_pages),
        peer,
        kernel="sm90_mla_decode",
    )
