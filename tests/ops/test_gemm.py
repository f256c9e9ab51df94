"""Matrix products, against FP64 products of operands that the test dequantises itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import GroupLayout, QuantTensor
from dsv3rt.ops.types import empty_row_scales

# FP32 sums of up to 512 products of either sign: about sqrt(512) roundings of 2^-24, times a margin.
FP32_SUM = {"rtol": 1e-5, "atol": 1e-4}
# One rounding to BF16 is 2^-9.
BF16_OUT = {"rtol": 2**-8, "atol": 1e-2}


def wide(q: QuantTensor) -> Tensor:
    """FP64 of a 2-D QuantTensor, element by element of its scale."""
    rows, columns = q.data.shape
    i = torch.arange(rows) // q.tile[0]
    j = torch.arange(columns) // q.tile[1]
    return q.data.double() * q.scale.double()[i][:, j]


def expert(w: QuantTensor, g: int) -> QuantTensor:
    return QuantTensor(w.data[g], w.scale[g], w.tile)


def layout_of(counts: list[int], block: int) -> GroupLayout:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + -(-count // block) * block)
    return GroupLayout(torch.tensor(counts, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32))


def spans(layout: GroupLayout) -> list[slice]:
    counts, offsets = layout.counts_X.tolist(), layout.offsets.tolist()
    return [slice(offsets[g], offsets[g] + count) for g, count in enumerate(counts)]


@pytest.mark.parametrize("rowwise_weight", [False, True])
@pytest.mark.parametrize(("T", "F", "D"), [(1, 1, 16), (5, 130, 144), (64, 48, 512)])
def test_fp8_gemm_nt_matches_fp64(T: int, F: int, D: int, rowwise_weight: bool) -> None:
    x = ops.quantize_1x128(torch.randn(T, D))
    w = (ops.quantize_1x128 if rowwise_weight else ops.quantize_128x128)(torch.randn(F, D))
    expected = wide(x) @ wide(w).t()
    y = ops.fp8_gemm_nt(x, w, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), expected, **FP32_SUM)
    y_bf16 = ops.fp8_gemm_nt(x, w)
    assert y_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(y_bf16.double(), expected, **BF16_OUT)


def test_fp8_gemm_nt_is_exact_on_small_integers() -> None:
    x, w = torch.randint(-8, 9, (7, 256)).float(), torch.randint(-8, 9, (130, 256)).float()
    x[:, ::128] = w[::128, ::128] = 448.0  # scales are 1, and every sum is an integer below 2^24
    y = ops.fp8_gemm_nt(ops.quantize_1x128(x), ops.quantize_128x128(w), out_dtype=torch.float32)
    assert torch.equal(y, (x.long() @ w.long().t()).float())


def test_fp8_gemm_nt_is_close_to_the_unquantised_product() -> None:
    x, w = torch.randn(32, 512), torch.randn(64, 512)
    y = ops.fp8_gemm_nt(ops.quantize_1x128(x), ops.quantize_128x128(w), out_dtype=torch.float32)
    # E4M3 rounds both operands by about 2^-4 / sqrt(3): calc_diff near that squared.
    assert 1e-5 < ops.calc_diff(y, x @ w.t()) < 2e-3


def test_fp8_gemm_nt_accumulates_in_place() -> None:
    x, w = ops.quantize_1x128(torch.randn(5, 128)), ops.quantize_128x128(torch.randn(6, 128))
    total = torch.randn(5, 6)
    before = total.double()
    assert ops.fp8_gemm_nt(x, w, accumulate_into=total) is total
    torch.testing.assert_close(total.double(), before + wide(x) @ wide(w).t(), **FP32_SUM)


@pytest.mark.parametrize(("T", "F"), [(0, 8), (8, 0)])
def test_fp8_gemm_nt_handles_empty(T: int, F: int) -> None:
    y = ops.fp8_gemm_nt(ops.quantize_1x128(torch.empty(T, 128)), ops.quantize_128x128(torch.empty(F, 128)))
    assert y.shape == (T, F)


def test_fp8_gemm_nt_shows_bad_numbers() -> None:
    x = torch.randn(4, 256)
    x[2, 5] = float("inf")
    y = ops.fp8_gemm_nt(ops.quantize_1x128(x), ops.quantize_128x128(torch.randn(8, 256)))
    assert y.isnan().any(dim=1).tolist() == [False, False, True, False]


COUNTS = [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [4, 4, 4, 4]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_m_grouped_fp8_gemm_nt_matches_fp64(counts: list[int]) -> None:
    layout = layout_of(counts, block=4)
    x, w = ops.quantize_1x128(torch.randn(24, 144)), ops.quantize_128x128(torch.randn(4, 130, 144))
    expected = torch.zeros(24, 130, dtype=torch.float64)
    for g, rows in enumerate(spans(layout)):
        expected[rows] = wide(x)[rows] @ wide(expert(w, g)).t()
    y = ops.m_grouped_fp8_gemm_nt(x, w, layout, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), expected, **FP32_SUM)
    assert torch.equal(y == 0, expected == 0)  # padding rows are zero
    torch.testing.assert_close(ops.m_grouped_fp8_gemm_nt(x, w, layout).double(), expected, **BF16_OUT)
    out_PF = torch.full(y.shape, torch.nan)
    assert ops.m_grouped_fp8_gemm_nt(x, w, layout, out_dtype=torch.float32, out_PF=out_PF) is out_PF
    assert torch.equal(out_PF, y)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_k_grouped_fp8_gemm_nt_matches_fp64(counts: list[int]) -> None:
    layout = layout_of([count * 40 for count in counts], block=128)
    P = int(layout.offsets[-1]) + 128
    x, y = ops.quantize_1x128(torch.randn(6, P)), ops.quantize_1x128(torch.randn(10, P))
    total = torch.randn(4, 6, 10)
    before = total.clone()
    expected = total.double()
    for g, columns in enumerate(spans(layout)):
        expected[g] += wide(x)[:, columns] @ wide(y)[:, columns].t()
    assert ops.k_grouped_fp8_gemm_nt(x, y, layout, accumulate_into=total) is total
    torch.testing.assert_close(total.double(), expected, **FP32_SUM)
    for g, count in enumerate(counts):
        assert torch.equal(total[g], before[g]) == (count == 0)
    started = ops.k_grouped_fp8_gemm_nt(x, y, layout)
    torch.testing.assert_close(started.double(), expected - before, **FP32_SUM)


def test_grouped_wgrad_from_transposed_quantisation_matches_fp64() -> None:
    """The training path: rows in 128-row segments, x^T and dy^T from with_transpose, one group a segment."""
    layout = layout_of([100, 0, 128, 7], block=128)
    x, dy = torch.zeros(512, 32), torch.zeros(512, 16)
    for rows in spans(layout):
        x[rows], dy[rows] = torch.randn_like(x[rows]), torch.randn_like(dy[rows])
    x_t, dy_t = (ops.quantize_1x128(rows, with_transpose=True)[1] for rows in (x, dy))
    dw = ops.k_grouped_fp8_gemm_nt(dy_t, x_t, layout, accumulate_into=torch.zeros(4, 16, 32))
    for g, rows in enumerate(spans(layout)):
        assert ops.calc_diff(dw[g], dy[rows].t() @ x[rows]) < 2e-3  # the E4M3 rounding of both operands


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_gemm_nt_matches_fp64(counts: list[int], dtype: torch.dtype) -> None:
    layout = layout_of(counts, block=4)
    x, w = torch.randn(24, 32).to(dtype), torch.randn(4, 20, 32).to(dtype)
    expected = torch.zeros(24, 20, dtype=torch.float64)
    for g, rows in enumerate(spans(layout)):
        expected[rows] = x[rows].double() @ w[g].double().t()
    y = ops.grouped_gemm_nt(x, w, layout)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **(FP32_SUM if dtype == torch.float32 else BF16_OUT))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_gemm_nt_passes_gradcheck(counts: list[int]) -> None:
    layout = layout_of(counts, block=2)
    x = torch.randn(18, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.grouped_gemm_nt(x, w, layout), (x, w))


def test_grouped_gemm_nt_keeps_padding_out_of_gradients() -> None:
    layout = layout_of([3, 0, 2], block=4)
    x = torch.randn(16, 6, requires_grad=True)
    w = torch.randn(3, 5, 6, requires_grad=True)
    with torch.no_grad():
        x[3], x[12:] = float("nan"), float("nan")  # rows of padding may hold anything
    y = ops.grouped_gemm_nt(x, w, layout)
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None
    assert w.grad is not None
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()
    padding = [3, 6, 7, *range(8, 16)]
    assert x.grad[padding].eq(0).all()
    assert w.grad[1].eq(0).all()


def test_grouped_gemm_nt_takes_gradients_of_weights_alone() -> None:
    w = torch.randn(1, 5, 6, requires_grad=True)
    x = torch.randn(2, 6)
    ops.grouped_gemm_nt(x, w, layout_of([2], block=1)).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad[0], x.sum(0).expand(5, 6))


def test_grouped_gemm_nt_is_what_the_fp8_product_approximates() -> None:
    layout = layout_of([3, 0, 5, 1], block=4)
    x, w = torch.randn(24, 256), torch.randn(4, 64, 256)
    fp8 = ops.m_grouped_fp8_gemm_nt(ops.quantize_1x128(x), ops.quantize_128x128(w), layout, out_dtype=torch.float32)
    assert ops.calc_diff(fp8, ops.grouped_gemm_nt(x, w, layout)) < 2e-3  # the E4M3 rounding of both operands


def test_fp8_gemm_nt_rejects_bad_arguments() -> None:
    x, w = ops.quantize_1x128(torch.randn(4096, 256)), ops.quantize_128x128(torch.randn(64, 256))
    wrong_rows = QuantTensor(x.data, empty_row_scales(4097, 2, "cpu"), x.tile)
    with pytest.raises(ValueError, match=r"^fp8_gemm_nt: x.scale must have shape \(4096, 2\), got \(4097, 2\)$"):
        ops.fp8_gemm_nt(wrong_rows, w)
    with pytest.raises(ValueError, match=r"^fp8_gemm_nt: x.scale must have stride \(1, 4096\), got \(2, 1\)$"):
        ops.fp8_gemm_nt(QuantTensor(x.data, x.scale.contiguous(), x.tile), w)
    with pytest.raises(ValueError, match=r"^fp8_gemm_nt: x.tile must be \(1, 128\), got \(128, 128\)$"):
        ops.fp8_gemm_nt(w, w)
    with pytest.raises(ValueError, match=r"^fp8_gemm_nt: w.data must have shape \(\*, 256\), got \(64, 128\)$"):
        ops.fp8_gemm_nt(x, ops.quantize_128x128(torch.randn(64, 128)))
    tall = ops.quantize_128x128(torch.randn(256, 64))
    transposed = QuantTensor(tall.data.t(), tall.scale.t().contiguous(), tall.tile)
    with pytest.raises(ValueError, match=r"^fp8_gemm_nt: w.data must be contiguous, got stride \(1, 64\)$"):
        ops.fp8_gemm_nt(x, transposed)
    with pytest.raises(TypeError, match=r"^fp8_gemm_nt: x.data must be float8_e4m3fn, got uint8$"):
        ops.fp8_gemm_nt(QuantTensor(x.data.view(torch.uint8), x.scale, x.tile), w)
    with pytest.raises(TypeError, match=r"^fp8_gemm_nt: out_dtype must be bfloat16 or float32, got float16$"):
        ops.fp8_gemm_nt(x, w, out_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"^fp8_gemm_nt: accumulate_into must be float32, got bfloat16$"):
        ops.fp8_gemm_nt(x, w, accumulate_into=torch.zeros(4096, 64, dtype=torch.bfloat16))


def test_grouped_gemms_reject_bad_arguments() -> None:
    layout = layout_of([2, 2], block=2)
    x, w = ops.quantize_1x128(torch.randn(4, 128)), ops.quantize_128x128(torch.randn(3, 64, 128))
    with pytest.raises(
        ValueError, match=r"^m_grouped_fp8_gemm_nt: layout.counts_X must have shape \(3,\), got \(2,\)$"
    ):
        ops.m_grouped_fp8_gemm_nt(x, w, layout)
    wrong = GroupLayout(layout.counts_X, layout.offsets.long())
    with pytest.raises(TypeError, match=r"^k_grouped_fp8_gemm_nt: layout.offsets must be int32, got int64$"):
        ops.k_grouped_fp8_gemm_nt(x, x, wrong, accumulate_into=torch.zeros(2, 4, 4))
    with pytest.raises(
        ValueError, match=r"^k_grouped_fp8_gemm_nt: accumulate_into must have shape \(\*, 4, 4\), got \(2, 4, 5\)$"
    ):
        ops.k_grouped_fp8_gemm_nt(x, x, layout, accumulate_into=torch.zeros(2, 4, 5))
    w = ops.quantize_128x128(torch.randn(2, 64, 128))
    with pytest.raises(ValueError, match=r"^m_grouped_fp8_gemm_nt: out_PF must have shape \(4, 64\), got \(4, 65\)$"):
        ops.m_grouped_fp8_gemm_nt(x, w, layout, out_PF=torch.zeros(4, 65, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"^m_grouped_fp8_gemm_nt: out_PF must be contiguous"):
        ops.m_grouped_fp8_gemm_nt(x, w, layout, out_PF=torch.zeros(64, 4, dtype=torch.bfloat16).t())
    with pytest.raises(TypeError, match=r"^grouped_gemm_nt: w_XFD must be bfloat16, got float32$"):
        ops.grouped_gemm_nt(torch.randn(4, 8).bfloat16(), torch.randn(2, 3, 8), layout)
    with pytest.raises(ValueError, match=r"^grouped_gemm_nt: w_XFD must have shape \(\*, \*, 8\), got \(2, 3, 9\)$"):
        ops.grouped_gemm_nt(torch.randn(4, 8), torch.randn(2, 3, 9), layout)


def test_m_grouped_fp8_gemm_nt_takes_a_masked_buffer() -> None:
    counts = torch.tensor([3, 0, 128, 77], dtype=torch.int32)
    x = ops.quantize_1x128(torch.randn(4 * 128, 256))
    w = ops.quantize_128x128(torch.randn(4, 64, 256))
    y = ops.m_grouped_fp8_gemm_nt(x, w, GroupLayout.of_capacity(counts, 128), out_dtype=torch.float32)
    x_XCD, w_XFD = ops.dequantize(x).view(4, 128, 256), ops.dequantize(w)
    for g, count in enumerate(counts.tolist()):
        torch.testing.assert_close(y.view(4, 128, 64)[g, :count], x_XCD[g, :count] @ w_XFD[g].t())


def test_group_layout_rejects_a_bad_capacity() -> None:
    counts = torch.zeros(2, dtype=torch.int32)
    for capacity in (0, -128, 100):
        message = rf"^GroupLayout: capacity must be a positive multiple of 128, got {capacity}$"
        with pytest.raises(ValueError, match=message):
            GroupLayout.of_capacity(counts, capacity)
    with pytest.raises(TypeError, match=r"^GroupLayout: counts_X must be int32, got int64$"):
        GroupLayout.of_capacity(counts.long(), 128)
