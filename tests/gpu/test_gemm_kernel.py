"""The FP8 GEMM kernels against FP64 products of the dequantised operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda import gemm as kernels
from dsv3rt.ops.types import GroupLayout, QuantTensor, empty_row_scales

pytestmark = pytest.mark.gpu

# Over operands of like magnitude. FP32 results: the tensor cores keep about 14 bits of a partial sum over 128
# products of random sign, so its relative error is near 2^-14; calc_diff is half of the square, under 1e-8, and 1e-6
# leaves room for cancellation. BF16 results: rounding to 8 bits has a mean square relative error of 2^-18 / 3 at
# most, half of which is 6.4e-7; the rest is FP32_DIFF.
FP32_DIFF = 1e-6
BF16_DIFF = 2e-6
# Over scales of many decades one tile outweighs all others, and where its sum cancels the relative error is large. So
# errors are held to the sum of the magnitudes of an element's products. A step of the tensor cores adds 32 products to
# a partial sum, each truncated at 2^-13 of the largest: never more than 33 * 2^-13 < 2^-7 of the magnitudes. On average
# a truncation is half of that, and the largest product a fifth of the 32 magnitudes: 33 * 2^-14 / 5 < 2^-11. One lost
# product of 128 would be 2^-7 on average.
TRUNCATION_WORST = 2.0**-7
TRUNCATION_MEAN = 2.0**-11
BF16_ROUNDING = 2.0**-9

ROWS = [1, 63, 64, 127, 128, 129, 255, 300, 513, 1000, 4097]


class Random:
    """Operands from one seed: data over the whole range of E4M3, scales over `decades` either side of one."""

    def __init__(self, seed: int, decades: float = 12.0) -> None:
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.host = torch.Generator().manual_seed(seed)
        self.decades = decades

    def pick(self, choices: list[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.host))]

    def data(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device="cuda") * 100
        return values.clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(self, *shape: int) -> Tensor:
        exponents = torch.rand(shape, generator=self.generator, device="cuda") * 2 - 1
        return 10 ** (exponents * self.decades)

    def rows(self, rows: int, columns: int) -> QuantTensor:
        scale = empty_row_scales(rows, -(-columns // 128), torch.device("cuda"))
        scale.copy_(self.scales(*scale.shape))
        return QuantTensor(self.data(rows, columns), scale, (1, 128))

    def blocks(self, *shape: int) -> QuantTensor:
        *groups, rows, columns = shape
        return QuantTensor(self.data(*shape), self.scales(*groups, -(-rows // 128), -(-columns // 128)), (128, 128))

    def layout(
        self, choices: list[int], groups: int, spare: int = 128
    ) -> tuple[GroupLayout, list[tuple[int, int]], int]:
        counts = [self.pick(choices) for _ in range(groups)]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + -(-count // 128) * 128)
        layout = GroupLayout(*(torch.tensor(v, dtype=torch.int32, device="cuda") for v in (counts, offsets)))
        return layout, [(start, start + n) for start, n in zip(offsets[:-1], counts, strict=True)], offsets[-1] + spare


def double(q: QuantTensor) -> Tensor:
    return ops.dequantize(q, torch.float64)


def product(x: QuantTensor, w: QuantTensor) -> tuple[Tensor, Tensor]:
    """x @ w^T in FP64, and the same with every sign dropped."""
    a, b = double(x), double(w)
    return a @ b.t(), a.abs() @ b.abs().t()


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert not got.isnan().any()
    diff = ops.calc_diff(got, expected)
    assert diff < (FP32_DIFF if got.dtype == torch.float32 else BF16_DIFF), diff


def assert_within_truncation(got: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    assert not got.isnan().any()
    error = (got.double() - expected).abs()
    if got.dtype == torch.bfloat16:
        error = (error - expected.abs() * BF16_ROUNDING).clamp_min(0)
    error /= magnitude.clamp_min(1e-300)
    assert error.max() < TRUNCATION_WORST
    assert error.mean() < TRUNCATION_MEAN


@pytest.mark.parametrize("w_rows", [128, 1], ids=["block_scaled", "row_scaled"])
@pytest.mark.parametrize("start", range(0, 500, 100))
def test_fp8_gemm_nt_matches_fp64_on_random_shapes(start: int, w_rows: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=seed % 13)
        m = random.pick(ROWS)
        n = random.pick([8, 16, 120, 136, 264, 576, 1000, 2112])
        k = random.pick([16, 128, 144, 512, 576, 1040, 1536])
        x, w = random.rows(m, k), (random.blocks(n, k) if w_rows == 128 else random.rows(n, k))
        expected, magnitude = product(x, w)
        out = torch.full((m, n), torch.nan, dtype=[torch.bfloat16, torch.float32][seed % 2], device="cuda")
        kernels.fp8_gemm_nt(x, w, out, accumulate=False, num_sms=random.pick([0, 0, 1, 7, 64]))
        assert_within_truncation(out, expected, magnitude)
        if random.decades == 0 and m * n > 10000:
            assert_close(out, expected)


@pytest.mark.parametrize("block_m", [128, 256])
def test_fp8_gemm_nt_splits_the_depth_between_two_blocks(block_m: int) -> None:
    """Through the extension, so that every depth is split, one K-block and odd numbers of them too."""
    extension = pytest.importorskip("dsv3rt._C")
    shapes = [(1, 8, 128), (300, 264, 384), (16 * block_m, 512, 1040), (64, 7168, 4096), (257, 136, 16)]
    for seed, (m, n, k) in enumerate(shapes):
        random = Random(seed, decades=2)
        x, w = random.rows(m, k), random.blocks(n, k)
        expected, magnitude = product(x, w)
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
        operands = [part for q in (x, w) for part in (q.data.view(torch.uint8), q.scale)]
        for _ in range(3):
            extension.fp8_gemm_nt(*operands, out, tile=(block_m, 128, 3, 8))
            assert_within_truncation(out, expected, magnitude)
            out.fill_(torch.nan)
    x, w = random.rows(4096, 128), random.blocks(4096, 128)
    operands = [part for q in (x, w) for part in (q.data.view(torch.uint8), q.scale)]
    out = torch.empty((4096, 4096), dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="halves of a depth need a cluster for each tile"):
        extension.fp8_gemm_nt(*operands, out, tile=(block_m, 128, 3, 8))


def test_fp8_gemm_nt_accumulates_in_place() -> None:
    for seed in range(100):
        random = Random(seed, decades=1)
        m, n, k = random.pick(ROWS), random.pick([8, 264, 576, 2112]), random.pick([128, 256, 1024])
        x, w = random.rows(m, k), random.rows(n, k)
        added = double(x) @ double(w).t()
        before = torch.randn((m, n), device="cuda") * added.std().float()
        out = before.clone()
        assert ops.fp8_gemm_nt(x, w, accumulate_into=out) is out
        assert_close(out, before.double() + added)


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


@pytest.mark.parametrize("start", range(0, 500, 100))
def test_m_grouped_fp8_gemm_nt_matches_fp64_on_random_layouts(start: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=seed % 13)
        groups = random.pick([1, 2, 5, 33])
        layout, segments, total = random.layout([0, 0, 1, 63, 128, 129, 500], groups)
        n, k = random.pick([8, 264, 576]), random.pick([128, 272, 1024])
        x, w = random.rows(total, k), random.blocks(groups, n, k)
        x.data.view(torch.uint8)[segments[-1][1] :] = 0x7F  # NaN in the padding
        out = torch.full((total, n), torch.nan, dtype=[torch.bfloat16, torch.float32][seed % 2], device="cuda")
        kernels.m_grouped_fp8_gemm_nt(x, w, layout, out, num_sms=random.pick([0, 1, 66]))
        x_double, w_double = double(x), double(w)
        for group, (first, last) in enumerate(segments):
            if last > first:
                a, b = x_double[first:last], w_double[group].t()
                assert_within_truncation(out[first:last], a @ b, a.abs() @ b.abs())


def test_m_grouped_fp8_gemm_nt_takes_a_masked_buffer_in_a_graph() -> None:
    """As decoding calls it: capacity for every expert, counts that change between replays."""
    random = Random(9, decades=2)
    groups, capacity, n, k = 9, 256, 264, 512
    counts = torch.zeros(groups, dtype=torch.int32, device="cuda")
    layout = GroupLayout.of_capacity(counts, capacity)
    x, w = random.rows(groups * capacity, k), random.blocks(groups, n, k)
    ops.m_grouped_fp8_gemm_nt(x, w, layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.m_grouped_fp8_gemm_nt(x, w, layout).view(groups, capacity, n)
    x_double, w_double = double(x).view(groups, capacity, k), double(w)
    for filled in ([0, 1, 63, 64, 65, 128, 129, 255, 256], [256] * 9, [0] * 9, [5, 0, 0, 200, 0, 1, 0, 0, 17]):
        counts.copy_(torch.tensor(filled, dtype=torch.int32))
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for g, count in enumerate(filled):
            a, b = x_double[g, :count], w_double[g].t()
            if count:
                assert_within_truncation(y[g, :count], a @ b, a.abs() @ b.abs())


def test_m_grouped_fp8_gemm_nt_takes_one_huge_group() -> None:
    random = Random(0, decades=2)
    counts = [0] * 100 + [6000] + [0] * 155
    offsets = [0] * 101 + [6016] * 156
    layout = GroupLayout(*(torch.tensor(v, dtype=torch.int32, device="cuda") for v in (counts, offsets)))
    x, w = random.rows(6016, 256), random.blocks(256, 128, 256)
    out = ops.m_grouped_fp8_gemm_nt(x, w, layout)
    assert_close(out[:6000], double(x)[:6000] @ double(QuantTensor(w.data[100], w.scale[100], w.tile)).t())


@pytest.mark.parametrize("start", range(0, 500, 100))
def test_k_grouped_fp8_gemm_nt_matches_fp64_on_random_layouts(start: int) -> None:
    for seed in range(start, start + 100):
        random = Random(seed, decades=1)
        groups = random.pick([1, 2, 5, 17])
        layout, segments, total = random.layout([0, 0, 1, 63, 128, 129, 500], groups, spare=0)
        if total == 0:
            continue
        m, n = random.pick([8, 130, 576]), random.pick([8, 264, 576])
        x, y = random.rows(m, total), random.rows(n, total)
        for (_, last), end in zip(segments, layout.offsets[1:].tolist(), strict=True):
            for q in (x, y):
                q.data.view(torch.uint8)[:, last:end] = 0
        before = torch.randn((groups, m, n), device="cuda") * 1e4
        out = before.clone()
        ops.k_grouped_fp8_gemm_nt(x, y, layout, accumulate_into=out)
        x_double, y_double = double(x), double(y)
        for group, (first, last) in enumerate(segments):
            if last > first:
                assert_close(out[group], before[group] + x_double[:, first:last] @ y_double[:, first:last].t())
            else:
                assert torch.equal(out[group], before[group])
        poison = torch.full_like(out, torch.nan)  # most likely the memory of the next one
        del poison
        started = ops.k_grouped_fp8_gemm_nt(x, y, layout)
        for group, (first, last) in enumerate(segments):
            assert_close(started[group], x_double[:, first:last] @ y_double[:, first:last].t())


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
