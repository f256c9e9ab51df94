"""The decoding kernel against attention in FP64 of the same BF16 numbers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda.extension import load
from tests.gpu.mla_decode_cases import PAGE, SCALE, C, Requests, assert_close, draw, in_fp8

pytestmark = pytest.mark.gpu


def decode(requests: Requests, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    r = requests
    return ops.mla_decode(r.q, r.cache, r.block_table, r.lengths, scale=scale, latent_dim=C)


def decode_poisoned(requests: Requests, parts: int, rows: int) -> tuple[Tensor, Tensor]:
    """In any number of parts and rows a block, into outputs that hold NaN, with guard requests behind them."""
    r = requests
    B, L, H, _ = r.q.shape
    out = torch.full((B + 1, L, H, C), math.nan, device="cuda", dtype=torch.bfloat16)
    lse = torch.full((B + 1, L, H), math.nan, device="cuda")
    partial_out = torch.full((-(-L * H // rows), parts, 2, rows, C), math.nan, device="cuda")
    partial_lse = torch.full(partial_out.shape[:4], math.nan, device="cuda")
    load().mla_decode(
        r.q, r.cache, r.block_table, r.lengths, out[:B], lse[:B], partial_out, partial_lse, scale=SCALE
    )  # fmt: skip
    assert out[B].isnan().all()
    assert lse[B].isnan().all()
    return out[:B], lse[:B]


def some_lengths(rng: random.Random) -> list[int]:
    longest = rng.choice([3, 70, 300, 1500, 6000])
    edges = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]
    num_requests = rng.choice([1, 2, 3, 7, 20, 40])
    return [rng.choice(edges) if rng.random() < 0.25 else rng.randint(0, longest) for _ in range(num_requests)]


def form(requests: Requests, cache: str) -> Requests:
    return in_fp8(requests) if cache == "fp8" else requests


both_caches = pytest.mark.parametrize("cache", ["bf16", "fp8"])
# An FP8 cache has a kernel for few, one for some and one for blocks of 64 in pairs.
few_and_many_heads = pytest.mark.parametrize("num_heads", [16, 60, 80])


@both_caches
@pytest.mark.parametrize("seed", range(10))
def test_mla_decode_matches_fp64(seed: int, cache: str) -> None:
    """Thirty cases a seed: ragged and zero lengths, pages in any order, NaN in slots and pages of nobody."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        num_queries, num_heads = rng.randint(1, 4), rng.choice([1, 2, 3, 8, 16, 17, 32, 48, 64, 65, 100, 128])
        requests = draw(some_lengths(rng), num_queries, num_heads, size=rng.choice([0.3, 1.0, 4.0]))
        requests = form(requests, cache)
        assert_close(requests, *decode(requests))


@pytest.mark.parametrize(("cache", "rows"), [("bf16", 64), ("fp8", 16), ("fp8", 64)])
@pytest.mark.parametrize("parts", [1, 2, 5, 66, 132, 264])
def test_mla_decode_writes_everything(parts: int, cache: str, rows: int) -> None:
    """In as many parts as one likes, nothing is left unwritten, and nothing else is written."""
    torch.manual_seed(parts)
    for lengths, num_heads in (
        ([2000, 0, 64, 1, 700], 48), ([3], 48), ([0, 0], 48), ([64] * 70, 48), ([8000], 48), ([500, 70, 0, 1000], 80)
    ):  # fmt: skip
        requests = form(draw(lengths, 2, num_heads), cache)
        assert_close(requests, *decode_poisoned(requests, parts, rows))


@both_caches
@few_and_many_heads
def test_mla_decode_handles_many_requests_and_long_ones(num_heads: int, cache: str) -> None:
    torch.manual_seed(0)
    for lengths in ([5] * 700 + [4000], [100_000], [0] * 100 + [129] * 33 + [0] * 40):
        requests = form(draw(lengths, 1, num_heads), cache)
        assert_close(requests, *decode(requests))


@both_caches
def test_mla_decode_handles_more_queries_than_tokens(cache: str) -> None:
    torch.manual_seed(0)
    requests = form(draw([1, 2, 3, 4, 5, 0, 100], 70, 3), cache)
    out, lse = decode(requests)
    assert_close(requests, out, lse)
    assert not out[0, :69].any()
    assert (lse[0, :69] == -math.inf).all()


@both_caches
def test_mla_decode_handles_empty(cache: str) -> None:
    for lengths, num_heads in (([], 16), ([0, 0, 0], 16), ([5], 0)):
        out, lse = decode(form(draw(lengths, 1, num_heads), cache))
        assert not out.any()
        assert (lse == -math.inf).all()


def test_mla_decode_shares_pages() -> None:
    """Two requests may own the same pages."""
    torch.manual_seed(0)
    requests = draw([200, 150], 1, 16)
    requests.block_table[1, :3] = requests.block_table[0, :3]
    assert_close(requests, *decode(requests))


def test_mla_decode_takes_scales_and_strided_tables() -> None:
    torch.manual_seed(0)
    requests = draw([200, 70, 1000], 2, 16)
    wide = torch.full((3, 40), 2**30, dtype=torch.int32, device="cuda")
    wide[:, 3 : 3 + requests.block_table.shape[1]] = requests.block_table
    requests = replace(requests, block_table=wide[:, 3:20])
    assert_close(requests, *decode(requests, scale=1.0), scale=1.0)


@both_caches
@few_and_many_heads
def test_mla_decode_follows_rising_scores(num_heads: int, cache: str) -> None:
    """Every page's scores exceed those before it, by a little or by a lot, and in the end fall again."""
    torch.manual_seed(0)
    for step in (0.001, 0.02, 0.5):
        requests = draw([3000, 700], 1, num_heads)
        for row, length in enumerate(requests.lengths.tolist()):
            token = torch.arange(length, device="cuda")
            height = step * torch.minimum(token, 2 * (length - 1 - token)) / 10
            pages = requests.block_table[row, : -(-length // PAGE)].long()
            keys = requests.cache[pages].flatten(0, 1)
            keys[:length] = (0.1 * keys[:length].float() + height[:, None]).bfloat16()
            requests.cache[pages] = keys.unflatten(0, (-1, PAGE))
        requests.q.copy_(torch.rand(requests.q.shape, device="cuda"))
        requests = form(requests, cache)
        assert_close(requests, *decode(requests, scale=0.05), scale=0.05)


@both_caches
@few_and_many_heads
def test_mla_decode_carries_nan_of_its_own_tokens(num_heads: int, cache: str) -> None:
    torch.manual_seed(0)
    requests = form(draw([200, 70], 1, num_heads), cache)
    page = requests.block_table[0, 1]
    if cache == "fp8":
        requests.cache[page, 5, 7] = 0x7F
    else:
        requests.cache[page, 5, 7] = math.nan
    out, _ = decode(requests)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@both_caches
@pytest.mark.parametrize("num_heads", [16, 128])
def test_mla_decode_is_deterministic(num_heads: int, cache: str) -> None:
    torch.manual_seed(0)
    requests = form(draw([3000, 17, 0, 800, 6000], 2, num_heads), cache)
    first = decode(requests)
    for _ in range(20):
        again = decode(requests)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@both_caches
@few_and_many_heads
def test_mla_decode_replays_with_changed_lengths(num_heads: int, cache: str) -> None:
    """A captured launch takes new lengths, tables, queries and caches from the same memory."""
    torch.manual_seed(0)
    lengths = ([3000, 17, 0, 800], [1, 3010, 64, 0], [0, 0, 0, 0])
    cases = [form(draw(of_case, 1, num_heads), cache) for of_case in lengths]
    pages = max(case.cache.shape[0] for case in cases)
    columns = max(case.block_table.shape[1] for case in cases)
    static = Requests(
        torch.empty_like(cases[0].q),
        cases[0].cache.new_empty((pages, *cases[0].cache.shape[1:])),
        torch.zeros((4, columns), device="cuda", dtype=torch.int32),
        torch.zeros(4, device="cuda", dtype=torch.int32),
    )
    decode(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(static)
    for case in (*cases, cases[0]):
        static.q.copy_(case.q)
        static.cache[: case.cache.shape[0]] = case.cache
        static.block_table[:, : case.block_table.shape[1]] = case.block_table
        static.lengths.copy_(case.lengths)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(case, out, lse)
        want = decode(static)
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])


def test_mla_decode_rejects_bad_arguments() -> None:
    requests = draw([100], 1, 16)
    with pytest.raises(ValueError, match="mla_decode: scale must be positive on CUDA"):
        decode(requests, scale=0.0)
    strided = torch.empty((4, PAGE, 2 * 576), device="cuda", dtype=torch.bfloat16)[:, :, :576]
    with pytest.raises(ValueError, match="mla_decode: cache must have strides"):
        decode(replace(requests, cache=strided))
