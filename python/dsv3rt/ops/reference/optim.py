"""Reference AdamW: every operation is rounded by itself, so that a kernel can agree with it to the bit."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from dsv3rt.ops.reference.quant import quantize_128x128
from dsv3rt.ops.types import AdamWHyper

_MASK = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, Tensor)


def numbers_of(hyper: AdamWHyper, step: int) -> list[float]:
    """What a step computes with, in the order of the kernel's AdamWNumbers; FP32 sees them rounded."""
    bias1, bias2 = 1 - hyper.beta1**step, 1 - hyper.beta2**step
    moments = [hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2]
    return [*moments, bias2**-0.5, hyper.eps, 1 - hyper.lr * hyper.weight_decay, -hyper.lr / bias1]


@torch.no_grad()
def adamw_step(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    param: Tensor | None,
    cast: list[Tensor],
    grad_scale: Tensor | None,
    numbers: list[float],
    key: tuple[int, int] | None,
) -> None:
    """state: master, gradient, first and second moment. cast: nothing, data and scales of w, or those of w^T as well.
    With a key, BF16 moments are rounded stochastically."""
    master, grad, m, v = state
    beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_root, eps, decay, rate = numbers
    g = grad.float() if grad_scale is None else grad.float() * grad_scale
    m32 = m.float() * beta1 + g * one_minus_beta1
    v32 = v.float() * beta2 + g * g * one_minus_beta2
    denominator = _sqrt(v32) * inverse_root + eps
    master.copy_(master * decay + m32 * rate / denominator)
    if key is not None and m.dtype == torch.bfloat16:
        random = rounding_bits(key, m.numel(), m.device).view(m.shape)
        m32, v32 = round_stochastically(m32, random & 0xFFFF), round_stochastically(v32, random >> 16)
    m.copy_(m32)
    v.copy_(v32)
    if param is not None:
        param.copy_(master)
    if cast:
        quants = quantize_128x128(master.bfloat16(), False, len(cast) == 4)
        for target, part in zip(cast, (part for q in quants for part in (q.data, q.scale)), strict=True):
            target.copy_(part)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded to nearest, FP32. Torch's own root on CPUs is a vector library's, which is an ulp off here and there.

    The FP64 root may be off too, by less than 4 of its ulps: a root of FP32 in [1, 2) is 2^-50 or more from the middle
    between two FP32 numbers, as the middle's square ends in bit 2^-48 and x ends before it.
    """
    return x.double().sqrt().float()


def rounding_key(seed: int, step: int) -> tuple[int, int]:
    """Two words that stand for a tensor's seed (64 bits of it) and the step."""
    first = _mix((seed ^ _mix(seed >> 32 & _MASK)) & _MASK)
    return first, _mix(first ^ (step & _MASK))


def rounding_bits(key: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """(count,) int64 in 0 .. 2^32, of the elements by their place."""
    element = torch.arange(count, dtype=torch.int64, device=device)
    first, second = key
    return _mix((_mix((element & _MASK) ^ first) + second + (element >> 32)) & _MASK)


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """FP32 x as a BF16 number, up or down so that its mean is x; random in 0 .. 2^16. NaN and infinity stay."""
    bits = (x.view(torch.int32) + random.int()) & -0x10000
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def grad_norms(grads: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(grad.double()) for grad in grads])


def _mix(x: _Bits) -> _Bits:
    """Every input bit moves every output bit of a 32-bit word (the finaliser of MurmurHash3)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK  # an int64 product overflows: its lower half is right all the same
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
