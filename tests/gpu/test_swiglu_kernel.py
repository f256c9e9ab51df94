"""SwiGLU with casts on the GPU: its reference on the GPU to the bit, its reference on the CPU within a code, FP64.

From FP8 scales are multiplied once a row instead of once an element, where they allow it. Then the reference on the
GPU, too, is met within a code: products differ by |gate| and a few more ulps, as against the separate ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import GroupLayout, QuantTensor, SwigluGradients
from dsv3rt.ops.reference import swiglu_cast as reference
from dsv3rt.ops.types import empty_row_scales
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
from tests.ops.swiglu_cases import assert_gradients, assert_within_a_code

pytestmark = pytest.mark.gpu

FORWARD_SHAPES = [(1, 16), (3, 128), (63, 576), (127, 144), (129, 512), (1000, 2048), (4097, 2048)]
BACKWARD_SHAPES = [(1, 128), (3, 256), (127, 128), (129, 512), (1000, 2048), (4097, 2048)]


def gates_and_ups(T: int, F: int, seed: int) -> Tensor:
    return random_rows((T, 2 * F), torch.bfloat16, seed, decades=1.5)


def inputs(T: int, F: int, seed: int, fp8: bool) -> tuple[Tensor | QuantTensor, Tensor, Tensor, Tensor]:
    """gate_up as the op takes it and in FP32, the gradient of the product, row weights."""
    x = gates_and_ups(T, F, seed)
    grad, weight = random_rows((T, F), torch.bfloat16, seed + 1), torch.rand(T, device="cuda")
    if not fp8:
        return x, x.float(), grad, weight
    q = ops.quantize_1x128(x)
    return q, ops.dequantize(q), grad, weight


def reference_gradients(
    wide: Tensor, grad: Tensor, weight: Tensor | None, *, pow2_scales: bool = False, layout: GroupLayout | None = None
) -> SwigluGradients:
    return reference.swiglu_backward_quantize_1x128(wide, grad, weight, layout, pow2_scales, True)


def assert_same_gradients(
    got: SwigluGradients,
    want: SwigluGradients,
    assert_same: Callable[[QuantTensor, QuantTensor], None] = assert_same_bits,
) -> None:
    assert_same(got.gate_up, want.gate_up)
    assert_same(got.gate_up_t, want.gate_up_t)
    if got.product_t is not None and want.product_t is not None:
        assert_same(got.product_t, want.product_t)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", FORWARD_SHAPES, ids=str)
def test_swiglu_quantize_1x128_matches_reference(shape: tuple[int, int], pow2_scales: bool, fp8: bool) -> None:
    x, wide, _, weight = inputs(*shape, seed=sum(shape), fp8=fp8)
    assert_same = assert_within_a_code if fp8 else assert_same_bits
    for weight_T in (None, weight):
        expected, expected_t = reference.swiglu_quantize_1x128(wide, weight_T, None, pow2_scales, True)
        alone = ops.swiglu_quantize_1x128(x, weight_T=weight_T, pow2_scales=pow2_scales)
        got, got_t = ops.swiglu_quantize_1x128(x, weight_T=weight_T, pow2_scales=pow2_scales, with_transpose=True)
        assert_same(got, expected)
        assert_same(got_t, expected_t)
        assert_same_bits(alone, got)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=str)
def test_swiglu_backward_quantize_1x128_matches_reference(shape: tuple[int, int], pow2_scales: bool, fp8: bool) -> None:
    x, wide, grad, weight = inputs(*shape, seed=sum(shape), fp8=fp8)
    for weight_T in (None, weight):
        want = reference_gradients(wide, grad, weight_T, pow2_scales=pow2_scales)
        for with_product in (False, True):
            got = ops.swiglu_backward_quantize_1x128(
                x, grad, weight_T=weight_T, pow2_scales=pow2_scales, with_product=with_product
            )
            assert (got.product_t is None) != with_product
            assert_same_gradients(got, want, assert_within_a_code if fp8 else assert_same_bits)


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_backward_from_fp8_repeats_the_forward_product(weighted: bool) -> None:
    x, _, grad, weight = inputs(515, 384, seed=6, fp8=True)
    weight_T = weight if weighted else None
    _, product_t = ops.swiglu_quantize_1x128(x, weight_T=weight_T, with_transpose=True)
    result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight_T, with_product=True)
    assert result.product_t is not None
    assert_same_bits(result.product_t, product_t)


# Gate scale, up scale, row weight: one of them too large, too small, negative or a NaN.
EXTREME_FACTORS = [
    (0.2, 1.0, 1.0),
    (1e12, 1.0, 1.0),
    (2.0**-25, 1.0, 1.0),
    (math.nan, 1.0, 1.0),
    (0.01, 9.0, 1.0),
    (0.01, 1e30, 1.0),
    (0.01, 2.0**-25, 1.0),
    (0.01, 1e-38, 1.0),
    (0.01, 1.0, 9.0),
    (0.01, 1.0, -1.0),
    (0.01, 1.0, 0.0),
]


@pytest.mark.parametrize(("gate", "up", "weight"), EXTREME_FACTORS)
def test_swiglu_from_fp8_multiplies_scales_one_by_one_where_they_are_extreme(
    gate: float, up: float, weight: float
) -> None:
    """One row whose factors do not fit, or are a NaN, among others: its sixteen neighbours are the reference's."""
    x, _, grad, _ = inputs(16, 128, seed=8, fp8=True)
    assert isinstance(x, QuantTensor)
    scale = empty_row_scales(16, 2, "cuda").copy_(torch.tensor([0.01, 0.1], device="cuda"))
    weight_T = torch.ones(16, device="cuda")
    scale[5, 0], scale[5, 1], weight_T[5] = gate, up, weight
    x = QuantTensor(x.data, scale, x.tile)
    want, want_t = reference.swiglu_quantize_1x128(ops.dequantize(x), weight_T, None, False, True)
    got, got_t = ops.swiglu_quantize_1x128(x, weight_T=weight_T, with_transpose=True)
    assert_same_bits(got, want)
    assert_same_bits(got_t, want_t)
    result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight_T, with_product=True)
    assert_same_gradients(result, reference_gradients(ops.dequantize(x), grad, weight_T))


@pytest.mark.parametrize("fp8_scale", [2.0**-24, 1e-4, 40 / 448])
def test_swiglu_from_fp8_at_the_ends_of_fused_scales(fp8_scale: float) -> None:
    x, _, grad, weight = inputs(130, 256, seed=9, fp8=True)
    assert isinstance(x, QuantTensor)
    scale = empty_row_scales(130, 4, "cuda").fill_(fp8_scale)
    x = QuantTensor(x.data, scale, x.tile)
    for weight_T in (None, weight + 0.5):
        result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight_T, with_product=True)
        assert_gradients(result, ops.dequantize(x), grad, weight_T)
        assert_same_gradients(result, reference_gradients(ops.dequantize(x), grad, weight_T), assert_within_a_code)


def test_swiglu_from_fp8_matches_reference_on_random_layouts() -> None:
    generator = torch.Generator().manual_seed(1)
    choices = torch.tensor([0, 1, 15, 17, 127, 128, 129, 700])
    for seed in range(30):
        picks = torch.randint(len(choices), (1 + seed * 5 % 40,), generator=generator)
        layout, spans, total = random_layout([17, *choices[picks].tolist()], spare=seed % 3 * 100)
        used = spans[-1][2]
        q, wide, grad, weight = inputs(total, 256, seed, fp8=True)
        assert isinstance(q, QuantTensor)
        for start, end in [*((end, padded) for _, end, padded in spans), (used, total)]:
            q.data[start:end].view(torch.uint8).fill_(0x7F)  # NaN
            q.scale[start:end], grad[start:end], weight[start:end] = torch.nan, torch.nan, torch.nan
        weight_T = weight if seed % 2 else None
        want, want_t = reference.swiglu_quantize_1x128(wide, weight_T, layout, False, True)
        alone = ops.swiglu_quantize_1x128(q, weight_T=weight_T, layout=layout)
        got, got_t = ops.swiglu_quantize_1x128(q, weight_T=weight_T, layout=layout, with_transpose=True)
        assert_within_a_code(up_to(got, used), up_to(want, used))
        assert_within_a_code(columns_up_to(got_t, used), columns_up_to(want_t, used))
        assert_same_bits(up_to(alone, used), up_to(got, used))
        result = ops.swiglu_backward_quantize_1x128(q, grad, weight_T=weight_T, layout=layout, with_product=True)
        expected = reference_gradients(wide, grad, weight_T, layout=layout)
        assert result.product_t is not None
        assert_same_bits(columns_up_to(result.product_t, used), columns_up_to(got_t, used))
        assert_within_a_code(up_to(result.gate_up, used), up_to(expected.gate_up, used))
        assert_within_a_code(columns_up_to(result.gate_up_t, used), columns_up_to(expected.gate_up_t, used))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_swiglu_casts_match_the_cpu_and_fp64(fp8: bool) -> None:
    x, wide, grad, weight = inputs(515, 384, seed=7, fp8=fp8)
    on_cpu = reference.swiglu_quantize_1x128(wide.cpu(), weight.cpu(), None, False, True)
    for got, want in zip(ops.swiglu_quantize_1x128(x, weight_T=weight, with_transpose=True), on_cpu, strict=True):
        scale = empty_row_scales(*got.scale.shape, "cpu").copy_(got.scale)  # .cpu() would lose the strides
        assert_within_a_code(QuantTensor(got.data.cpu(), scale, got.tile), want)
    result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight, with_product=True)
    assert_gradients(result, wide, grad, weight)


def test_swiglu_casts_match_reference_on_many_random_layouts() -> None:
    generator = torch.Generator().manual_seed(0)
    choices = torch.tensor([0, 0, 1, 63, 127, 128, 129, 300])
    for seed in range(60):
        picks = torch.randint(len(choices), (1 + seed * 7 % 80,), generator=generator)
        layout, spans, total = random_layout(choices[picks].tolist(), spare=seed % 3 * 100)
        used = spans[-1][2]
        x, grad = gates_and_ups(total, 128, seed), random_rows((total, 128), torch.bfloat16, seed)
        weight = torch.rand(total, device="cuda")
        for start, end in [*((end, padded) for _, end, padded in spans), (used, total)]:
            x[start:end], grad[start:end], weight[start:end] = torch.nan, torch.nan, torch.nan
        weight_T = weight if seed % 2 else None
        want, want_t = reference.swiglu_quantize_1x128(x.float(), weight_T, layout, False, True)
        got, got_t = ops.swiglu_quantize_1x128(x, weight_T=weight_T, layout=layout, with_transpose=True)
        alone = ops.swiglu_quantize_1x128(x, weight_T=weight_T, layout=layout)
        for q in (got, alone):
            assert_same_bits(up_to(q, used), up_to(want, used))
        assert_same_bits(columns_up_to(got_t, used), columns_up_to(want_t, used))
        gradients = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight_T, layout=layout, with_product=True)
        expected = reference_gradients(x.float(), grad, weight_T, layout=layout)
        assert gradients.product_t is not None
        assert expected.product_t is not None
        assert_same_bits(up_to(gradients.gate_up, used), up_to(expected.gate_up, used))
        assert_same_bits(columns_up_to(gradients.gate_up_t, used), columns_up_to(expected.gate_up_t, used))
        assert_same_bits(columns_up_to(gradients.product_t, used), columns_up_to(expected.product_t, used))
        if gradients.weight_T is not None and expected.weight_T is not None:
            magnitudes = (grad.float() * torch.nn.functional.silu(x[:, :128].float()) * x[:, 128:].float()).abs()
            # 128 products in FP32, each within a few ulps, in two orders.
            bound = 2 * (128 + 8) * 2**-24 * magnitudes.nan_to_num(0).sum(-1) + 1e-30
            difference = (gradients.weight_T - expected.weight_T).abs()
            assert (difference[:used] <= bound[:used]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, -100.0])
@pytest.mark.parametrize("column", [130, 400])
def test_swiglu_casts_handle_special_values_as_the_reference(value: float, column: int) -> None:
    x, grad = gates_and_ups(200, 256, seed=1), random_rows((200, 256), torch.bfloat16, seed=2)
    x[150, column] = value
    got = ops.swiglu_quantize_1x128(x, with_transpose=True)
    want = reference.swiglu_quantize_1x128(x.float(), None, None, False, True)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert_same_gradients(
        ops.swiglu_backward_quantize_1x128(x, grad, with_product=True), reference_gradients(x.float(), grad, None)
    )
    grad[3, 3] = value
    assert_same_gradients(
        ops.swiglu_backward_quantize_1x128(x, grad, with_product=True), reference_gradients(x.float(), grad, None)
    )


@pytest.mark.parametrize("rows", [1, 126, 127, 129, 300])
def test_swiglu_casts_write_every_element_and_no_other(rows: int) -> None:
    extension = pytest.importorskip("dsv3rt._C")
    x = gates_and_ups(rows, 512, seed=3)[:, 256:768]
    grad = random_rows((rows, 512), torch.bfloat16, seed=4)[:, 64:320]
    weight = torch.rand(rows, device="cuda")
    padded = -(-rows // 128) * 128
    want, want_t = reference.swiglu_quantize_1x128(x.float(), weight, None, False, True)
    expected = reference_gradients(x.float(), grad, weight)
    assert expected.product_t is not None
    room = Guarded()

    data, scale, data_t = room.codes(rows, 256), room.row_scales(rows, 2), room.codes(256, padded)
    scale_t = room.row_scales(256, padded // 128)
    extension.swiglu_quantize_1x128(x, data, scale, weight=weight, data_t=data_t, scale_t=scale_t)
    assert_same_bits(QuantTensor(data.view(FP8), scale, (1, 128)), want)
    assert_same_bits(QuantTensor(data_t.view(FP8), scale_t, (1, 128)), want_t)
    data, scale = room.codes(rows, 256), room.row_scales(rows, 2)
    extension.swiglu_quantize_1x128(x, data, scale, weight=weight)
    assert_same_bits(QuantTensor(data.view(FP8), scale, (1, 128)), want)
    assert_pads_kept(scale)

    gradients = [room.codes(rows, 512), room.row_scales(rows, 4)]
    gradients += [room.codes(512, padded), room.row_scales(512, padded // 128)]
    product = [room.codes(256, padded), room.row_scales(256, padded // 128)]
    partial = room.floats(2, rows)
    extension.swiglu_backward_quantize_1x128(
        x, grad, *gradients, weight=weight, output_data_t=product[0], output_scale_t=product[1], weight_grad=partial
    )
    for (codes, scales), q in [
        (gradients[:2], expected.gate_up),
        (gradients[2:], expected.gate_up_t),
        (product, expected.product_t),
    ]:
        assert_same_bits(QuantTensor(codes.view(FP8), scales, (1, 128)), q)
    assert_pads_kept(gradients[1])
    assert not partial.isnan().any()
    room.assert_intact()


def test_swiglu_casts_are_deterministic_and_replay_in_a_graph() -> None:
    x, _, grad, weight = inputs(1000, 512, seed=5, fp8=False)
    assert isinstance(x, Tensor)

    def run() -> list[Tensor]:
        q = ops.swiglu_quantize_1x128(x)
        gradients = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight)
        assert gradients.weight_T is not None
        codes = [q.data, gradients.gate_up.data, gradients.gate_up_t.data]
        return [*(part.view(torch.uint8) for part in codes), gradients.weight_T]

    first = run()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(run(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(gates_and_ups(1000, 512, seed=6))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_swiglu_casts_handle_empty() -> None:
    for T, F in [(0, 128), (5, 0)]:
        x, grad = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in [(T, 2 * F), (T, F)])
        assert ops.swiglu_quantize_1x128(x).shape == (T, F)
        result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=torch.ones(T, device="cuda"), with_product=True)
        assert result.gate_up_t.shape == (2 * F, -(-T // 128) * 128)
        assert result.weight_T is not None
        assert result.weight_T.eq(0).all()


def test_swiglu_casts_reject_what_the_kernels_cannot_take() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    x, grad = gates_and_ups(4, 144, seed=0), torch.zeros((4, 144), device="cuda", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"^swiglu_backward_quantize_1x128: gate_up must have F % 128 == 0 on CUDA, got"
    ):
        ops.swiglu_backward_quantize_1x128(x, grad)
    data = torch.zeros((4, 144), device="cuda", dtype=torch.uint8)
    with pytest.raises(ValueError, match="x_scale must be given with FP8 and only then, got none"):
        extension.swiglu_quantize_1x128(x.to(FP8).view(torch.uint8), data, data)
    with pytest.raises(ValueError, match=r"scale must have shape|scale must be float32"):
        extension.swiglu_quantize_1x128(x, data, x.float())
