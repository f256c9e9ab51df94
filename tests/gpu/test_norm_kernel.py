"""RMSNorm on the GPU: against FP64, fused against separate to the bit, poisoned buffers, special values."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import NormQuant, QuantTensor
from tests.gpu.quant_cases import FP8, Guarded, assert_pads_kept, assert_same_bits, random_rows

pytestmark = pytest.mark.gpu

EPS = 1e-6
BF16_ROUNDING = 2**-8 + 2**-16  # half a step of BF16, and FP32 sums of at most 64 terms in a row
WIDTHS = [64, 72, 512, 1032, 1536, 2048, 2056, 7168, 7296, 8200, 16384]
ROWS = [0, 1, 129, 1000]


def inputs(T: int, D: int, seed: int, weight_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Rows of sizes 1e-6 to 1e6, which eps flattens at the small end, and weights of both signs."""
    weight = 1 + random_rows((1, D), torch.float32, seed + 1, decades=0)[0]
    return random_rows((T, D), torch.bfloat16, seed, decades=6), weight.to(weight_dtype)


def normed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """y and rstd in FP64."""
    wide = x.double()
    rstd = (wide.square().mean(-1) + EPS).rsqrt()
    return wide * rstd[:, None] * weight.double(), rstd


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def random_shapes(seed: int, unit: int, number: int) -> Iterator[tuple[int, int]]:
    """Up to 5000 rows of 64 to 16384 columns, a multiple of `unit`: 2^22 numbers and some at most."""
    rng = random.Random(seed)
    for _ in range(number):
        D = unit * rng.randint(64 // unit, rng.choice([512, 16384]) // unit)
        T = rng.randint(1, min(5000, (1 << 22) // D))
        print(T, D)
        yield T, D


def assert_norm_matches_fp64(T: int, D: int, weight_dtype: torch.dtype) -> None:
    x, weight = inputs(T, D, seed=T + D, weight_dtype=weight_dtype)
    y, rstd = torch.ops.dsv3rt.rms_norm(x, weight, EPS)
    want, want_rstd = normed(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=BF16_ROUNDING, atol=1e-30)
    # 77 roundings in a row, halved by the root.
    torch.testing.assert_close(rstd.double(), want_rstd, rtol=2**-18, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("T", "D"), [*product(ROWS, WIDTHS), (4097, 7168)])
def test_rms_norm_kernel_matches_fp64(T: int, D: int, weight_dtype: torch.dtype) -> None:
    assert_norm_matches_fp64(T, D, weight_dtype)


def test_rms_norm_kernel_takes_slices_and_any_leading_dimensions() -> None:
    x, weight = inputs(300, 576, seed=1)
    latent = x[:, :512]
    assert_equal(ops.rms_norm(latent, weight[:512], EPS), ops.rms_norm(latent.contiguous(), weight[:512], EPS))
    shifted = x[:, 3:515]  # rows that do not start on 16 bytes, and a weight that does not
    want = ops.rms_norm(shifted.contiguous(), weight[3:515].clone(), EPS)
    assert_equal(ops.rms_norm(shifted, weight[3:515], EPS), want)
    assert_equal(ops.rms_norm(x.view(3, 100, 576), weight, EPS).view(300, 576), ops.rms_norm(x, weight, EPS))


def gradients(x: Tensor, weight: Tensor, dy: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dweight in FP64, and how far FP32 may be from the former before its last rounding.

    At most 64 roundings in a row in the mean of products, 39 in the root, a few around them: under 2^-17 together.
    """
    wide, grad = x.double(), dy.double() * weight.double()
    rstd = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = wide * rstd
    dx = (grad - n * (grad * n).mean(-1, keepdim=True)) * rstd
    magnitude = (grad.abs() + n.abs() * (grad * n).abs().mean(-1, keepdim=True)) * rstd
    added = torch.zeros_like(dx) if residual is None else residual.double()
    return dx + added, (dy.double() * n).sum(0), 2**-17 * (magnitude + added.abs())


def assert_gradients_match_fp64(T: int, D: int, with_residual: bool, weight_dtype: torch.dtype) -> None:
    x, weight = inputs(T, D, seed=T + D, weight_dtype=weight_dtype)
    dy = random_rows((T, D), torch.bfloat16, seed=3, decades=2)
    rstd = torch.ops.dsv3rt.rms_norm(x, weight, EPS)[1]
    residual = random_rows((T, D), torch.bfloat16, seed=4, decades=6) if with_residual else None
    dx, dweight = ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=residual)
    want, want_weight, slack = gradients(x, weight, dy, residual)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    assert ((dx.double() - want).abs() <= want.abs() * 2**-8 + slack * (1 + 2**-8) + 1e-38).all()
    # At most T additions one after the other, of terms with a few roundings of their own.
    bound = (T + 8) * 2**-24 * (dy.double() * normed(x, torch.ones_like(weight))[0]).abs().sum(0)
    assert ((dweight.double() - want_weight).abs() <= bound + 1e-30).all()
    for _ in range(2):
        again = ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=residual)
        assert all(torch.equal(a, b) for a, b in zip(again, (dx, dweight), strict=True))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("T", "D"), [*product(ROWS, WIDTHS), (4097, 7168)])
def test_rms_norm_backward_kernel_matches_fp64(T: int, D: int, with_residual: bool, weight_dtype: torch.dtype) -> None:
    assert_gradients_match_fp64(T, D, with_residual, weight_dtype)


@pytest.mark.parametrize("seed", range(4))
def test_rms_norm_kernels_match_fp64_at_random_shapes(seed: int) -> None:
    for number, (T, D) in enumerate(random_shapes(seed, unit=8, number=24)):
        weight_dtype = (torch.bfloat16, torch.float32)[number % 2]
        assert_norm_matches_fp64(T, D, weight_dtype)
        assert_gradients_match_fp64(T, D, number % 4 < 2, weight_dtype)


def test_rms_norm_backward_kernel_takes_strided_rows() -> None:
    x, weight = inputs(300, 576, seed=1)
    dy, residual = (random_rows((300, 1024), torch.bfloat16, seed=seed, decades=1)[:, 64:576] for seed in (2, 3))
    latent, weight = x[:, :512], weight[:512]
    rstd = torch.ops.dsv3rt.rms_norm(latent, weight, EPS)[1]
    got = ops.rms_norm_backward(dy, latent, weight, rstd, grad_residual_TD=residual)
    dense = (t.contiguous() for t in (dy, latent, weight, rstd))
    for a, b in zip(got, ops.rms_norm_backward(*dense, grad_residual_TD=residual.contiguous()), strict=True):
        assert_equal(a, b)


def test_rms_norm_is_differentiable_on_the_kernels() -> None:
    x, weight = (t.requires_grad_() for t in inputs(129, 1536, seed=5))
    dy = random_rows((129, 1536), torch.bfloat16, seed=6, decades=1)
    dx, dweight = torch.autograd.grad(ops.rms_norm(x, weight, EPS), (x, weight), dy)
    rstd = torch.ops.dsv3rt.rms_norm(x.detach(), weight.detach(), EPS)[1]
    want_dx, want_dweight = ops.rms_norm_backward(dy, x, weight, rstd)
    assert_equal(dx, want_dx)
    assert_equal(dweight, want_dweight.bfloat16())
    dresidual = random_rows((129, 1536), torch.bfloat16, seed=7, decades=1)
    both = torch.autograd.grad(ops.rms_norm_beside(x, weight, EPS), (x, weight), (dresidual, dy))
    for got, want in zip(both, ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=dresidual), strict=True):
        assert_equal(got, want.bfloat16())


def separate(x: Tensor, weight: Tensor, residual: Tensor | None, pow2_scales: bool) -> NormQuant:
    """The same by one op after the other."""
    total = x if residual is None else x + residual
    y, rstd = torch.ops.dsv3rt.rms_norm(total, weight, EPS)
    q, q_t = ops.quantize_1x128(y, pow2_scales=pow2_scales, with_transpose=True)
    return NormQuant(None if residual is None else total, y, q, q_t, rstd)


def assert_same(got: NormQuant, want: NormQuant) -> None:
    assert_same_bits(got.q, want.q)
    assert_equal(got.rstd_T, want.rstd_T)
    if got.q_t is not None and want.q_t is not None:
        assert_same_bits(got.q_t, want.q_t)
    if got.y_TD is not None and want.y_TD is not None:
        assert_equal(got.y_TD, want.y_TD)
    assert (got.sum_TD is None) == (want.sum_TD is None)
    if got.sum_TD is not None and want.sum_TD is not None:
        assert_equal(got.sum_TD, want.sum_TD)


def assert_equals_norm_then_cast(T: int, D: int, pow2_scales: bool, with_residual: bool) -> None:
    for weight_dtype in (torch.bfloat16, torch.float32):
        x, weight = inputs(T, D, seed=T + D, weight_dtype=weight_dtype)
        residual = random_rows((T, D), torch.bfloat16, seed=7, decades=6) if with_residual else None
        want = separate(x, weight, residual, pow2_scales)
        for with_transpose, with_output in product((False, True), repeat=2):
            got = ops.rms_norm_quantize_1x128(
                x,
                weight,
                EPS,
                residual_TD=residual,
                pow2_scales=pow2_scales,
                with_transpose=with_transpose,
                with_output=with_output,
            )
            assert (got.q_t is not None, got.y_TD is not None) == (with_transpose, with_output)
            assert_same(got, want)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize(
    ("T", "D"), [*product([0, 1, 129, 1000], [64, 144, 512, 1536, 2064, 7168, 7296]), (127, 16384), (4097, 7168)]
)
def test_rms_norm_quantize_equals_norm_then_cast(T: int, D: int, pow2_scales: bool, with_residual: bool) -> None:
    assert_equals_norm_then_cast(T, D, pow2_scales, with_residual)


@pytest.mark.parametrize("seed", range(3))
def test_rms_norm_quantize_equals_norm_then_cast_at_random_shapes(seed: int) -> None:
    for number, (T, D) in enumerate(random_shapes(seed + 10, unit=16, number=16)):
        assert_equals_norm_then_cast(T, D, number % 2 == 1, number % 4 < 2)


@pytest.mark.parametrize("D", [64, 512, 1536, 7168])
@pytest.mark.parametrize("T", [1, 5, 129])
def test_rms_norm_quantize_knows_nothing_of_the_launch_before(T: int, D: int) -> None:
    x, weight = inputs(T, D, seed=T + D)
    want = separate(x, weight, None, False)
    left_by = torch.full((300 * 128, D), float("nan"), dtype=torch.bfloat16, device="cuda")  # in every shared memory
    ops.rms_norm_quantize_1x128(left_by, weight, EPS, with_transpose=True)
    assert_same(ops.rms_norm_quantize_1x128(x, weight, EPS, with_transpose=True), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 0.0])
@pytest.mark.parametrize("D", [512, 7168])
def test_norm_kernels_show_bad_numbers_in_their_row_alone(D: int, value: float) -> None:
    x, weight = inputs(200, D, seed=8)
    clean = ops.rms_norm(x, weight, EPS)
    x[150, 130] = value
    if value == 0.0:
        x[150] = 0.0
    y = ops.rms_norm(x, weight, EPS)
    others = torch.arange(200, device="cuda") != 150
    assert_equal(y[others], clean[others])
    torch.testing.assert_close(
        y[150].double(),
        torch.ops.dsv3rt.rms_norm(x[150:151].cpu(), weight.cpu(), EPS)[0][0].cuda().double(),
        rtol=2**-7,  # a step of BF16: rstd may differ in its last bits
        atol=0,
        equal_nan=True,
    )
    assert_same(ops.rms_norm_quantize_1x128(x, weight, EPS, with_transpose=True), separate(x, weight, None, False))
    dy = random_rows((200, D), torch.bfloat16, seed=9, decades=1)
    rstd = torch.ops.dsv3rt.rms_norm(x, weight, EPS)[1]
    dx, dweight = ops.rms_norm_backward(dy, x, weight, rstd)
    assert dx[others].isfinite().all()
    if value != value:
        assert dx[150].isnan().all()
        assert dweight.isnan().all()


@pytest.mark.parametrize(("rows", "D"), [(1, 512), (127, 7296), (129, 144), (300, 7168)])
def test_norm_kernels_write_every_element_and_no_other(rows: int, D: int) -> None:
    extension = pytest.importorskip("dsv3rt._C")
    x, weight = inputs(rows, D + 128, seed=10)
    x, weight = x[:, 64 : 64 + D], weight[64 : 64 + D].contiguous()
    residual = random_rows((rows, D), torch.bfloat16, seed=11, decades=6)
    padded, tiles = -(-rows // 128) * 128, -(-D // 128)
    room = Guarded()

    y, rstd = room.halves(rows, D), room.floats(rows)
    extension.rms_norm(x, weight, y, rstd, eps=EPS)
    for got, expected in zip((y, rstd), torch.ops.dsv3rt.rms_norm(x, weight, EPS), strict=True):
        assert_equal(got, expected)

    want = separate(x, weight, residual, False)
    for with_transpose in (False, True):
        data, scale, rstd = room.codes(rows, D), room.row_scales(rows, tiles), room.floats(rows)
        total, y = room.halves(rows, D), room.halves(rows, D)
        transposed = {}
        if with_transpose:
            transposed = {"data_t": room.codes(D, padded), "scale_t": room.row_scales(D, padded // 128)}
        extension.rms_norm_quantize_1x128(
            x, weight, rstd, data, scale, eps=EPS, residual=residual, sum=total, y=y, **transposed
        )
        q_t = None
        if with_transpose:
            q_t = QuantTensor(transposed["data_t"].view(FP8), transposed["scale_t"], (1, 128))
        assert_same(NormQuant(total, y, QuantTensor(data.view(FP8), scale, (1, 128)), q_t, rstd), want)
        assert_pads_kept(scale)

    dx, dweight, parts = room.halves(rows, D), room.floats(D), room.floats(min(rows, 132), D)
    extension.rms_norm_backward(residual, x, weight, rstd, dx, dweight, parts)
    for got, expected in zip((dx, dweight), ops.rms_norm_backward(residual, x, weight, rstd), strict=True):
        assert_equal(got, expected)
    assert not parts.isnan().any()
    room.assert_intact()


@pytest.mark.parametrize("D", [512, 1536, 7168])
def test_norm_kernels_are_deterministic(D: int) -> None:
    x, weight = inputs(4225, D, seed=12)
    dy, residual = (random_rows((4225, D), torch.bfloat16, seed=seed, decades=2) for seed in (13, 14))
    separately = separate(x, weight, residual, False)

    def run() -> list[Tensor]:
        result = ops.rms_norm_quantize_1x128(x, weight, EPS, residual_TD=residual, with_transpose=True)
        assert_same(result, separately)
        return list(ops.rms_norm_backward(dy, x, weight, result.rstd_T, grad_residual_TD=residual))

    first = run()
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(run(), first, strict=True))


def test_norm_kernels_replay_in_a_graph() -> None:
    x, weight = inputs(1000, 1536, seed=15)
    dy = random_rows((1000, 1536), torch.bfloat16, seed=16, decades=1)

    def run() -> list[Tensor]:
        result = ops.rms_norm_quantize_1x128(x, weight, EPS, with_transpose=True)
        assert result.q_t is not None
        codes = [result.q.data.view(torch.uint8), result.q_t.data.view(torch.uint8), result.rstd_T]
        return [*codes, ops.rms_norm(x, weight, EPS), *ops.rms_norm_backward(dy, x, weight, result.rstd_T)]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(inputs(1000, 1536, seed=17)[0])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_norm_kernels_compile() -> None:
    x, weight = (t.requires_grad_() for t in inputs(129, 512, seed=18))

    def chain(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x * 2, weight, EPS).float().square().sum()

    want = torch.autograd.grad(chain(x, weight), (x, weight))
    got = torch.autograd.grad(torch.compile(chain, fullgraph=True)(x, weight), (x, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)  # the compiler may skip roundings between its own ops

    def cast(x: Tensor, weight: Tensor) -> Tensor:
        return ops.dequantize(ops.rms_norm_quantize_1x128(x, weight, EPS).q)

    with torch.no_grad():
        assert_equal(torch.compile(cast, fullgraph=True)(x, weight), cast(x, weight))


def test_norm_kernels_are_registered_ops() -> None:
    x, weight = inputs(5, 144, seed=19)
    namespace = torch.ops.dsv3rt
    rstd = namespace.rms_norm(x, weight, EPS)[1]
    torch.library.opcheck(namespace.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(namespace.rms_norm_backward.default, (x, x, weight, rstd, x))
    checks = ("test_schema", "test_faketensor")
    for residual, more in product((None, x), (False, True)):
        arguments = (x, weight, EPS, residual, False, more, more)
        torch.library.opcheck(namespace.rms_norm_quantize_1x128.default, arguments, test_utils=checks)


def test_norm_kernels_reject_what_they_cannot_take() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    x, weight = inputs(4, 144, seed=20)
    with pytest.raises(
        ValueError, match=r"^rms_norm_quantize_1x128: x_TD must have D in 64..16384 on CUDA, got D = 48"
    ):
        ops.rms_norm_quantize_1x128(x[:, :48], weight[:48], EPS)
    with pytest.raises(ValueError, match=r"^rms_norm_quantize_1x128: x must be aligned to 16 bytes, got"):
        ops.rms_norm_quantize_1x128(x[:, 4:132], weight[:128], EPS)
    rstd = torch.zeros(4, device="cuda")
    with pytest.raises(ValueError, match=r"^rms_norm: x must have a multiple of 8 columns, 64 to 16384, got 60$"):
        extension.rms_norm(x[:, :60], weight[:60], x, rstd, eps=EPS)
    with pytest.raises(ValueError, match=r"^rms_norm_backward: dx must have shape \(4, 144\), got \(3, 144\)$"):
        extension.rms_norm_backward(x, x, weight, rstd, x[:3], weight, rstd)
