"""The FP8 GEMM kernels against FP64 products of the dequantised operands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from benchmarks.shapes import (
    GEMMS,
    K_GROUPED_GEMMS,
    M_GROUPED_GEMMS,
    MASKED_GEMMS,
    SMALL_GEMMS,
    WEIGHT_GRADIENTS,
    Gemm,
    GroupedGemm,
)
from dsv3rt import ops
from dsv3rt.ops.cuda import gemm as kernels
from dsv3rt.ops.types import GroupLayout, round_up
from tests.gpu.gemm_cases import (
    GRADIENT_TILES,
    LIKE_DECADES,
    SHARES,
    SMALL_TILES,
    TILES,
    Groups,
    Random,
    assert_close,
    assert_depth_groups,
    assert_product,
    assert_row_groups,
    assert_within_truncation,
    bytes_of,
    clear_padding_columns,
    double,
    full_of_nan,
    masked,
    packed,
    poison_padding_rows,
    product,
    product_by_depth,
    product_by_rows,
    with_every_tile,
)

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = [1, 63, 64, 127, 128, 129, 255, 300, 513, 1000, 4097]
COUNTS = [0, 0, 1, 63, 128, 129, 500]
EDGES = [[0], [1], [63], [4097], [0, 0, 0], [0, 1, 63, 4097], [4097, 0, 63, 1, 0]]
HUNDREDS = range(0, 500, 100)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("w_rows", [128, 1], ids=["block_scaled", "row_scaled"])
@pytest.mark.parametrize("start", HUNDREDS)
def test_fp8_gemm_nt_matches_fp64_on_random_shapes(start: int, w_rows: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=seed % 13)
        m = random.pick(ROWS)
        n = random.pick([8, 16, 120, 136, 264, 576, 1000, 2112])
        k = random.pick([16, 128, 144, 512, 576, 1040, 1536])
        x, w = random.rows(m, k), (random.blocks(n, k) if w_rows == 128 else random.rows(n, k))
        out = full_of_nan(m, n, dtype=[BF16, FP32][seed % 2])
        kernels.fp8_gemm_nt(x, w, out, accumulate=False, num_sms=random.pick([0, 0, 1, 7, 64]))
        assert_within_truncation(out, *product(double(x), double(w)), random.decades)


@pytest.mark.parametrize("shape", [*GEMMS, *SMALL_GEMMS], ids=str)
def test_fp8_gemm_nt_matches_fp64_at_the_shapes_of_v3(shape: Gemm) -> None:
    random = Random(0, LIKE_DECADES)
    x, w = random.rows(shape.m, shape.k), random.blocks(shape.n, shape.k)
    for dtype in (BF16, FP32):
        out = full_of_nan(shape.m, shape.n, dtype=dtype)
        kernels.fp8_gemm_nt(x, w, out, accumulate=False, num_sms=0)
        assert_product(out, x, w)


@pytest.mark.parametrize("shape", WEIGHT_GRADIENTS, ids=str)
def test_fp8_gemm_nt_accumulates_weight_gradients_of_v3(shape: Gemm) -> None:
    random = Random(0, LIKE_DECADES)
    x, y = random.rows(shape.m, shape.k), random.rows(shape.n, shape.k)
    started = full_of_nan(shape.m, shape.n)
    kernels.fp8_gemm_nt(x, y, started, accumulate=False, num_sms=0)
    assert_product(started, x, y)
    before = torch.randn((shape.m, shape.n), device="cuda") * started.std()
    out = before.clone()
    assert ops.fp8_gemm_nt(x, y, accumulate_into=out) is out
    assert_product(out, x, y, before)


@pytest.mark.parametrize(
    ("w_rows", "dtype", "accumulates", "compiled"),
    [
        (128, BF16, False, TILES),
        (128, FP32, False, SMALL_TILES),
        (128, FP32, True, SMALL_TILES),
        (1, BF16, False, SMALL_TILES),
        (1, FP32, False, GRADIENT_TILES),
        (1, FP32, True, GRADIENT_TILES),
    ],
    ids=["bf16", "fp32", "added", "row_scaled_bf16", "row_scaled_fp32", "row_scaled_added"],
)
def test_fp8_gemm_nt_matches_fp64_with_every_tile(
    w_rows: int, dtype: torch.dtype, accumulates: bool, compiled: tuple[tuple[int, int], ...]
) -> None:
    """Through the extension, whatever the heuristics choose."""
    extension = pytest.importorskip("dsv3rt._C")
    random, (m, n, k) = Random(0, LIKE_DECADES), (1000, 1040, 1168)
    x, w = random.rows(m, k), (random.blocks(n, k) if w_rows == 128 else random.rows(n, k))
    before = torch.randn((m, n), device="cuda") * 1e4 if accumulates else None

    def launch(**choice: object) -> None:
        out = full_of_nan(m, n, dtype=dtype) if before is None else before.clone()
        extension.fp8_gemm_nt(*bytes_of(x, w), out, accumulate=accumulates, **choice)
        assert_product(out, x, w, before)

    with_every_tile(launch, compiled, SHARES)


@pytest.mark.parametrize("block_m", [128, 256])
def test_fp8_gemm_nt_splits_the_depth_between_two_blocks(block_m: int) -> None:
    """Through the extension, so that every depth is split, one K-block and odd numbers of them too."""
    extension = pytest.importorskip("dsv3rt._C")
    shapes = [(1, 8, 128), (300, 264, 384), (16 * block_m, 512, 1040), (64, 7168, 4096), (257, 136, 16)]
    for seed, (m, n, k) in enumerate(shapes):
        random = Random(seed, decades=2)
        x, w = random.rows(m, k), random.blocks(n, k)
        expected, magnitude = product(double(x), double(w))
        out = full_of_nan(m, n, dtype=BF16)
        for _ in range(3):
            extension.fp8_gemm_nt(*bytes_of(x, w), out, tile=(block_m, 128, 3, 8))
            assert_within_truncation(out, expected, magnitude)
            out.fill_(torch.nan)
    x, w = random.rows(4096, 128), random.blocks(4096, 128)
    out = torch.empty((4096, 4096), dtype=BF16, device="cuda")
    with pytest.raises(RuntimeError, match="halves of a depth need a cluster for each tile"):
        extension.fp8_gemm_nt(*bytes_of(x, w), out, tile=(block_m, 128, 3, 8))


@pytest.mark.parametrize("start", HUNDREDS)
def test_fp8_gemm_nt_accumulates_in_place(start: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=seed % 13)
        m, n, k = random.pick(ROWS), random.pick([8, 264, 576, 2112]), random.pick([128, 256, 1024])
        x, w = random.rows(m, k), (random.blocks(n, k) if seed % 4 == 0 else random.rows(n, k))
        expected, magnitude = product(double(x), double(w))
        before = random.sums_like(magnitude)
        out = before.clone()
        num_sms = random.pick([0, 0, 1, 7, 64])
        assert ops.fp8_gemm_nt(x, w, accumulate_into=out, num_sms=num_sms) is out
        assert_within_truncation(out.double() - before, expected, magnitude, random.decades)


def test_fp8_gemm_nt_handles_empty() -> None:
    random = Random(0)
    assert ops.fp8_gemm_nt(random.rows(0, 256), random.blocks(64, 256)).shape == (0, 64)
    assert ops.fp8_gemm_nt(random.rows(5, 0), random.blocks(64, 0)).eq(0).all()
    kept = torch.ones((5, 64), device="cuda")
    ops.fp8_gemm_nt(random.rows(5, 0), random.rows(64, 0), accumulate_into=kept)
    assert kept.eq(1).all()


def test_fp8_gemm_nt_is_deterministic() -> None:
    random = Random(1, decades=2)
    x, w = random.rows(1000, 7168), random.blocks(2112, 7168)
    first = ops.fp8_gemm_nt(x, w)
    assert all(torch.equal(ops.fp8_gemm_nt(x, w), first) for _ in range(20))


def test_fp8_gemm_nt_passes_nan_on() -> None:
    random = Random(2, decades=0)
    x, w = random.rows(200, 512), random.blocks(256, 512)
    x.scale[17, 2] = torch.nan
    y = ops.fp8_gemm_nt(x, w)
    assert y[17].isnan().all()
    assert not y[torch.arange(200, device="cuda") != 17].isnan().any()


def test_fp8_gemm_nt_replays_in_a_graph() -> None:
    random = Random(3, decades=1)
    x, w = random.rows(300, 512), random.blocks(256, 512)
    ops.fp8_gemm_nt(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.fp8_gemm_nt(x, w)
    x.data.copy_(random.data(300, 512))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(y, double(x) @ double(w).t())


def check_row_groups(random: Random, groups: Groups, n: int, k: int, dtype: torch.dtype, num_sms: int = 0) -> None:
    """Rows of no group are NaN, and behind the last group's padding no row of the result is written."""
    x, w = random.rows(groups.total, k), random.blocks(len(groups.spans), n, k)
    poison_padding_rows(x, groups)
    out = full_of_nan(groups.total, n, dtype=dtype)
    behind = out[groups.total - groups.spare :].zero_()
    kernels.m_grouped_fp8_gemm_nt(x, w, groups.layout, out, num_sms=num_sms)
    got = torch.cat([out[start:end] for start, end, _ in groups.spans])
    assert_within_truncation(got, *product_by_rows(x, w, groups), random.decades)
    assert behind.eq(0).all()


@pytest.mark.parametrize("start", HUNDREDS)
def test_m_grouped_fp8_gemm_nt_matches_fp64_on_random_layouts(start: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=seed % 13)
        groups = packed(random.picks(COUNTS, random.pick([1, 2, 5, 33])), spare=random.pick([0, 128]))
        n, k, num_sms = random.pick([8, 264, 576]), random.pick([128, 272, 1024]), random.pick([0, 1, 66])
        check_row_groups(random, groups, n, k, [BF16, FP32][seed % 2], num_sms)


@pytest.mark.parametrize("counts", EDGES, ids=str)
def test_m_grouped_fp8_gemm_nt_takes_any_number_of_rows(counts: list[int]) -> None:
    capacity = max(128, round_up(max(counts), 128))
    for seed, groups in enumerate([packed(counts), packed(counts, spare=128), masked(counts, capacity)]):
        for dtype in (BF16, FP32):
            check_row_groups(Random(seed, decades=2), groups, 264, 1040, dtype)


def check_large_row_groups(groups: Groups, shape: GroupedGemm) -> None:
    random = Random(0, LIKE_DECADES)
    x, w = random.rows(groups.total, shape.k), random.blocks(shape.groups, shape.n, shape.k)
    poison_padding_rows(x, groups)
    out = full_of_nan(groups.total, shape.n, dtype=BF16)
    kernels.m_grouped_fp8_gemm_nt(x, w, groups.layout, out, num_sms=0)
    assert_row_groups(out, x, w, groups)


@pytest.mark.parametrize("spare", [0, 384])
@pytest.mark.parametrize("shape", M_GROUPED_GEMMS, ids=str)
def test_m_grouped_fp8_gemm_nt_matches_fp64_at_the_shapes_of_v3(shape: GroupedGemm, spare: int) -> None:
    """Uneven groups. With the spare rows the heuristics take 256x128 instead of 192x128, or the other way round."""
    rows = shape.rows
    check_large_row_groups(packed([rows - 127, 0, 2 * rows - 1] + [rows] * (shape.groups - 3), spare), shape)


@pytest.mark.parametrize("shape", MASKED_GEMMS, ids=str)
def test_m_grouped_fp8_gemm_nt_matches_fp64_on_masked_buffers_of_v3(shape: GroupedGemm) -> None:
    counts = Random(0).picks(list(range(shape.rows - 32, shape.rows + 33)), shape.groups - 2)
    check_large_row_groups(masked([0, *counts, 256], 256), shape)


@pytest.mark.parametrize(("dtype", "compiled"), [(BF16, TILES), (FP32, SMALL_TILES)], ids=["bf16", "fp32"])
def test_m_grouped_fp8_gemm_nt_matches_fp64_with_every_tile(
    dtype: torch.dtype, compiled: tuple[tuple[int, int], ...]
) -> None:
    extension = pytest.importorskip("dsv3rt._C")
    random, groups, n, k = Random(0, LIKE_DECADES), packed([0, 300, 1, 63, 0, 128, 513], spare=128), 1040, 1168
    x, w = random.rows(groups.total, k), random.blocks(len(groups.spans), n, k)
    poison_padding_rows(x, groups)
    layout = groups.layout.counts_X, groups.layout.offsets

    def launch(**choice: object) -> None:
        out = full_of_nan(groups.total, n, dtype=dtype)
        extension.m_grouped_fp8_gemm_nt(*bytes_of(x, w), out, *layout, **choice)
        assert_row_groups(out, x, w, groups)

    with_every_tile(launch, compiled, range(2))


@pytest.mark.parametrize("start", HUNDREDS)
def test_m_grouped_fp8_gemm_nt_takes_a_masked_buffer_in_a_graph(start: int) -> None:
    """As decoding calls it: capacity for every expert, counts that change between replays, NaN where none is."""
    random = Random(start, decades=3 * (start // 100))
    experts, capacity, n, k = 9, 256, 264, 512
    counts = torch.zeros(experts, dtype=torch.int32, device="cuda")
    layout = GroupLayout.of_capacity(counts, capacity)
    x, w = random.rows(experts * capacity, k), random.blocks(experts, n, k)
    data, scale = x.data.view(torch.uint8).clone(), x.scale.clone()
    expected, magnitude = product(double(x).view(experts, capacity, k), double(w))
    multiply = partial(ops.m_grouped_fp8_gemm_nt, x, w, layout, out_dtype=[BF16, FP32][start // 100 % 2])
    multiply()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply()
    choices = [0, 1, 5, 63, 64, 65, 127, 128, 129, 255, 256]
    for filled in [[256] * 9, [0] * 9, *(random.picks(choices, experts) for _ in range(98))]:
        counts.copy_(torch.tensor(filled, dtype=torch.int32))
        real = torch.arange(capacity, device="cuda") < counts[:, None]
        x.data.view(torch.uint8).copy_(data.masked_fill(~real.view(-1, 1), 0x7F))
        x.scale.copy_(scale.masked_fill(~real.view(-1, 1), torch.nan))
        y.fill_(torch.nan)
        graph.replay()
        got = y.view(experts, capacity, n)[real]
        assert_within_truncation(got, expected[real], magnitude[real], random.decades)


@pytest.mark.parametrize("counts", [[0] * 100 + [6000] + [0] * 155], ids=["256_groups"])
def test_grouped_fp8_gemm_nt_takes_one_huge_group(counts: list[int]) -> None:
    check_row_groups(Random(0, decades=2), packed(counts), 128, 256, BF16)
    check_depth_groups(Random(0, decades=2), packed(counts), 130, 264)


def check_depth_groups(random: Random, groups: Groups, m: int, n: int, num_sms: int = 0) -> None:
    """Added to what is there, which is all that an empty group has, and started."""
    x, y = random.rows(m, groups.total), random.rows(n, groups.total)
    for q in (x, y):
        clear_padding_columns(q, groups)
    expected, magnitude = product_by_depth(x, y, groups)
    before = random.sums_like(magnitude)
    out = before.clone()
    assert ops.k_grouped_fp8_gemm_nt(x, y, groups.layout, accumulate_into=out, num_sms=num_sms) is out
    assert_within_truncation(out.double() - before, expected, magnitude, random.decades)
    empty = [g for g, (start, end, _) in enumerate(groups.spans) if start == end]
    assert torch.equal(out[empty], before[empty])
    out.fill_(torch.nan)
    kernels.k_grouped_fp8_gemm_nt(x, y, groups.layout, out, accumulate=False, num_sms=num_sms)
    assert_within_truncation(out, expected, magnitude, random.decades)


@pytest.mark.parametrize("start", HUNDREDS)
def test_k_grouped_fp8_gemm_nt_matches_fp64_on_random_layouts(start: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=seed % 13)
        counts = random.picks(COUNTS, random.pick([1, 2, 5, 17]))
        groups = packed(counts, spare=random.pick([0, 128]) if any(counts) else 128)
        m, n, num_sms = random.pick([1, 8, 63, 130, 576]), random.pick([8, 264, 576]), random.pick([0, 0, 1, 7, 66])
        check_depth_groups(random, groups, m, n, num_sms)


@pytest.mark.parametrize("counts", EDGES, ids=str)
def test_k_grouped_fp8_gemm_nt_takes_any_depth_and_number_of_rows(counts: list[int]) -> None:
    for seed, m in enumerate((1, 63, 4097)):
        check_depth_groups(Random(seed, decades=2), packed(counts, spare=0 if any(counts) else 128), m, 264)


@pytest.mark.parametrize("shape", K_GROUPED_GEMMS, ids=str)
def test_k_grouped_fp8_gemm_nt_matches_fp64_at_the_shapes_of_v3(shape: GroupedGemm) -> None:
    random, rows = Random(0, LIKE_DECADES), shape.rows
    groups = packed([rows - 127, 0, 2 * rows - 1, rows])
    x, y = random.rows(shape.n, groups.total), random.rows(shape.k, groups.total)
    for q in (x, y):
        clear_padding_columns(q, groups)
    before = torch.randn((shape.groups, shape.n, shape.k), device="cuda") * 1e4 * rows**0.5
    out, started = before.clone(), full_of_nan(*before.shape)
    ops.k_grouped_fp8_gemm_nt(x, y, groups.layout, accumulate_into=out)
    kernels.k_grouped_fp8_gemm_nt(x, y, groups.layout, started, accumulate=False, num_sms=100)
    assert_depth_groups(out, x, y, groups, before)
    assert_depth_groups(started, x, y, groups)


@pytest.mark.parametrize("accumulates", [False, True], ids=["started", "added"])
def test_k_grouped_fp8_gemm_nt_matches_fp64_with_every_tile(accumulates: bool) -> None:
    extension = pytest.importorskip("dsv3rt._C")
    random, groups, m, n = Random(0, LIKE_DECADES), packed([0, 300, 1, 63, 0, 128, 1153], spare=128), 700, 1040
    x, y = random.rows(m, groups.total), random.rows(n, groups.total)
    for q in (x, y):
        clear_padding_columns(q, groups)
    before = torch.randn((len(groups.spans), m, n), device="cuda") * 1e4 if accumulates else None
    layout = groups.layout.counts_X, groups.layout.offsets

    def launch(**choice: object) -> None:
        out = full_of_nan(len(groups.spans), m, n) if before is None else before.clone()
        extension.k_grouped_fp8_gemm_nt(*bytes_of(x, y), out, *layout, accumulate=accumulates, **choice)
        assert_depth_groups(out, x, y, groups, before)

    with_every_tile(launch, GRADIENT_TILES, SHARES)


def test_grouped_fp8_gemm_nt_handles_empty() -> None:
    random, nothing = Random(0), packed([0, 0, 0]).layout
    assert ops.m_grouped_fp8_gemm_nt(random.rows(0, 256), random.blocks(3, 64, 256), nothing).shape == (0, 64)
    x, y = random.rows(72, 0), random.rows(64, 0)
    kept = torch.ones((3, 72, 64), device="cuda")
    ops.k_grouped_fp8_gemm_nt(x, y, nothing, accumulate_into=kept)
    assert kept.eq(1).all()
    assert ops.k_grouped_fp8_gemm_nt(x, y, nothing).eq(0).all()
    one = packed([100]).layout
    assert ops.k_grouped_fp8_gemm_nt(random.rows(0, 128), random.rows(64, 128), one).shape == (1, 0, 64)


@pytest.mark.parametrize(
    ("n", "k", "message"),
    [
        (60, 256, "fp8_gemm_nt: w must have a number of rows divisible by 8 on CUDA, got 60"),
        (64, 200, "fp8_gemm_nt: w must have a depth divisible by 16 on CUDA, got 200"),
    ],
)
def test_fp8_gemm_nt_rejects_what_the_copy_engine_cannot_read(n: int, k: int, message: str) -> None:
    random = Random(0)
    with pytest.raises(ValueError, match=message):
        ops.fp8_gemm_nt(random.rows(5, k), random.blocks(n, k))
