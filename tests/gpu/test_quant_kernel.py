"""quantize_1x128 on the GPU is bitwise its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import reference
from dsv3rt.ops.types import QuantTensor, empty_row_scales

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 16),
    (1, 128),
    (3, 7168),
    (63, 576),
    (64, 2112),
    (127, 144),
    (128, 256),
    (129, 512),
    (1000, 1536),
    (4097, 7168),
]


def random_rows(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Values over 24 orders of magnitude between rows, so that every scale differs."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda")
    exponents = torch.rand((shape[0], 1), generator=generator, device="cuda") * 24 - 12
    return (x * 10**exponents).to(dtype)


def assert_same_bits(got: QuantTensor, expected: QuantTensor) -> None:
    assert got.data.shape == expected.data.shape
    assert got.scale.stride() == expected.scale.stride()
    nan = expected.data.float().isnan()
    torch.testing.assert_close(got.data.float().isnan(), nan)
    bits, expected_bits = got.data.view(torch.uint8), expected.data.view(torch.uint8)
    assert torch.equal(bits.masked_fill(nan, 0), expected_bits.masked_fill(nan, 0))
    torch.testing.assert_close(got.scale, expected.scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_1x128_matches_reference(shape: tuple[int, int], pow2_scales: bool, dtype: torch.dtype) -> None:
    x = random_rows(shape, dtype, seed=shape[0] + shape[1])
    expected, expected_t = reference.quant.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True)
    assert_same_bits(ops.quantize_1x128(x, pow2_scales=pow2_scales), expected)
    got, got_t = ops.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True)
    assert_same_bits(got, expected)
    assert_same_bits(got_t, expected_t)


def test_quantize_1x128_matches_reference_on_many_random_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        rows = int(torch.randint(1, 700, (), generator=generator))
        columns = 16 * int(torch.randint(1, 100, (), generator=generator))
        x = random_rows((rows, columns), [torch.bfloat16, torch.float32][seed % 2], seed)
        expected, expected_t = reference.quant.quantize_1x128(x, pow2_scales=seed % 3 == 0, with_transpose=True)
        got, got_t = ops.quantize_1x128(x, pow2_scales=seed % 3 == 0, with_transpose=True)
        assert_same_bits(got, expected)
        assert_same_bits(got_t, expected_t)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-38, 3e38])
def test_quantize_1x128_poisons_only_the_tile_of_a_special_value(value: float) -> None:
    x = random_rows((200, 512), torch.float32, seed=1)
    x[77, 130] = value
    expected, expected_t = reference.quant.quantize_1x128(x, pow2_scales=False, with_transpose=True)
    got, got_t = ops.quantize_1x128(x, with_transpose=True)
    assert_same_bits(got, expected)
    assert_same_bits(got_t, expected_t)
    finite = ops.dequantize(got).isfinite()
    assert finite[77, 128:256].any() == torch.tensor(value).isfinite()
    finite[77, 128:256] = True
    assert finite.all()


def test_quantize_1x128_handles_empty_and_zero() -> None:
    empty, empty_t = ops.quantize_1x128(torch.empty((0, 256), device="cuda"), with_transpose=True)
    assert empty.shape == (0, 256)
    assert empty_t.shape == (256, 0)
    zeros = ops.quantize_1x128(torch.zeros((5, 256), device="cuda", dtype=torch.bfloat16))
    assert ops.dequantize(zeros).eq(0).all()


def test_quantize_1x128_takes_strided_rows_and_writes_every_element() -> None:
    wide = random_rows((300, 1024), torch.bfloat16, seed=2)
    x = wide[:, 256:768]
    extension = pytest.importorskip("dsv3rt._C")
    data = torch.full((300, 512), 0x7F, dtype=torch.uint8, device="cuda")
    scale = empty_row_scales(300, 4, x.device).fill_(float("nan"))
    data_t = torch.full((512, 384), 0x7F, dtype=torch.uint8, device="cuda")
    scale_t = empty_row_scales(512, 3, x.device).fill_(float("nan"))
    extension.quantize_1x128(x, data, scale, data_t=data_t, scale_t=scale_t)
    expected, expected_t = reference.quant.quantize_1x128(x, pow2_scales=False, with_transpose=True)
    fp8 = torch.float8_e4m3fn
    assert_same_bits(QuantTensor(data.view(fp8), scale, (1, 128)), expected)
    assert_same_bits(QuantTensor(data_t.view(fp8), scale_t, (1, 128)), expected_t)


def test_quantize_1x128_runs_on_the_current_stream_and_in_a_graph() -> None:
    x = random_rows((256, 1024), torch.bfloat16, seed=3)
    ops.quantize_1x128(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_1x128(x)
    x.copy_(random_rows((256, 1024), torch.bfloat16, seed=4))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, reference.quant.quantize_1x128(x, pow2_scales=False, with_transpose=False))


def test_quantize_1x128_compiles() -> None:
    x = random_rows((256, 1024), torch.bfloat16, seed=5)

    def round_trip(x: Tensor) -> Tensor:
        return ops.dequantize(ops.quantize_1x128(x * 2))

    torch.testing.assert_close(torch.compile(round_trip, fullgraph=True)(x), round_trip(x), rtol=0, atol=0)


def test_quantize_1x128_takes_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    extension = pytest.importorskip("dsv3rt._C")
    x = cupy.random.default_rng(0).standard_normal((130, 512), dtype=cupy.float32)
    data = cupy.full((130, 512), 0x7F, dtype=cupy.uint8)
    scale = cupy.full((4, 132), cupy.nan, dtype=cupy.float32).T[:130]
    with pytest.raises(ValueError, match="stream must be given"):
        extension.quantize_1x128(x, data, scale)
    extension.quantize_1x128(x, data, scale, stream=cupy.cuda.get_current_stream().ptr)
    cupy.cuda.get_current_stream().synchronize()
    got = QuantTensor(torch.from_dlpack(data).view(torch.float8_e4m3fn), torch.from_dlpack(scale), (1, 128))
    x_torch = torch.from_dlpack(x)
    assert_same_bits(got, reference.quant.quantize_1x128(x_torch, pow2_scales=False, with_transpose=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x: (x.cpu(), x, x), "x must be a CUDA array"),
        (lambda x: (x.half(), x, x), "x must be float32 or bfloat16|x must be bfloat16 or float32"),
        (lambda x: (x[:, :8].contiguous(), x, x), "x must have a multiple of 16 columns, got 8"),
        (lambda x: (x.t(), x, x), "x must have strides"),
        (lambda x: (x[:, 1:129], x, x), "x must be aligned to 16 bytes"),
        (lambda x: (x, x, x), "data must be float8_e4m3fn or uint8, got float32"),
        (lambda x: (x, x.to(torch.uint8)[:3], x), r"data must have shape \(64, 256\), got \(3, 256\)"),
        (lambda x: (x, x.to(torch.uint8), x), r"scale must have shape \(64, 2\), got \(64, 256\)"),
        (lambda x: (x, x.to(torch.uint8), x[:, :2].contiguous()), "scale must have strides"),
    ],
)
def test_extension_rejects_bad_arrays(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    extension = pytest.importorskip("dsv3rt._C")
    x = torch.randn((64, 256), device="cuda")
    with pytest.raises((ValueError, TypeError), match="quantize_1x128: " + message):
        extension.quantize_1x128(*arguments(x))
