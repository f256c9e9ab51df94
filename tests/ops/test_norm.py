"""RMSNorm, rotary positions and SwiGLU, against FP64, torch and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv3rt import ops

FP32_CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # a few FP32 roundings of values of order 1
BF16_ROUNDING = {"rtol": 2**-8, "atol": 1e-6}  # one rounding to BF16; a second one would double it


def angles(tokens: int, pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rms_oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 7), (1, 1), (9,), (0, 8)])
def test_rms_norm_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    y = ops.rms_norm(x, weight, 1e-6)
    assert y.dtype == dtype
    close = FP32_CLOSE if dtype == torch.float32 else BF16_ROUNDING
    torch.testing.assert_close(y.double(), rms_oracle(x, weight, 1e-6), **close)


def test_rms_norm_matches_torch() -> None:
    x, weight = torch.randn(4, 96), torch.randn(96)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (96,), weight, 1e-5), **FP32_CLOSE
    )


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_rms_norm_takes_extreme_sizes(size: float) -> None:
    x, weight = torch.randn(3, 32) * size, torch.ones(32)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6).double(), rms_oracle(x, weight, 1e-6), **FP32_CLOSE)


def test_rms_norm_shows_bad_numbers_in_their_row_alone() -> None:
    x = torch.randn(3, 8)
    x[1, 2] = math.nan
    assert ops.rms_norm(x, torch.ones(8), 1e-6).isnan().all(dim=1).tolist() == [False, True, False]


def test_rms_norm_passes_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-3), (x, weight))


def test_rms_norm_beside_passes_gradcheck() -> None:
    """Of both results, and of either alone."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm_beside(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x: ops.rms_norm_beside(x, weight.detach(), 1e-3)[0], (x,))


def test_rms_norm_beside_rounds_the_sum_of_gradients_once() -> None:
    x, weight = torch.randn(20, 64).to(torch.bfloat16).requires_grad_(), torch.ones(64)
    dresidual, dy = torch.randn(20, 64).to(torch.bfloat16), torch.randn(20, 64).to(torch.bfloat16)
    same, y = ops.rms_norm_beside(x, weight, 1e-6)
    assert torch.equal(same, x)
    assert torch.equal(y, ops.rms_norm(x, weight, 1e-6))
    torch.autograd.backward((same, y), (dresidual, dy))
    wide = x.detach().double().requires_grad_()
    rms_oracle(wide, weight, 1e-6).backward(dy.double())
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad + dresidual.double(), **BF16_ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 3, 8), (6, 8), (0, 2, 4), (1, 2)])
def test_rope_is_a_complex_rotation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    cos, sin = angles(shape[0], shape[-1] // 2)
    turn = torch.complex(cos.double(), sin.double())
    turn = turn[:, None] if len(shape) == 3 else turn
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    y = ops.rope(x, cos, sin)
    assert y.dtype == dtype
    close = FP32_CLOSE if dtype == torch.float32 else BF16_ROUNDING
    torch.testing.assert_close(y.double(), expected, **close)


def test_rope_scores_depend_on_distance_alone() -> None:
    cos, sin = angles(20, 4, torch.float64)
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    turned_q, turned_k = ops.rope(q.expand(20, 8), cos, sin), ops.rope(k.expand(20, 8), cos, sin)
    torch.testing.assert_close(turned_q[5] @ turned_k[2], turned_q[17] @ turned_k[14])
    assert not torch.allclose(turned_q[5] @ turned_k[2], turned_q[5] @ turned_k[3])


def test_rope_scores_match_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    T, H, R = 7, 2, 8
    q, k = torch.randn(T, H, R), torch.randn(T, R)
    cos, sin = angles(T, R // 2)
    theirs_q, theirs_k = modeling.apply_rotary_pos_emb_interleave(
        q.transpose(0, 1)[None], k[None, None], torch.cat((cos, cos), 1)[None], torch.cat((sin, sin), 1)[None]
    )
    expected = theirs_q[0] @ theirs_k[0].transpose(1, 2)  # theirs leaves pairs de-interleaved: scores are the same
    scores = ops.rope(q, cos, sin).transpose(0, 1) @ ops.rope(k, cos, sin).t()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4)])
def test_rope_passes_gradcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.rope(x, cos, sin), (x,))


def test_rope_takes_slices_of_wider_rows() -> None:
    x, (cos, sin) = torch.randn(5, 3, 11), angles(5, 2)
    assert torch.equal(ops.rope(x[..., 7:], cos, sin), ops.rope(x[..., 7:].contiguous(), cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_matches_fp64(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(5, 33) * 4).to(dtype), torch.randn(5, 33).to(dtype)
    y = ops.swiglu(gate, up)
    assert y.dtype == dtype
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    torch.testing.assert_close(y.double(), expected, **(FP32_CLOSE if dtype == torch.float32 else BF16_ROUNDING))


def test_swiglu_takes_extreme_gates() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 1e4, math.nan])
    y = ops.swiglu(gate, torch.full((5,), 2.0))
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 2e4, math.nan]), equal_nan=True)


def test_swiglu_passes_gradcheck() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))


def test_norm_family_rejects_bad_arguments() -> None:
    x, cos = torch.randn(4, 8), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"^rms_norm: weight must have shape \(8,\), got \(7,\)$"):
        ops.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"^rms_norm: eps must be positive, got 0.0$"):
        ops.rms_norm(x, torch.ones(8), 0.0)
    with pytest.raises(TypeError, match=r"^rms_norm: x must be bfloat16 or float32 or float64, got float16$"):
        ops.rms_norm(x.half(), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"^rope: sin_TR must have shape \(4, 4\), got \(4, 8\)$"):
        ops.rope(x, cos, x)
    with pytest.raises(TypeError, match=r"^rope: cos_TR must be float32 or float64, got bfloat16$"):
        ops.rope(x, cos.bfloat16(), cos)
    with pytest.raises(ValueError, match=r"^rope: x must have an even last dimension, got 7$"):
        ops.rope(x[:, :7], cos, cos)
    with pytest.raises(ValueError, match=r"^rope: x must have shape \(T, H, R\) or \(T, R\), got \(8,\)$"):
        ops.rope(x[0], cos, cos)
    with pytest.raises(ValueError, match=r"^swiglu: up must have shape \(4, 8\), got \(4, 7\)$"):
        ops.swiglu(x, x[:, :7])
    with pytest.raises(TypeError, match=r"^swiglu: up must be float32, got bfloat16$"):
        ops.swiglu(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"^swiglu: up must be on cpu like gate, got meta$"):
        ops.swiglu(x, x.to("meta"))
