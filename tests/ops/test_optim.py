"""adamw_step, against torch.optim.AdamW and the formula in FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import AdamWHyper

HYPER = AdamWHyper(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def state(*shape: int, moment_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape), torch.zeros(shape, dtype=moment_dtype), torch.zeros(shape, dtype=moment_dtype)


@pytest.mark.parametrize("shape", [(), (1,), (17, 5), (0, 4)])
def test_adamw_step_matches_torch(shape: tuple[int, ...]) -> None:
    master, m, v = state(*shape)
    theirs = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = torch.randn(shape) * 10.0 ** (step - 3)
        theirs.grad = grad.clone()
        optimizer.step()
        ops.adamw_step(master, grad, m, v, hyper=HYPER, step=step)
        # The same FP32 operations; an ulp or two where torch groups a scalar factor otherwise.
        torch.testing.assert_close(master, theirs.detach(), rtol=3e-7, atol=1e-9)
        torch.testing.assert_close(m, optimizer.state[theirs]["exp_avg"], rtol=3e-7, atol=1e-12)
        torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"], rtol=3e-7, atol=1e-12)


def test_adamw_step_rounds_bf16_moments_after_using_them() -> None:
    master, m, v = state(1000, moment_dtype=torch.bfloat16)
    master64 = master.double()
    for step in range(1, 4):
        grad = torch.randn(1000)
        m64 = 0.9 * m.double() + 0.1 * grad.double()
        v64 = 0.95 * v.double() + 0.05 * grad.double() ** 2
        update = m64 / (1 - 0.9**step) / ((v64 / (1 - 0.95**step)).sqrt() + 1e-8)
        master64 = master64 * (1 - 3e-4) - 3e-3 * update
        ops.adamw_step(master, grad, m, v, hyper=HYPER, step=step)
        # One BF16 rounding of the moments, none in the update itself: FP32 error only.
        torch.testing.assert_close(master.double(), master64, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(m.double(), m64, rtol=2**-8, atol=1e-9)
        assert (m == m64.bfloat16()).float().mean() > 0.99  # to nearest, but for ties that FP32 error tips
        assert (v == v64.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("as_tensor", [False, True])
def test_adamw_step_scales_gradients(as_tensor: bool) -> None:
    master, m, v = state(9)
    other, other_m, other_v = master.clone(), m.clone(), v.clone()
    grad = torch.randn(9)
    scale = torch.tensor(0.25) if as_tensor else 0.25
    ops.adamw_step(master, grad, m, v, hyper=HYPER, step=1, grad_scale=scale)
    ops.adamw_step(other, grad * 0.25, other_m, other_v, hyper=HYPER, step=1)
    assert torch.equal(master, other)
    assert torch.equal(v, other_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adamw_step_writes_the_parameter(dtype: torch.dtype) -> None:
    master, m, v = state(8, 3)
    param = torch.nn.Parameter(torch.zeros(8, 3, dtype=dtype))
    grad = torch.randn(8, 3).to(dtype)
    before = grad.clone()
    ops.adamw_step(master, grad, m, v, hyper=HYPER, step=1, param=param)
    assert torch.equal(param.detach(), master.to(dtype))
    assert torch.equal(grad, before)


def test_adamw_step_takes_the_parameter_itself_as_master() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    ops.adamw_step(param, torch.ones(3), *state(3)[1:], hyper=AdamWHyper(lr=0.5, weight_decay=0.0), step=1, param=param)
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.5))


def test_adamw_step_decays_weights_without_gradient() -> None:
    master, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
    ops.adamw_step(master, torch.zeros(2), m, v, hyper=AdamWHyper(lr=0.1, weight_decay=0.5), step=1)
    torch.testing.assert_close(master, torch.full((2,), 0.95))


def test_adamw_step_shows_bad_numbers() -> None:
    master, m, v = state(3)
    ops.adamw_step(master, torch.tensor([1.0, float("nan"), 1.0]), m, v, hyper=HYPER, step=1)
    assert master.isnan().tolist() == [False, True, False]


def test_adamw_step_rejects_bad_arguments() -> None:
    master, m, v = state(4)
    grad = torch.randn(4)
    with pytest.raises(TypeError, match=r"^adamw_step: master must be float32, got bfloat16$"):
        ops.adamw_step(master.bfloat16(), grad, m, v, hyper=HYPER, step=1)
    with pytest.raises(ValueError, match=r"^adamw_step: v must have shape \(4,\), got \(3,\)$"):
        ops.adamw_step(master, grad, m, v[1:], hyper=HYPER, step=1)
    with pytest.raises(TypeError, match=r"^adamw_step: param must be bfloat16 or float32, got float16$"):
        ops.adamw_step(master, grad, m, v, hyper=HYPER, step=1, param=master.half())
    with pytest.raises(ValueError, match=r"^adamw_step: step must be at least 1, got 0$"):
        ops.adamw_step(master, grad, m, v, hyper=HYPER, step=0)
