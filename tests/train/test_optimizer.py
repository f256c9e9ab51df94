"""AdamW: torch's numbers in FP32, masters and sums in FP32 whatever the parameters are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsv3rt.config import OptimConfig
from dsv3rt.train.optimizer import AdamW

FP32 = OptimConfig(moment_dtype="float32", weight_decay=0.1, clip_grad_norm=1e9)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.RMSNorm(16), nn.Linear(16, 4, bias=False)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    (model(x.to(dtype)).float().square().mean() * scale).backward()


def update(optimizer: AdamW, step: int, lr: float = 0.01) -> Tensor:
    norm = optimizer.grad_norm()
    optimizer.step(step, lr, norm)
    return norm


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_matches_torch_adamw(clip: float) -> None:
    ours, theirs = make_model(), make_model()
    config = OptimConfig(moment_dtype="float32", weight_decay=0.1, clip_grad_norm=clip)
    optimizer = AdamW(ours.named_parameters(), config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 8):
        lr = 0.01 * step
        backward(ours, step)
        backward(theirs, step)
        norm = update(optimizer, step, lr)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-6, atol=1e-7)


def test_norms_do_not_decay() -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), FP32)
    for p in model.parameters():
        p.sum().mul(0.0).backward()
    update(optimizer, 1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * (1 - 0.01 * 0.1)) == (p.dim() >= 2), name
        assert torch.equal(p, before[name]) == (p.dim() < 2), name


def test_gradients_are_freed_and_summed_in_fp32() -> None:
    """Small BF16 gradients after a large one: a BF16 sum would lose every one of them."""
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AdamW([("w", parameter)], FP32)
    (parameter * 256.0).sum().backward()
    for _ in range(8):
        (parameter * 0.5).sum().backward()
    assert parameter.grad is None
    assert optimizer.grad_norm().item() == pytest.approx(260.0 * 4)


def test_small_updates_reach_bf16_parameters() -> None:
    """Updates below BF16's resolution add up in the master until the parameter moves."""
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    config = OptimConfig(moment_dtype="bfloat16", weight_decay=0.0)
    optimizer = AdamW([("w", parameter)], config)
    seen = []
    for step in range(1, 9):
        parameter.sum().backward()
        update(optimizer, step, lr=1e-3)
        seen.append(parameter[0, 0].item())
    master = optimizer.tensors()["model.w"]
    assert master.dtype == torch.float32
    assert master[0, 0].item() == pytest.approx(1 - 8e-3, abs=2e-4)
    assert seen[0] == 1.0
    assert seen[-1] == torch.tensor(1 - 8e-3).bfloat16().item()
    assert torch.equal(parameter.detach(), master.bfloat16())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_moment_dtype(dtype: str) -> None:
    optimizer = AdamW(make_model().named_parameters(), OptimConfig(moment_dtype=dtype))  # type: ignore[arg-type]
    moments = [tensor for name, tensor in optimizer.tensors().items() if name.startswith("exp_avg")]
    assert len(moments) == 6
    assert {moment.dtype for moment in moments} == {getattr(torch, dtype)}


def test_parameters_without_gradient_stay() -> None:
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.named_parameters(), FP32)
    next(model.parameters()).sum().backward()
    update(optimizer, 1)
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [True, False, False]


def test_state_goes_through_tensors() -> None:
    """Filling another optimizer's tensors in place continues bitwise."""
    first, second = make_model(torch.bfloat16), make_model(torch.bfloat16)
    config = OptimConfig(moment_dtype="bfloat16")
    a, b = AdamW(first.named_parameters(), config), AdamW(second.named_parameters(), config)
    backward(first, 1)
    update(a, 1)
    for name, tensor in b.tensors().items():
        tensor.copy_(a.tensors()[name])
    b.write_parameters()
    for model, optimizer in ((first, a), (second, b)):
        backward(model, 2)
        update(optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
