"""Quantisation, against an oracle in numpy that knows E4M3 only as a table of its 256 values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import GroupLayout, QuantTensor

NAN, INF = float("nan"), float("inf")


def e4m3_table() -> np.ndarray:
    """The value of each code 0..126: sign-less, 4 exponent bits of bias 7, 3 mantissa bits, subnormals below code 8."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def round_to_e4m3(x: np.ndarray) -> np.ndarray:
    table = e4m3_table()
    magnitude = np.minimum(np.abs(x).astype(np.float64), 448.0)
    above = np.clip(np.searchsorted(table, magnitude), 1, 126)
    low, high = table[above - 1], table[above]
    upper_is_even = above % 2 == 0
    take_high = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & upper_is_even)
    return np.copysign(np.where(take_high, high, low), x)


def quantize_tile(tile: np.ndarray, pow2_scales: bool) -> tuple[np.ndarray, np.float32]:
    amax = np.maximum(np.abs(tile).max(initial=np.float32(0)), np.float32(2.0**-100))
    scale = np.float32(amax) / np.float32(448)
    if pow2_scales:
        mantissa, exponent = np.frexp(scale)
        scale = np.float32(np.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))
    return round_to_e4m3(tile * (np.float32(1) / scale)), scale


def oracle(x: Tensor, tile: tuple[int, int], pow2_scales: bool) -> tuple[Tensor, Tensor]:
    """(data as float64, scale as float32) of a 2-D tensor."""
    values = x.float().numpy()
    rows, columns = values.shape
    data = np.zeros((rows, columns))
    scale = np.zeros((-(-rows // tile[0]), -(-columns // tile[1])), dtype=np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            data[block], scale[i, j] = quantize_tile(values[block], pow2_scales)
    return torch.from_numpy(data), torch.from_numpy(scale)


def assert_is(q: QuantTensor, expected: tuple[Tensor, Tensor]) -> None:
    assert q.data.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(q.data.double(), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(q.scale, expected[1], rtol=0, atol=0)


def wide_range(*shape: int) -> Tensor:
    """Rows of magnitudes 1e-12 .. 1e12."""
    exponents = torch.linspace(-12, 12, shape[-2]).unsqueeze(-1)
    return torch.randn(shape) * 10.0**exponents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (3, 128), (5, 144), (9, 512)])
def test_quantize_1x128_matches_oracle(shape: tuple[int, int], pow2_scales: bool, dtype: torch.dtype) -> None:
    x = wide_range(*shape).to(dtype)
    assert_is(ops.quantize_1x128(x, pow2_scales=pow2_scales), oracle(x, (1, 128), pow2_scales))


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (127, 32), (128, 48), (200, 16)])
def test_quantize_1x128_transpose_matches_oracle(shape: tuple[int, int], pow2_scales: bool) -> None:
    x = wide_range(*shape)
    q, q_t = ops.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True)
    assert_is(q, oracle(x, (1, 128), pow2_scales))
    T = shape[0]
    padded = -(-T // 128) * 128
    expected_data, expected_scale = oracle(x.t().contiguous(), (1, 128), pow2_scales)
    assert q_t.shape == (shape[1], padded)
    assert_is(QuantTensor(q_t.data[:, :T], q_t.scale, q_t.tile), (expected_data, expected_scale))
    assert q_t.data[:, T:].view(torch.uint8).eq(0).all()


def test_quantize_1x128_rounds_ties_to_even_and_saturates() -> None:
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([448.0, 1.0625, 1.1875, -1.0625, 2.0**-10, 3 * 2.0**-10, 440.0, 432.0])
    q = ops.quantize_1x128(x)
    assert q.scale.item() == 1.0
    expected = torch.tensor([448.0, 1.0, 1.25, -1.0, 0.0, 2.0**-8, 448.0, 448.0])
    torch.testing.assert_close(q.data[0, :8].float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "stride"), [(1, 4), (3, 4), (4, 4), (5, 8), (130, 132)])
def test_quantize_1x128_lays_scales_out_for_the_gemm(rows: int, stride: int) -> None:
    q, q_t = ops.quantize_1x128(torch.randn(rows, 400), with_transpose=True)
    assert q.scale.shape == (rows, 4)
    assert q.scale.stride() == (1, stride)
    assert q_t.scale.stride() == (1, 400)
    # The pad between rows and the aligned stride is part of the storage, and zero.
    pad = torch.as_strided(q.scale, (4, stride - rows), (stride, 1), storage_offset=rows)
    assert pad.eq(0).all()


@pytest.mark.parametrize("pow2_scales", [False, True])
def test_quantize_1x128_error_is_relative_to_the_tile(pow2_scales: bool) -> None:
    x = wide_range(49, 256)
    error = (ops.dequantize(ops.quantize_1x128(x, pow2_scales=pow2_scales)) - x).abs()
    amax = x.view(49, 2, 128).abs().amax(-1).repeat_interleave(128, -1)
    # 3 mantissa bits round to 2^-4 relative; subnormals to 2^-10 of a scale that is at most 2 amax / 448.
    assert (error <= 1.01 * torch.maximum(x.abs() * 2**-4, amax * (2 / 448 * 2**-10))).all()


def test_quantize_1x128_pow2_scale_is_the_next_power_of_two() -> None:
    q = ops.quantize_1x128(wide_range(97, 128))
    pow2 = ops.quantize_1x128(wide_range(97, 128) * 0 + ops.dequantize(q), pow2_scales=True).scale
    mantissa = torch.frexp(pow2).mantissa
    assert mantissa.eq(0.5).all()
    x = torch.zeros(3, 128)
    x[:, 0] = torch.tensor([448.0, 448.0 * 1.001, 447.0])
    assert ops.quantize_1x128(x, pow2_scales=True).scale.flatten().tolist() == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("pow2_scales", [False, True])
def test_quantize_1x128_poisons_exactly_the_tile(value: float, pow2_scales: bool) -> None:
    x = torch.randn(130, 400)
    x[129, 390] = value  # the tile of rows 128 and 129, and of the padding below them
    q, q_t = ops.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True)
    bad, bad_t = ops.dequantize(q).isnan(), ops.dequantize(q_t).isnan()
    assert bad[129, 384:].all()
    assert bad.sum() == 16
    assert bad_t[390, 128:].all()
    assert bad_t.sum() == 128
    assert q_t.data[:, 130:].view(torch.uint8).eq(0).all()
    # Under a NaN scale all data are NaN; under an infinite one its reciprocal is 0, and only infinity * 0 is NaN.
    nan_data = q.data[129, 384:].float().isnan()
    assert nan_data.tolist() == [math.isnan(value) or column == 390 for column in range(384, 400)]


def test_quantize_128x128_poisons_exactly_the_block() -> None:
    w = torch.randn(200, 300)
    w[150, 299] = INF
    bad = ops.dequantize(ops.quantize_128x128(w)).isnan()
    assert bad[128:, 256:].all()
    assert bad.sum() == 72 * 44


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-45])
def test_quantize_1x128_keeps_tiny_tiles_finite(value: float) -> None:
    q, q_t = ops.quantize_1x128(torch.full((3, 128), value), with_transpose=True)
    for part in (q, q_t):
        assert part.scale.isfinite().all()
        assert ops.dequantize(part).abs().le(abs(value)).all()


def test_quantize_1x128_keeps_small_gradients() -> None:
    x = torch.randn(4, 128) * 1e-25  # far under DeepGEMM's amax floor of 1e-4
    assert ops.calc_diff(ops.dequantize(ops.quantize_1x128(x)), x) < 1e-3


@pytest.mark.parametrize("shape", [(0, 256), (5, 0), (0, 0)])
def test_quantize_1x128_handles_empty(shape: tuple[int, int]) -> None:
    q, q_t = ops.quantize_1x128(torch.empty(shape), with_transpose=True)
    assert q.shape == shape
    assert q.scale.shape == (shape[0], -(-shape[1] // 128))
    assert q_t.shape == (shape[1], -(-shape[0] // 128) * 128)
    assert ops.dequantize(q).shape == shape


def test_quantize_1x128_takes_strided_rows() -> None:
    x = torch.randn(6, 512)[:, 128:256]
    assert_is(ops.quantize_1x128(x), oracle(x.contiguous(), (1, 128), False))


def test_quantize_1x128_lets_no_gradient_through() -> None:
    q = ops.quantize_1x128(torch.randn(2, 128, requires_grad=True))
    assert not q.data.requires_grad
    assert not q.scale.requires_grad


@pytest.mark.parametrize("with_transpose", [False, True])
def test_quantize_1x128_is_a_registered_op(with_transpose: bool) -> None:
    op = torch.ops.dsv3rt.quantize_1x128.default
    for shape in [(5, 144), (128, 256)]:
        # test_aot_dispatch_dynamic compiles with symbolic shapes, so the fake implementation must not specialise.
        torch.library.opcheck(op, (torch.randn(shape), False, with_transpose))


def test_quantize_1x128_fake_has_the_real_layout() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(131, 400)
    real = ops.quantize_1x128(x, with_transpose=True)
    with FakeTensorMode() as mode:
        fake = ops.quantize_1x128(mode.from_tensor(x), with_transpose=True)
    for a, b in zip(real, fake, strict=True):
        for name in ("data", "scale"):
            got, want = getattr(b, name), getattr(a, name)
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_quantize_1x128_compiles_without_graph_breaks() -> None:
    def round_trip(x: Tensor) -> Tensor:
        return ops.dequantize(ops.quantize_1x128(x * 2))

    x = torch.randn(5, 256)
    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), round_trip(x), rtol=0, atol=0)


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 77), (257, 300)])
def test_quantize_128x128_matches_oracle(shape: tuple[int, int], pow2_scales: bool) -> None:
    w = torch.randn(shape) * 10.0 ** torch.linspace(-9, 9, shape[0])[:, None]
    q = ops.quantize_128x128(w, pow2_scales=pow2_scales)
    assert_is(q, oracle(w, (128, 128), pow2_scales))
    assert q.scale.is_contiguous()
    assert q.tile == (128, 128)


def test_quantize_128x128_batches_experts() -> None:
    w = torch.randn(3, 130, 200).bfloat16()
    q = ops.quantize_128x128(w)
    for x in range(3):
        assert_is(QuantTensor(q.data[x], q.scale[x], q.tile), oracle(w[x], (128, 128), False))
    torch.testing.assert_close(ops.dequantize(q)[1], ops.dequantize(ops.quantize_128x128(w[1])), rtol=0, atol=0)


def test_quantize_128x128_commutes_with_transposition() -> None:
    w = torch.randn(130, 300)
    q, q_t = ops.quantize_128x128(w), ops.quantize_128x128(w.t())
    assert_is(q_t, (q.data.t().double(), q.scale.t()))


@pytest.mark.parametrize("shape", [(1, 1), (130, 77), (257, 300), (3, 130, 200), (0, 128), (2, 0, 5)])
def test_transpose_128x128_is_the_other_orientation(shape: tuple[int, ...]) -> None:
    q, q_t = ops.quantize_128x128(torch.randn(shape), with_transpose=True)
    got = ops.transpose_128x128(q)
    assert got.tile == (128, 128)
    for one, want in ((got.data.view(torch.uint8), q_t.data.view(torch.uint8)), (got.scale, q_t.scale)):
        assert torch.equal(one, want)
        assert one.stride() == want.stride()


def test_transpose_128x128_moves_every_byte_as_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    q = QuantTensor(codes, torch.tensor([[NAN]]), (128, 128))
    got = ops.transpose_128x128(q)
    assert torch.equal(got.data.view(torch.uint8), codes.view(torch.uint8).t())
    assert got.scale.isnan().all()


def test_transpose_128x128_fake_has_the_real_layout() -> None:
    """Shapes and strides; torch.library.opcheck knows no FP8 inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = ops.quantize_128x128(torch.randn(2, 131, 400))
    real = ops.transpose_128x128(q)
    with FakeTensorMode() as mode:
        fake = ops.transpose_128x128(QuantTensor(mode.from_tensor(q.data), mode.from_tensor(q.scale), q.tile))
    for name in ("data", "scale"):
        got, want = getattr(fake, name), getattr(real, name)
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_transpose_128x128_rejects_bad_arguments() -> None:
    q = ops.quantize_128x128(torch.randn(130, 128))
    with pytest.raises(ValueError, match=r"^transpose_128x128: q\.tile must be \(128, 128\), got \(1, 128\)$"):
        ops.transpose_128x128(ops.quantize_1x128(torch.randn(4, 128)))
    with pytest.raises(ValueError, match=r"^transpose_128x128: q\.data must be contiguous, got stride \(1, 128\)$"):
        ops.transpose_128x128(QuantTensor(q.data.t(), q.scale.t(), q.tile))
    with pytest.raises(ValueError, match=r"^transpose_128x128: q must have 2 or 3 dimensions, got \(4,\)$"):
        ops.transpose_128x128(QuantTensor(q.data[0, :4], q.scale, q.tile))


def test_quantize_128x128_handles_empty() -> None:
    assert ops.quantize_128x128(torch.empty(0, 128)).scale.shape == (0, 1)
    assert ops.quantize_128x128(torch.empty(2, 0, 128)).scale.shape == (2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_rounds_once_to_its_dtype(dtype: torch.dtype) -> None:
    q = ops.quantize_1x128(wide_range(5, 144))
    scale = q.scale.repeat_interleave(128, 1)[:, :144]
    expected = torch.from_numpy((q.data.float().numpy() * scale.numpy()).astype(np.float32)).to(dtype)
    torch.testing.assert_close(ops.dequantize(q, dtype), expected, rtol=0, atol=0)


def test_quantize_rejects_bad_arguments() -> None:
    x = torch.randn(4, 256)
    with pytest.raises(TypeError, match=r"^quantize_1x128: x_TD must be bfloat16 or float32, got float16$"):
        ops.quantize_1x128(x.half())
    with pytest.raises(ValueError, match=r"^quantize_1x128: x_TD must have shape \(\*, \*\), got \(4, 2, 128\)$"):
        ops.quantize_1x128(x.view(4, 2, 128))
    with pytest.raises(ValueError, match=r"^quantize_1x128: x_TD must have D % 16 == 0, got D = 100$"):
        ops.quantize_1x128(torch.randn(4, 100))
    with pytest.raises(ValueError, match=r"^quantize_1x128: x_TD must have contiguous rows, got stride \(1, 4\)$"):
        ops.quantize_1x128(torch.randn(16, 4).t())
    with pytest.raises(TypeError, match=r"^quantize_128x128: w_FD must be bfloat16 or float32, got int64$"):
        ops.quantize_128x128(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^quantize_128x128: w_FD must have 2 or 3 dimensions, got \(4,\)$"):
        ops.quantize_128x128(torch.zeros(4))
    q = ops.quantize_1x128(x)
    with pytest.raises(ValueError, match=r"^dequantize: q.scale must have shape \(4, 2\), got \(4, 1\)$"):
        ops.dequantize(QuantTensor(q.data, q.scale[:, :1], q.tile))
    with pytest.raises(ValueError, match=r"^dequantize: q.tile must be \(1, 128\) or \(128, 128\), got \(1, 64\)$"):
        ops.dequantize(QuantTensor(q.data, q.scale, (1, 64)))
    with pytest.raises(TypeError, match=r"^dequantize: dtype must be bfloat16 or float32 or float64, got int32$"):
        ops.dequantize(q, torch.int32)


def test_quantize_1x128_gathers_rows() -> None:
    """To the bit what casting the gathered rows gives; entries of padding point nowhere."""
    counts, offsets = (torch.tensor(values, dtype=torch.int32) for values in ([3, 0, 130], [0, 128, 128, 384]))
    layout = GroupLayout(counts, offsets)
    x = torch.randn(20, 48).bfloat16()
    rows_P = torch.randint(0, 20, (384,), dtype=torch.int32)
    want = ops.quantize_1x128(x[rows_P], layout=layout, with_transpose=True)
    rows_P[3:128], rows_P[258:] = 1 << 30, -7
    got = ops.quantize_1x128(x, layout=layout, rows_P=rows_P, with_transpose=True)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8))
        assert torch.equal(one.scale, other.scale)
    empty = ops.quantize_1x128(x[:0], layout=GroupLayout(counts * 0, offsets * 0), rows_P=rows_P)
    assert not empty.data.view(torch.uint8).any()


def test_quantize_1x128_rejects_rows_without_a_layout() -> None:
    with pytest.raises(ValueError, match=r"^quantize_1x128: layout must be given with rows_P, got None$"):
        ops.quantize_1x128(torch.randn(4, 16), rows_P=torch.zeros(4, dtype=torch.int32))
    layout = GroupLayout(torch.tensor([4], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"^quantize_1x128: rows_P must be int32, got int64$"):
        ops.quantize_1x128(torch.randn(4, 16), layout=layout, rows_P=torch.zeros(4, dtype=torch.int64))
