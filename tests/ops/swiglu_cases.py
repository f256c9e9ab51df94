"""What the tests of SwiGLU with casts share, on the CPU and on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import QuantTensor, SwigluGradients

# Two computations of 2^x differ by an ulp or two, so two products in FP32 by under 8 ulps, 2^-20 of their size. Such a
# pair straddles a border between BF16 numbers (2^-8 apart) with probability 2^-11 at most; then the BF16 numbers are
# neighbours, which lie on either side of a border between codes (2^-4 apart) in one case of sixteen. If the amax of a
# tile moves, all its codes are drawn anew, and one of sixteen differs. Both together stay under 1e-4. Against the
# separate ops, whose exponential has another argument, the products differ by |gate| ulps: three times as much.
DIFFERING_CODES = 1e-3
SCALE_STEP = 2.0**-7  # one step of BF16


def assert_within_a_code(got: QuantTensor, expected: QuantTensor) -> None:
    """Codes at most a step apart, and few of them; scales a step of BF16 apart."""
    assert got.data.shape == expected.data.shape
    assert got.scale.stride() == expected.scale.stride()
    torch.testing.assert_close(got.scale, expected.scale, rtol=SCALE_STEP, atol=0)
    steps = (_ordinal(got.data) - _ordinal(expected.data)).abs()
    assert steps.max() <= 1
    assert steps.double().mean() <= max(DIFFERING_CODES, 2 / steps.numel())  # one unlucky code of a small tensor


def _ordinal(codes: Tensor) -> Tensor:
    """Neighbouring E4M3 numbers have neighbouring ordinals; both zeros have 0."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def assert_quantises(q: QuantTensor, exact: Tensor, uncertainty: Tensor) -> None:
    """q is the FP64 tensor `exact`, computed with an error up to `uncertainty`, rounded to BF16 and then quantised.

    E4M3 rounds to 2^-4 relative, subnormals to 2^-10 of the scale, which is at most 2 amax / 448; BF16 to 2^-9, and it
    moves the amax by as much.
    """
    assert q.data.shape == exact.shape
    columns = exact.shape[1]
    padded = torch.nn.functional.pad(exact, (0, -columns % 128)).unflatten(1, (-1, 128))
    amax = padded.abs().amax(-1).repeat_interleave(128, -1)[:, :columns]
    rounding = torch.maximum(exact.abs() * 2**-4, amax * (2 / 448 * 2**-10)) * 1.01 + exact.abs() * 2**-8
    floor = 2.0**-100
    assert ((ops.dequantize(q, torch.float64) - exact).abs() <= rounding + 1.1 * uncertainty + floor).all()


def product_uncertainty(product: Tensor, gate: Tensor) -> Tensor:
    """Of silu(gate) * up in FP32: gate * log2 e is rounded by 2^-24 of itself, the rest is a few ulps."""
    return product.abs() * (gate.abs() + 8) * 2**-24


def exact_gradients(
    gate_up: Tensor, grad_TF: Tensor, weight_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """By FP64 autograd: the gradient of gate_up, its uncertainty in FP32, the product, the gradient of the weights."""
    x = gate_up.double().requires_grad_()
    weight = torch.ones(x.shape[0], dtype=torch.float64, device=x.device) if weight_T is None else weight_T.double()
    weight = weight.requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up * weight.unsqueeze(1)
    d_x, d_weight = torch.autograd.grad(product, [x, weight], grad_TF.double())
    # The slope cancels where it crosses zero: some ulps of its largest term, s * max(1, |gate|), remain; the
    # argument of the exponential is rounded by 2^-24 of itself.
    factor = (grad_TF.double() * weight.unsqueeze(1)).abs() * torch.sigmoid(gate) * gate.abs().clamp(min=1)
    factor = factor * (gate.abs() + 16) * 2**-24
    uncertainty = torch.cat([factor * up.abs(), factor], dim=-1).detach()
    return d_x, uncertainty, product.detach(), None if weight_T is None else d_weight


def assert_gradients(result: SwigluGradients, gate_up: Tensor, grad_TF: Tensor, weight_T: Tensor | None = None) -> None:
    """All of a backward pass against FP64."""
    d_x, uncertainty, product, d_weight = exact_gradients(gate_up, grad_TF, weight_T)
    T = grad_TF.shape[0]
    assert_quantises(result.gate_up, d_x, uncertainty)
    assert_quantises(columns_of(result.gate_up_t, T), d_x.t(), uncertainty.t())
    if result.product_t is not None:
        doubt = product_uncertainty(product, gate_up.double().chunk(2, dim=-1)[0])
        assert_quantises(columns_of(result.product_t, T), product.t(), doubt.t())
    assert (result.weight_T is None) == (weight_T is None)
    if result.weight_T is not None and d_weight is not None:
        gate, up = gate_up.double().chunk(2, dim=-1)
        magnitudes = (grad_TF.double() * torch.nn.functional.silu(gate) * up).abs().sum(-1)
        # F products in FP32, each within |gate| and a few more ulps, summed in any order.
        bound = magnitudes * (grad_TF.shape[1] + 8 + float(gate.abs().max())) * 2**-24 + 1e-30
        assert ((result.weight_T.double() - d_weight).abs() <= bound).all()


def columns_of(q_t: QuantTensor, T: int) -> QuantTensor:
    """The columns that hold data; those after them are zero."""
    assert q_t.data[:, T:].view(torch.uint8).eq(0).all()
    return QuantTensor(q_t.data[:, :T].contiguous(), q_t.scale, q_t.tile)
