"""quantize_128x128 on the GPU is bitwise its reference, in both orientations."""

from __future__ import annotations

import pytest
import torch

from dsv3rt import ops
from dsv3rt.ops import reference
from dsv3rt.ops.types import QuantTensor
from tests.gpu.quant_cases import FP8, MATRICES, Guarded, assert_same_bits, random_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_quantize_128x128_matches_reference(shape: tuple[int, ...], pow2_scales: bool, dtype: torch.dtype) -> None:
    w = random_rows(shape, dtype, seed=sum(shape))
    expected, expected_t = reference.quant.quantize_128x128(w, pow2_scales, True)
    assert_same_bits(ops.quantize_128x128(w, pow2_scales=pow2_scales), expected)
    got, got_t = ops.quantize_128x128(w, pow2_scales=pow2_scales, with_transpose=True)
    assert_same_bits(got, expected)
    assert_same_bits(got_t, expected_t)


def test_quantize_128x128_matches_reference_on_many_random_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        step = [1, 4, 8, 16][seed % 4]  # which of these divides decides whether rows start on 16 bytes
        shape = tuple(step * int(torch.randint(1, 400 // step, (), generator=generator)) for _ in range(2))
        w = random_rows(shape, [torch.bfloat16, torch.float32][seed // 4 % 2], seed)
        expected, expected_t = reference.quant.quantize_128x128(w, seed % 3 == 0, True)
        got, got_t = ops.quantize_128x128(w, pow2_scales=seed % 3 == 0, with_transpose=True)
        assert_same_bits(got, expected)
        assert_same_bits(got_t, expected_t)


@pytest.mark.parametrize(("rows", "columns"), [(130, 144), (144, 144), (144, 130), (1, 8), (129, 257)])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_quantize_128x128_takes_views_and_writes_every_element_and_no_other(
    rows: int, columns: int, offset: int
) -> None:
    w = random_rows((2, 200, 512), torch.bfloat16, seed=3)[:, 8 : 8 + rows, offset : offset + columns]
    extension = pytest.importorskip("dsv3rt._C")
    f, d = -(-rows // 128), -(-columns // 128)
    expected, expected_t = reference.quant.quantize_128x128(w, False, True)
    for with_transpose in (False, True):
        room = Guarded()
        data, scale = room.codes(2, rows, columns), room.floats(2, f, d)
        data_t, scale_t = room.codes(2, columns, rows), room.floats(2, d, f)
        transposed = {"data_t": data_t, "scale_t": scale_t} if with_transpose else {}
        extension.quantize_128x128(w, data, scale, **transposed)
        assert_same_bits(QuantTensor(data.view(FP8), scale, (128, 128)), expected)
        if with_transpose:
            assert_same_bits(QuantTensor(data_t.view(FP8), scale_t, (128, 128)), expected_t)
        room.assert_intact()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-38, 3e38])
def test_quantize_128x128_poisons_only_the_block_of_a_special_value(value: float) -> None:
    w = random_rows((2, 300, 272), torch.float32, seed=1)
    w[1, 150, 270] = value
    expected = reference.quant.quantize_128x128(w, False, True)
    for got, want in zip(ops.quantize_128x128(w, with_transpose=True), expected, strict=True):
        assert_same_bits(got, want)


def test_quantize_128x128_handles_empty() -> None:
    for shape in [(0, 128), (128, 0), (0, 5, 5), (2, 0, 128)]:
        q, q_t = ops.quantize_128x128(torch.empty(shape, device="cuda"), with_transpose=True)
        assert q.shape == shape
        assert q_t.shape == (*shape[:-2], shape[-1], shape[-2])


@pytest.mark.parametrize("shape", [*MATRICES, (16, 256, 512), (0, 128), (3, 0, 5)], ids=str)
def test_transpose_128x128_is_the_other_orientation(shape: tuple[int, ...]) -> None:
    w = random_rows(shape, torch.bfloat16, seed=sum(shape))
    w.view(-1)[::1001] = torch.nan
    q, q_t = ops.quantize_128x128(w, with_transpose=True)
    got = ops.transpose_128x128(q)
    assert torch.equal(got.data.view(torch.uint8), q_t.data.view(torch.uint8))
    assert torch.equal(got.scale.view(torch.int32), q_t.scale.view(torch.int32))
    assert got.data.stride() == q_t.data.stride()


@pytest.mark.parametrize("offset", [0, 1, 16])
def test_transpose_128x128_matches_reference_on_many_random_shapes(offset: int) -> None:
    """Random bytes, which start `offset` of them into their memory."""
    generator = torch.Generator().manual_seed(offset)
    for number in range(100):
        unit = [1, 4, 8, 16][number % 4]
        shape = [unit * int(torch.randint(1, 500 // unit, (), generator=generator)) for _ in range(2)]
        leading = [3] if number % 3 == 0 else []
        size = torch.Size([*leading, *shape])
        codes = torch.randint(0, 256, (size.numel() + offset,), dtype=torch.uint8, device="cuda")[offset:].view(size)
        scale = torch.rand(*leading, *(-(-n // 128) for n in shape), device="cuda")
        got = ops.transpose_128x128(QuantTensor(codes.view(FP8), scale, (128, 128)))
        assert torch.equal(got.data.view(torch.uint8), codes.mT)
        assert torch.equal(got.scale, scale.mT)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (144, 144), (130, 144), (144, 130), (1, 16), (129, 257)])
def test_transpose_128x128_writes_every_element_and_no_other(rows: int, columns: int) -> None:
    extension = pytest.importorskip("dsv3rt._C")
    r, c = -(-rows // 128), -(-columns // 128)
    codes = torch.randint(0, 256, (2, rows, columns), dtype=torch.uint8, device="cuda")
    scale = torch.rand(2, r, c, device="cuda")
    room = Guarded()
    data_t, scale_t = room.codes(2, columns, rows), room.floats(2, c, r)
    extension.transpose_128x128(codes, scale, data_t, scale_t)
    assert torch.equal(data_t, codes.mT)
    assert torch.equal(scale_t, scale.mT)
    room.assert_intact()


def test_quantize_128x128_replays_in_a_graph() -> None:
    w = random_rows((256, 1024), torch.bfloat16, seed=3)
    ops.quantize_128x128(w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_128x128(w, with_transpose=True)
    w.copy_(random_rows((256, 1024), torch.bfloat16, seed=4))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, reference.quant.quantize_128x128(w, False, True), strict=True):
        assert_same_bits(got, want)


def test_quantize_128x128_rejects_rows_that_are_not_contiguous() -> None:
    with pytest.raises(ValueError, match=r"^quantize_128x128: w_FD must have contiguous rows on CUDA, got stride"):
        ops.quantize_128x128(torch.randn((16, 32), device="cuda").t())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda w: (w.cpu(), w, w), "w must be a CUDA array"),
        (lambda w: (w.half(), w, w), "w must be bfloat16 or float32|w must be float32 or bfloat16"),
        (lambda w: (w[0], w, w), r"w must have shape \(any, any, any\), got \(64, 256\)"),
        (lambda w: (w, w.to(torch.uint8)[:, :3], w), r"data must have shape \(1, 64, 256\), got \(1, 3, 256\)"),
        (lambda w: (w, w.to(torch.uint8), w), r"scale must have shape \(1, 1, 2\), got \(1, 64, 256\)"),
    ],
)
def test_extension_rejects_bad_arrays(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    extension = pytest.importorskip("dsv3rt._C")
    with pytest.raises((ValueError, TypeError), match="quantize_128x128: " + message):
        extension.quantize_128x128(*arguments(torch.randn((1, 64, 256), device="cuda")))
