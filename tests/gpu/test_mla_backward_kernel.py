"""The backward kernel of latent attention against the reference's gradients in FP64 of the same BF16 numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from tests.gpu.mla_cases import BATCHES, SCALE, Lengths, draw, ends

pytestmark = pytest.mark.gpu

# Rounding a number to BF16 is a relative error of 2^-8 sqrt(0.541 / 3) = 1.7e-3 in the mean square, of random sign
# (0.541: the mean of 1 / m^2 over significands m). For dk weights, their gradients, the product and the result are
# rounded, four in quadrature: 3.3e-3 (dq has three, dv two); calc_diff is half of the square, 5.6e-6. Rounded out adds
# to delta, the more the fewer keys there are, as in causal batches: 4 to 7e-6 in all from 32 keys on. 1e-5 is allowed.
DIFF = 1e-5
# A query that sees few keys has weights near one: then dout v - delta cancels, and what is left, near dlse (about 1),
# meets the rounding of out in delta, |dout| |v| 1.7e-3, about 0.019: half of its square is 1.8e-4, a few times that in
# the tail.
DIFF_FEW_KEYS = 1e-3
FEW_KEYS = 32


def gradients(
    inputs: tuple[Tensor, ...], cu: Tensor, cu_k: Tensor, causal: bool, weights: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Of sum(out * weights[0]) + sum(lse * weights[1]) over queries that see a key, in the dtype of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = ops.mla_prefill(*leaves, cu, scale=SCALE, causal=causal, cu_seqlens_k=cu_k)  # type: ignore[misc]
    seeing = lse.detach() > -math.inf
    torch.autograd.backward((out, lse), (weights[0].to(out.dtype), weights[1].to(lse.dtype) * seeing))
    return [x.grad for x in leaves if x.grad is not None]


def assert_batch(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool, size: float = 1.0) -> None:
    inputs = draw(sum(q_lengths), sum(k_lengths), heads, size)
    cu, cu_k = ends(q_lengths), ends(k_lengths)
    dout = torch.randn((sum(q_lengths), heads, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(q_lengths), heads), device="cuda")
    got = gradients(inputs, cu, cu_k, causal, (dout, dlse))
    want = gradients(tuple(x.double() for x in inputs), cu, cu_k, causal, (dout, dlse))
    for name, mine, theirs in zip(("dq", "dk_nope", "dk_rope", "dv"), got, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert not mine.isnan().any(), name
        diff = ops.calc_diff(mine, theirs) if mine.numel() else 0.0
        assert diff < (DIFF if max(k_lengths) >= FEW_KEYS else DIFF_FEW_KEYS), (name, diff)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), BATCHES, ids=lambda lengths: "_".join(map(str, lengths))[:40])
def test_mla_backward_kernel_matches_fp64(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool) -> None:
    assert_batch(q_lengths, k_lengths, heads, causal)


@pytest.mark.parametrize("seed", range(20))
def test_mla_backward_kernel_matches_fp64_on_random_lengths(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = (2 ** (torch.rand(1 + seed % 4) * 11)).int().tolist()
    extra = torch.randint(0, 300, (len(lengths),)).tolist() if seed % 2 else [0] * len(lengths)
    assert_batch(lengths, [n + m for n, m in zip(lengths, extra, strict=True)], [1, 3, 16][seed % 3], seed % 5 != 0)


def test_mla_backward_kernel_takes_128_heads() -> None:
    assert_batch([700, 337], [700, 337], 128, causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[100, 77, 130, 128], [200, 1], [128, 128], [1, 1, 1]], ids=str)
def test_mla_backward_kernel_keeps_neighbours_out(lengths: Lengths, causal: bool) -> None:
    """NaN in the second sequence's inputs and gradients reaches no other, though tiles reach into it."""
    inputs = draw(sum(lengths), sum(lengths), 3)
    cu = ends(lengths)
    dout = torch.randn((sum(lengths), 3, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(lengths), 3), device="cuda")
    clean = gradients(inputs, cu, cu, causal, (dout, dlse))
    foreign = slice(lengths[0], lengths[0] + lengths[1])
    for x in (*inputs, dout, dlse):
        x[foreign] = torch.nan
    got = gradients(inputs, cu, cu, causal, (dout, dlse))
    for mine, before in zip(got, clean, strict=True):
        for rows in (slice(0, foreign.start), slice(foreign.stop, None)):
            assert not mine[rows].isnan().any()
            assert torch.equal(mine[rows], before[rows])


@pytest.mark.parametrize("lengths", [[1537], [300, 5, 1000, 64, 129]], ids=str)
def test_mla_backward_kernel_is_deterministic(lengths: Lengths) -> None:
    inputs, cu = draw(sum(lengths), sum(lengths), 16), ends(lengths)
    dout = torch.randn((sum(lengths), 16, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(lengths), 16), device="cuda")
    first = gradients(inputs, cu, cu, True, (dout, dlse))
    for _ in range(20):
        again = gradients(inputs, cu, cu, True, (dout, dlse))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_mla_backward_kernel_fills_one_gradient_for_keys_and_values() -> None:
    inputs = draw(300, 300, 3)
    dout, dlse = torch.randn((300, 3, 128), device="cuda").bfloat16(), torch.zeros((300, 3), device="cuda")
    out, lse = ops.mla_prefill(*inputs, ends([300]), scale=SCALE)
    _, dk_nope, _, dv = torch.ops.dsv3rt.mla_prefill_backward(
        list(inputs), [out, lse], [dout, dlse], [ends([300])] * 2, SCALE, True
    )
    assert dk_nope.stride() == dv.stride() == (3 * 256, 256, 1)
    assert dv.data_ptr() - dk_nope.data_ptr() == 128 * 2


def test_mla_backward_kernel_handles_no_keys_and_no_queries() -> None:
    assert_batch([5], [0], 3, causal=True)
    assert_batch([0], [0], 3, causal=True)
    inputs = draw(0, 5, 2)
    weights = (torch.zeros((0, 2, 128), device="cuda"), torch.zeros((0, 2), device="cuda"))
    for gradient in gradients(inputs, ends([0]), ends([5]), True, weights):
        assert gradient.eq(0).all()
