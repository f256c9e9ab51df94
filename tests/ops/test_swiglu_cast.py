"""SwiGLU with casts, against FP64 and autograd, and against the separate ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import GroupLayout, QuantTensor
from tests.ops.swiglu_cases import (
    assert_gradients,
    assert_quantises,
    assert_within_a_code,
    columns_of,
    product_uncertainty,
)

NAN = float("nan")
SHAPES = [(1, 16), (3, 128), (130, 144), (257, 48)]


def gates_and_ups(T: int, F: int) -> Tensor:
    return (torch.randn(T, 2 * F) * torch.linspace(0.01, 12, T).unsqueeze(1)).bfloat16()


def bits(q: QuantTensor) -> tuple[Tensor, Tensor]:
    return q.data.view(torch.uint8), q.scale


def assert_same(got: QuantTensor, want: QuantTensor) -> None:
    assert got.tile == want.tile
    for a, b in zip(bits(got), bits(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def layout_of(counts: list[int], block: int = 128) -> tuple[GroupLayout, list[tuple[int, int, int]]]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + -(-count // block) * block)
    spans = [(offsets[g], offsets[g] + count, offsets[g + 1]) for g, count in enumerate(counts)]
    return GroupLayout(*(torch.tensor(values, dtype=torch.int32) for values in (counts, offsets))), spans


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_quantize_1x128_matches_fp64(shape: tuple[int, int], weighted: bool) -> None:
    x = gates_and_ups(*shape)
    weight = torch.rand(shape[0]) if weighted else None
    gate, up = x.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up * (1 if weight is None else weight.double().unsqueeze(1))
    q, q_t = ops.swiglu_quantize_1x128(x, weight_T=weight, with_transpose=True)
    doubt = product_uncertainty(exact, gate)
    assert_quantises(q, exact, doubt)
    assert_quantises(columns_of(q_t, shape[0]), exact.t(), doubt.t())


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_quantize_1x128_equals_the_separate_ops(shape: tuple[int, int]) -> None:
    x = gates_and_ups(*shape)
    separate = ops.quantize_1x128(ops.swiglu(*x.chunk(2, -1)), with_transpose=True)
    for got, want in zip(ops.swiglu_quantize_1x128(x, with_transpose=True), separate, strict=True):
        assert_within_a_code(got, want)


def test_swiglu_quantize_1x128_takes_extreme_gates() -> None:
    gates = torch.tensor([-3e38, -200.0, -90.0, -81.0, 0.0, 90.0, 200.0, 3e38]).repeat_interleave(16)
    x = torch.cat([gates, torch.ones(128)]).unsqueeze(0).bfloat16()
    for column in range(8):
        alone = x.clone()
        alone[:, :128][:, torch.arange(128) // 16 != column] = 0
        want = torch.nn.functional.silu(alone[:, :128].double())
        doubt = product_uncertainty(want, alone[:, :128].double().clamp(-200, 0))
        assert_quantises(ops.swiglu_quantize_1x128(alone), want, doubt)


@pytest.mark.parametrize("part", [0, 1])
def test_swiglu_quantize_1x128_poisons_exactly_the_tile(part: int) -> None:
    x = gates_and_ups(130, 256)
    x[129, part * 256 + 200] = NAN
    q, q_t = ops.swiglu_quantize_1x128(x, with_transpose=True)
    bad, bad_t = ops.dequantize(q).isnan(), ops.dequantize(q_t).isnan()
    assert bad[129, 128:].all()
    assert bad.sum() == 128
    assert bad_t[200, 128:].all()
    assert bad_t.sum() == 128


@pytest.mark.parametrize("pow2_scales", [False, True])
def test_swiglu_quantize_1x128_reads_fp8(pow2_scales: bool) -> None:
    x = ops.quantize_1x128(gates_and_ups(130, 144).float())
    exact_gate, exact_up = ops.dequantize(x, torch.float64).chunk(2, -1)
    q = ops.swiglu_quantize_1x128(x, pow2_scales=pow2_scales)
    exact = torch.nn.functional.silu(exact_gate) * exact_up
    assert_quantises(q, exact, product_uncertainty(exact, exact_gate))
    assert not pow2_scales or torch.frexp(q.scale).mantissa.eq(0.5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_product", [False, True])
def test_swiglu_backward_quantize_1x128_matches_fp64(
    shape: tuple[int, int], weighted: bool, with_product: bool
) -> None:
    x, grad = gates_and_ups(*shape), torch.randn(shape).bfloat16()
    weight = torch.rand(shape[0]) if weighted else None
    result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight, with_product=with_product)
    assert (result.product_t is not None) == with_product
    assert_gradients(result, x, grad, weight)


def test_swiglu_backward_quantize_1x128_reads_fp8() -> None:
    x, grad = ops.quantize_1x128(gates_and_ups(130, 128)), torch.randn(130, 128).bfloat16()
    result = ops.swiglu_backward_quantize_1x128(x, grad, with_product=True)
    assert_gradients(result, ops.dequantize(x), grad)


def test_swiglu_backward_quantize_1x128_repeats_the_forward_product() -> None:
    x, grad, weight = gates_and_ups(200, 256), torch.randn(200, 256).bfloat16(), torch.rand(200)
    result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight, with_product=True, pow2_scales=True)
    assert result.product_t is not None
    assert_same(
        result.product_t, ops.swiglu_quantize_1x128(x, weight_T=weight, with_transpose=True, pow2_scales=True)[1]
    )


@pytest.mark.parametrize("counts", [[0], [130, 0, 128, 5], [0, 0, 7]])
def test_casts_of_grouped_rows_equal_those_of_each_group(counts: list[int]) -> None:
    layout, spans = layout_of(counts)
    P = spans[-1][2] + 128
    x, grad, weight = gates_and_ups(P, 128), torch.randn(P, 128).bfloat16(), torch.rand(P)
    for start, end in [*((end, padded) for _, end, padded in spans), (P - 128, P)]:
        x[start:end], grad[start:end], weight[start:end] = NAN, NAN, NAN
    plain = ops.quantize_1x128(x, layout=layout, with_transpose=True)
    forward = ops.swiglu_quantize_1x128(x, weight_T=weight, layout=layout, with_transpose=True)
    backward = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=weight, layout=layout, with_product=True)
    assert backward.product_t is not None
    assert backward.weight_T is not None
    for start, end, padded in spans:
        rows = slice(start, end)
        alone = ops.swiglu_backward_quantize_1x128(x[rows], grad[rows], weight_T=weight[rows], with_product=True)
        assert alone.product_t is not None
        separate = ops.swiglu_quantize_1x128(x[rows], weight_T=weight[rows], with_transpose=True)
        pairs = [
            (plain, ops.quantize_1x128(x[rows], with_transpose=True)),
            (forward, separate),
            ((backward.gate_up, backward.gate_up_t), (alone.gate_up, alone.gate_up_t)),
            ((backward.gate_up, backward.product_t), (alone.gate_up, alone.product_t)),
        ]
        for (got, got_t), (want, want_t) in pairs:
            for a, b in zip(bits(got), bits(want), strict=True):
                assert torch.equal(a[rows], b)
            assert bits(got)[0][end:padded].eq(0).all()
            assert torch.equal(bits(got_t)[0][:, start:padded], bits(want_t)[0])
            assert torch.equal(got_t.scale[:, start // 128 : padded // 128], want_t.scale)
        assert torch.equal(backward.weight_T[rows], alone.weight_T)
        assert backward.weight_T[end:padded].eq(0).all()


def test_grouped_casts_feed_the_expert_weight_gradient() -> None:
    layout, spans = layout_of([130, 0, 5])
    P = spans[-1][2]
    x, h, grad = torch.randn(P, 256).bfloat16(), torch.randn(P, 64).bfloat16(), torch.randn(P, 128).bfloat16()
    for _, end, padded in spans:
        x[end:padded] = h[end:padded] = grad[end:padded] = NAN
    d_x_t = ops.swiglu_backward_quantize_1x128(x, grad, layout=layout).gate_up_t
    h_t = ops.quantize_1x128(h, layout=layout, with_transpose=True)[1]
    total = ops.k_grouped_fp8_gemm_nt(d_x_t, h_t, layout, accumulate_into=torch.zeros(3, 256, 64))
    for group, (start, end, _) in enumerate(spans):
        rows = x[start:end].double().requires_grad_()
        gate, up = rows.chunk(2, -1)
        (d_rows,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, rows, grad[start:end].double())
        # Two operands in E4M3, each with a relative error near 2^-5: calc_diff is half of the squares' sum.
        assert ops.calc_diff(total[group], d_rows.t() @ h[start:end].double()) < 2e-3


def test_quantize_1x128_of_grouped_rows_takes_any_offsets() -> None:
    layout, spans = layout_of([3, 0, 5], block=1)
    x = torch.randn(10, 32)
    x[8:] = NAN
    q = ops.quantize_1x128(x, layout=layout)
    assert_same(QuantTensor(q.data[:8], q.scale[:8].t().contiguous().t(), q.tile), ops.quantize_1x128(x[:8]))
    assert spans[-1][2] == 8
    assert ops.dequantize(q)[8:].eq(0).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_swiglu_casts_are_registered_ops(fp8: bool) -> None:
    x, grad, weight = gates_and_ups(5, 144), torch.randn(5, 144).bfloat16(), torch.rand(5)
    scale = None
    if fp8:
        q = ops.quantize_1x128(x)
        x, scale = q.data, q.scale
    forward = torch.ops.dsv3rt.swiglu_quantize_1x128.default
    backward = torch.ops.dsv3rt.swiglu_backward_quantize_1x128.default
    layout, _ = layout_of([3], block=5)
    groups = (layout.counts_X, layout.offsets)
    # test_schema multiplies its arguments, which torch cannot do in FP8.
    checks = ("test_faketensor",) if fp8 else ("test_schema", "test_faketensor")
    for with_more in (False, True):
        torch.library.opcheck(forward, (x, scale, None, None, None, False, with_more), test_utils=checks)
        torch.library.opcheck(backward, (x, scale, grad, weight, *groups, False, with_more), test_utils=checks)


def test_quantize_128x128_is_a_registered_op() -> None:
    for shape in [(5, 144), (2, 130, 3)]:
        for with_transpose in (False, True):
            torch.library.opcheck(
                torch.ops.dsv3rt.quantize_128x128.default, (torch.randn(shape), False, with_transpose)
            )


def test_swiglu_casts_handle_empty() -> None:
    for T, F in [(0, 128), (5, 0)]:
        x, grad = torch.empty(T, 2 * F).bfloat16(), torch.empty(T, F).bfloat16()
        assert ops.swiglu_quantize_1x128(x).shape == (T, F)
        result = ops.swiglu_backward_quantize_1x128(x, grad, weight_T=torch.ones(T), with_product=True)
        assert result.gate_up_t.shape == (2 * F, -(-T // 128) * 128)
        assert result.weight_T is not None
        assert result.weight_T.eq(0).all()


def test_swiglu_casts_reject_bad_arguments() -> None:
    x, grad = gates_and_ups(4, 128), torch.randn(4, 128).bfloat16()
    forward, backward = ops.swiglu_quantize_1x128, ops.swiglu_backward_quantize_1x128
    with pytest.raises(TypeError, match=r"^swiglu_quantize_1x128: gate_up must be bfloat16, got float32$"):
        forward(x.float())
    with pytest.raises(ValueError, match=r"gate_up must have shape \(T, 2F\) with F % 16 == 0, got \(4, 16\)$"):
        forward(x[:, :16])
    with pytest.raises(ValueError, match=r"gate_up must have contiguous rows, got stride \(1, 256\)$"):
        forward(x.t())
    with pytest.raises(ValueError, match=r"weight_T must have shape \(4,\), got \(3,\)$"):
        forward(x, weight_T=torch.ones(3))
    zeros = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"layout.offsets must have shape \(3,\), got \(2,\)$"):
        forward(x, layout=GroupLayout(zeros, zeros))
    with pytest.raises(ValueError, match=r"gate_up.tile must be \(1, 128\), got \(128, 128\)$"):
        forward(ops.quantize_128x128(x))
    with pytest.raises(ValueError, match=r"^swiglu_backward_quantize_1x128: grad_TF must have shape \(4, 128\), got"):
        backward(x, grad[:3])
    with pytest.raises(TypeError, match=r"grad_TF must be bfloat16, got float32$"):
        backward(x, grad.float())
