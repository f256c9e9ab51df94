"""The kernel that extends a latent cache against its reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.reference import latent_cache as reference
from tests.gpu.mla_decode_cases import PAGE, WIDTH, C

pytestmark = pytest.mark.gpu
EPS = 1e-6
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(num_tokens: int, num_pages: int, size: float = 1.0) -> Inputs:
    """rows inside wider ones, weight, cosines, sines, and slots in any order, a third of them negative."""
    wide = (torch.randn((num_tokens, 1536 + WIDTH), device="cuda") * size).bfloat16()
    weight = (1 + 0.3 * torch.randn(C, device="cuda")).bfloat16()
    angle = torch.rand((num_tokens, 32), device="cuda") * 6
    slots = torch.randperm(num_pages * PAGE, device="cuda")[:num_tokens]
    slots[2::3] = -1
    return wide[:, 1536:], weight, angle.cos(), angle.sin(), slots


def numbers(cache: Tensor) -> Tensor:
    return ops.dequantize_latents(cache, latent_dim=C) if cache.dtype == torch.uint8 else cache


def guarded(num_pages: int, dtype: torch.dtype) -> Tensor:
    width = 656 if dtype == torch.uint8 else WIDTH
    cache = torch.empty((num_pages, PAGE, width), device="cuda", dtype=dtype)
    return cache.fill_(0x5A) if dtype == torch.uint8 else cache.fill_(7.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 200, 5000])
def test_append_latents_matches_reference(dtype: torch.dtype, num_tokens: int) -> None:
    """Two sums of 512 squares differ by 2^-15 at most, so normed numbers are at most one BF16 apart, 2^-7, and rarely.

    In FP8 each is within 2^-4 of a number, so both within 2^-3, or within 2^-10 of the scale for the least ones.
    Scales, up to 2^-7.8 of the largest, may be a power of two apart where that one is at a border: 3 * 2^-17.8 of it.
    """
    torch.manual_seed(num_tokens)
    for size in (1e-4, 1.0, 300.0):
        num_pages = num_tokens // PAGE + 3
        inputs = draw(num_tokens, num_pages, size)
        got, want = guarded(num_pages, dtype), guarded(num_pages, dtype)
        ops.append_latents(got, *inputs, eps=EPS)
        reference.append_latents(want, *inputs, EPS)
        written = torch.zeros(num_pages * PAGE, dtype=torch.bool, device="cuda")
        written[inputs[4][inputs[4] >= 0]] = True
        left = ~written.view(num_pages, PAGE)
        assert torch.equal(got[left], guarded(num_pages, dtype)[left])
        a, b = numbers(got)[~left].float(), numbers(want)[~left].float()
        assert torch.equal(a[:, C:], b[:, C:])
        unit, least = (2.0**-3, b[:, :C].abs().amax() * 2.0**-15) if dtype == torch.uint8 else (2.0**-7, 0.0)
        assert ((a - b)[:, :C].abs() <= unit * b[:, :C].abs() + least).all()
        assert (a != b).float().mean() < 0.02


def test_append_latents_shows_nan() -> None:
    rows, weight, cosines, sines, _ = draw(2, 1)
    rows[1, 130] = math.nan
    slots = torch.tensor([5, 6], device="cuda")
    cache = ops.append_latents(guarded(1, torch.uint8), rows, weight, cosines, sines, slots, eps=EPS)
    values = numbers(cache)[0]
    assert values[5].isfinite().all()
    assert values[6, :C].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
def test_append_latents_leaves_out_slots_outside(dtype: torch.dtype) -> None:
    rows, weight, cosines, sines, _ = draw(4, 2)
    slots = torch.tensor([-1, 2 * PAGE, 2**40, -(2**40)], device="cuda")
    cache = ops.append_latents(guarded(2, dtype), rows, weight, cosines, sines, slots, eps=EPS)
    assert torch.equal(cache, guarded(2, dtype))
    empty = ops.append_latents(cache, rows[:0], weight, cosines[:0], sines[:0], slots[:0], eps=EPS)
    assert torch.equal(empty, guarded(2, dtype))
