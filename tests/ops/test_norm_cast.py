"""RMSNorm with residual and casts, and its written-out backward, against what they are made of."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import QuantTensor

EPS = 1e-6


def rows(T: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(T, D).bfloat16(), 1 + torch.randn(D) / 2, torch.randn(T, D).bfloat16()


def assert_same(got: QuantTensor, want: QuantTensor) -> None:
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    assert (got.scale.stride(), got.tile) == (want.scale.stride(), want.tile)


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize(("T", "D"), [(5, 144), (130, 256), (0, 32), (1, 16)])
def test_rms_norm_quantize_is_norm_then_cast(T: int, D: int, pow2_scales: bool) -> None:
    x, weight, residual = rows(T, D)
    for given, with_transpose, with_output in product((None, residual), (False, True), (False, True)):
        got = ops.rms_norm_quantize_1x128(
            x,
            weight,
            EPS,
            residual_TD=given,
            pow2_scales=pow2_scales,
            with_transpose=with_transpose,
            with_output=with_output,
        )
        total = x if given is None else (x.float() + given.float()).bfloat16()
        y = ops.rms_norm(total, weight, EPS)
        q, q_t = ops.quantize_1x128(y, pow2_scales=pow2_scales, with_transpose=True)
        assert_same(got.q, q)
        assert (got.q_t is None) != with_transpose
        if got.q_t is not None:
            assert_same(got.q_t, q_t)
        assert got.y_TD is None if not with_output else torch.equal(got.y_TD, y)
        assert got.sum_TD is None if given is None else torch.equal(got.sum_TD, total)
        want_rstd = (total.double().square().mean(1) + EPS).rsqrt()
        torch.testing.assert_close(got.rstd_T.double(), want_rstd, rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_backward_is_the_derivative(with_residual: bool) -> None:
    x, weight, dy = (t.double() for t in rows(7, 40))
    residual = torch.randn(7, 40, dtype=torch.float64) if with_residual else None
    x.requires_grad_()
    weight.requires_grad_()
    rstd = (x.square().mean(1) + EPS).rsqrt()
    y = x * rstd[:, None] * weight
    total = (y * dy).sum() + (0 if residual is None else (x * residual).sum())
    want = torch.autograd.grad(total, (x, weight))
    got = ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=residual)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not a.requires_grad


def test_rms_norm_backward_rounds_once() -> None:
    x, weight, dy = rows(9, 64)
    rstd = torch.rsqrt(x.float().square().mean(1) + EPS)
    residual = torch.randn(9, 64).bfloat16()
    dx, dweight = ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=residual)
    wide = (dy.double(), x.double(), weight.double(), rstd.double())
    want, want_weight = ops.rms_norm_backward(*wide, grad_residual_TD=residual.double())
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(dx.double(), want, rtol=2**-8 + 2**-16, atol=2**-18)  # the sum may cancel
    torch.testing.assert_close(dweight.double(), want_weight, rtol=1e-5, atol=1e-5)


def test_rms_norm_quantize_fake_has_the_real_layout() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight, residual = rows(131, 400)
    op = torch.ops.dsv3rt.rms_norm_quantize_1x128.default
    for given, more in product((None, residual), (False, True)):
        real = op(x, weight, EPS, given, False, more, more)
        with FakeTensorMode() as mode:
            tensors = [None if t is None else mode.from_tensor(t) for t in (x, weight, given)]
            fake = op(tensors[0], tensors[1], EPS, tensors[2], False, more, more)
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_norms_are_registered_ops() -> None:
    x, weight, residual = rows(5, 144)
    rstd = torch.ones(5)
    namespace = torch.ops.dsv3rt
    torch.library.opcheck(namespace.rms_norm.default, (x, weight, EPS))
    for given in (None, residual):
        torch.library.opcheck(namespace.rms_norm_backward.default, (residual, x, weight, rstd, given))
        for more in (False, True):
            arguments = (x, weight, EPS, given, False, more, more)
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(namespace.rms_norm_quantize_1x128.default, arguments, test_utils=checks)


def test_rms_norm_compiles_without_graph_breaks() -> None:
    x, weight, _ = rows(5, 64)
    inputs = (x.float().requires_grad_(), weight.requires_grad_())

    def chain(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x * 2, weight, EPS).square().sum()

    want = torch.autograd.grad(chain(*inputs), inputs)
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_fused_norms_reject_bad_arguments() -> None:
    x, weight, residual = rows(4, 32)
    rstd = torch.ones(4)
    with pytest.raises(TypeError, match=r"^rms_norm_quantize_1x128: x_TD must be bfloat16, got float32$"):
        ops.rms_norm_quantize_1x128(x.float(), weight, EPS)
    with pytest.raises(ValueError, match=r"^rms_norm_quantize_1x128: x_TD must have D % 16 == 0, got D = 24$"):
        ops.rms_norm_quantize_1x128(x[:, :24], weight[:24], EPS)
    with pytest.raises(
        ValueError, match=r"^rms_norm_quantize_1x128: x_TD must have contiguous rows, got stride \(1, 32"
    ):
        ops.rms_norm_quantize_1x128(x.t(), weight[:4], EPS)
    with pytest.raises(ValueError, match=r"^rms_norm_quantize_1x128: weight_D must have shape \(32,\), got \(31,\)$"):
        ops.rms_norm_quantize_1x128(x, weight[:31], EPS)
    with pytest.raises(
        ValueError, match=r"^rms_norm_quantize_1x128: residual_TD must have shape \(4, 32\), got \(3, 32"
    ):
        ops.rms_norm_quantize_1x128(x, weight, EPS, residual_TD=residual[:3])
    with pytest.raises(ValueError, match=r"^rms_norm_quantize_1x128: eps must be positive, got -1"):
        ops.rms_norm_quantize_1x128(x, weight, -1.0)
    with pytest.raises(TypeError, match=r"^rms_norm_backward: dy_TD must be bfloat16, got float32$"):
        ops.rms_norm_backward(x.float(), x, weight, rstd)
    with pytest.raises(TypeError, match=r"^rms_norm_backward: rstd_T must be float32, got bfloat16$"):
        ops.rms_norm_backward(x, x, weight, rstd.bfloat16())
    with pytest.raises(
        ValueError, match=r"^rms_norm_backward: grad_residual_TD must have shape \(4, 32\), got \(4, 16"
    ):
        ops.rms_norm_backward(x, x, weight, rstd, grad_residual_TD=residual[:, :16])
