"""quantize_1x128 on the GPU is bitwise its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import reference
from dsv3rt.ops.types import QuantTensor
from tests.gpu.quant_cases import (
    FP8,
    Guarded,
    assert_pads_kept,
    assert_same_bits,
    columns_up_to,
    random_layout,
    random_rows,
    up_to,
)

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


@pytest.mark.parametrize(("first", "last"), [(0, 300), (0, 1), (0, 126), (0, 127), (5, 134)])
def test_quantize_1x128_writes_every_element_and_no_other(first: int, last: int) -> None:
    x = random_rows((300, 1024), torch.bfloat16, seed=2)[first:last, 256:784]
    rows, columns = x.shape
    padded = -(-rows // 128) * 128
    extension = pytest.importorskip("dsv3rt._C")
    expected, expected_t = reference.quant.quantize_1x128(x, pow2_scales=False, with_transpose=True)
    for with_transpose in (False, True):
        room = Guarded()
        data, scale = room.codes(rows, columns), room.row_scales(rows, 5)
        data_t, scale_t = room.codes(columns, padded), room.row_scales(columns, padded // 128)
        transposed = {"data_t": data_t, "scale_t": scale_t} if with_transpose else {}
        extension.quantize_1x128(x, data, scale, **transposed)
        assert_same_bits(QuantTensor(data.view(FP8), scale, (1, 128)), expected)
        assert_pads_kept(scale)
        if with_transpose:
            assert_same_bits(QuantTensor(data_t.view(FP8), scale_t, (1, 128)), expected_t)
        room.assert_intact()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[0], [1], [130, 0, 128, 5], [0, 0, 300, 0], [64, 1, 0, 255] * 70], ids=len)
def test_quantize_1x128_takes_grouped_rows(counts: list[int], dtype: torch.dtype) -> None:
    layout, spans, total = random_layout(counts, spare=200)
    used = spans[-1][2]
    x = random_rows((total, 144), dtype, seed=len(counts))
    for _, end, padded_end in spans:
        x[end:padded_end] = torch.nan
    x[used:] = torch.nan
    expected, expected_t = reference.quant.quantize_1x128(x, False, True, layout)
    assert not ops.dequantize(expected).isnan().any()
    got, got_t = ops.quantize_1x128(x, layout=layout, with_transpose=True)
    assert_same_bits(up_to(ops.quantize_1x128(x, layout=layout), used), up_to(expected, used))
    assert_same_bits(up_to(got, used), up_to(expected, used))
    assert_same_bits(columns_up_to(got_t, used), columns_up_to(expected_t, used))


@pytest.mark.parametrize("counts", [[128, 256], [5, 0, 131, 300], [0, 0], [1]], ids=str)
@pytest.mark.parametrize("columns", [16, 208, 640])
def test_quantize_1x128_gathers_rows(counts: list[int], columns: int) -> None:
    """Rows anywhere, some twice, from a slice of wider rows; entries of padding point nowhere."""
    layout, spans, total = random_layout(counts, spare=128)
    x = random_rows((77, columns + 64), torch.bfloat16, seed=9)[:, 32 : 32 + columns]
    rows_P = torch.randint(0, 77, (total,), device="cuda", dtype=torch.int32)
    padding = torch.ones(total, dtype=torch.bool, device="cuda")
    for start, end, _ in spans:
        padding[start:end] = False
    gathered = x[rows_P]
    rows_P[padding] = 1 << 30
    used = spans[-1][2]
    for with_transpose in (False, True):
        got = ops.quantize_1x128(x, layout=layout, rows_P=rows_P, with_transpose=with_transpose)
        want = ops.quantize_1x128(gathered, layout=layout, with_transpose=with_transpose)
        got_rows, want_rows = (got[0], want[0]) if with_transpose else (got, want)
        assert_same_bits(up_to(got_rows, used), up_to(want_rows, used))
        if with_transpose:
            assert_same_bits(columns_up_to(got[1], used), columns_up_to(want[1], used))


def test_quantize_1x128_takes_more_rows_than_a_grid_has() -> None:
    """Two row tiles a block row, and one more of those than a grid can have along y."""
    x = torch.randn(65536 * 256, 16, device="cuda").bfloat16()
    q, q_t = ops.quantize_1x128(x, with_transpose=True)
    for rows in (slice(0, 256), slice(len(x) - 384, len(x))):
        want, want_t = ops.quantize_1x128(x[rows].contiguous(), with_transpose=True)
        tiles = slice(rows.start // 128, rows.stop // 128)
        assert q.data[rows].view(torch.uint8).equal(want.data.view(torch.uint8))
        assert q.scale[rows].equal(want.scale)
        assert q_t.data[:, rows].view(torch.uint8).equal(want_t.data.view(torch.uint8))
        assert q_t.scale[:, tiles].equal(want_t.scale)


def test_quantize_1x128_leaves_rows_past_the_last_group_alone() -> None:
    layout, _, total = random_layout([100, 3], spare=129)
    x = random_rows((total, 256), torch.bfloat16, seed=0)
    extension = pytest.importorskip("dsv3rt._C")
    padded = -(-total // 128) * 128
    room = Guarded()
    data, scale = room.codes(total, 256), room.row_scales(total, 2)
    data_t, scale_t = room.codes(256, padded), room.row_scales(256, padded // 128)
    groups = {"counts": layout.counts_X, "offsets": layout.offsets}
    for transposed in ({}, {"data_t": data_t, "scale_t": scale_t}):
        extension.quantize_1x128(x, data, scale, **transposed, **groups)
        assert data[256:].eq(0x7F).all()
        assert scale[256:].isnan().all()
    assert data_t[:, 256:].eq(0x7F).all()
    assert scale_t[:, 2:].isnan().all()
    room.assert_intact()


def test_quantize_1x128_rounds_every_mantissa() -> None:
    """All 2^23 mantissas as amax: the kernel divides by 448, and inverts the scale, by steps of its own."""
    for start in range(0, 2**23, 2**20):
        mantissas = torch.arange(start, start + 2**20, device="cuda", dtype=torch.int32)
        x = torch.zeros((2**20, 16), device="cuda")
        x[:, 0] = (mantissas + (127 << 23)).view(torch.float32)
        x[:, 1] = x[:, 0] * 0.3
        got = ops.quantize_1x128(x)
        scale = x[:, 0] / torch.full_like(x[:, 0], 448.0)
        assert torch.equal(got.scale[:, 0], scale)
        inverse = torch.ones_like(scale) / scale
        assert torch.equal(got.data.view(torch.uint8), (x * inverse[:, None]).to(FP8).view(torch.uint8))


def test_quantize_1x128_keeps_padding_zero_beside_a_poisoned_tile() -> None:
    x = torch.randn((130, 144), device="cuda")
    x[129, 3], x[128, 17] = torch.nan, torch.inf
    _, got_t = ops.quantize_1x128(x, with_transpose=True)
    assert got_t.data[:, 130:].view(torch.uint8).eq(0).all()
    assert_same_bits(got_t, reference.quant.quantize_1x128(x, pow2_scales=False, with_transpose=True)[1])


def test_quantize_1x128_runs_on_the_current_stream_and_in_a_graph() -> None:
    x = random_rows((256, 1024), torch.bfloat16, seed=3)
    ops.quantize_1x128(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_1x128(x)
    x.copy_(random_rows((256, 1024), torch.bfloat16, seed=4))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, reference.quant.quantize_1x128(x, pow2_scales=False, with_transpose=False)[0])


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
    assert_same_bits(got, reference.quant.quantize_1x128(x_torch, pow2_scales=False, with_transpose=False)[0])


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
