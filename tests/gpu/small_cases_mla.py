"""The tiny cases of attention: prefill in both directions, decoding over both caches, and how caches grow."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dsv3rt import ops
from tests.gpu.small_cases import CODES, EPS, FP32, ROUNDED, Case, Numbers, on_cpu

N, R, U, C, PAGE = 128, 64, 128, 512, 64
WIDTH = C + R
SCALE = (N + R) ** -0.5
HEADS = 2
# Of gradients: about ten times what test_mla_backward_kernel.py finds, and what it allows where queries see few keys.
GRADIENTS, FEW_KEYS = 1e-4, 1e-3


def ends(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def prefill(lengths: tuple[list[int], list[int]], causal: bool, device: str) -> list[Tensor]:
    """Of queries and of keys."""
    numbers = Numbers(device)
    queries, keys = map(sum, lengths)
    q, k_rope = numbers.normal(queries, HEADS, N + R), numbers.normal(keys, R)
    k_nope, v = numbers.normal(keys, HEADS, N + U).split([N, U], dim=2)
    leaves = [x.detach().requires_grad_() for x in (q, k_nope, k_rope, v)]
    cu, cu_k = (ends(one, device) for one in lengths)
    out, lse = ops.mla_prefill(*leaves, cu, scale=SCALE, causal=causal, cu_seqlens_k=cu_k)
    dlse = numbers.normal(queries, HEADS, dtype=FP32) * lse.detach().isfinite()
    torch.autograd.backward((out, lse), (numbers.normal(queries, HEADS, U), dlse))
    return on_cpu(out, lse.nan_to_num(neginf=0.0), *(leaf.grad for leaf in leaves))


def decode(lengths: list[int], heads: int, fp8: bool, device: str) -> list[Tensor]:
    """Two queries each; pages in falling order; slots of nobody are never read."""
    numbers = Numbers(device)
    counts = [-(-length // PAGE) for length in lengths]
    table, pages = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32), sum(counts)
    for row, count in enumerate(counts):
        first = sum(counts[:row])
        table[row, :count] = pages - 1 - torch.arange(first, first + count, dtype=torch.int32)
    q, cache = numbers.normal(len(lengths), 2, heads, WIDTH), numbers.normal(pages, PAGE, WIDTH)
    if fp8:
        cache = ops.quantize_latents(cache, latent_dim=C)
    lengths_B = torch.tensor(lengths, dtype=torch.int32).to(device)
    out, lse = ops.mla_decode(q, cache, table.to(device), lengths_B, scale=SCALE, latent_dim=C)
    return on_cpu(out, lse.nan_to_num(neginf=0.0))


def append(fp8: bool, device: str) -> list[Tensor]:
    numbers, tokens = Numbers(device), 11
    rows, weight = numbers.normal(tokens, 64 + WIDTH)[:, 64:], numbers.normal(C)
    cos, sin = numbers.normal(tokens, R // 2, dtype=FP32), numbers.normal(tokens, R // 2, dtype=FP32)
    slots = torch.tensor([70, 3, -1, 64, 0, 127, -1, 1, 2, 90, 5]).to(device)
    cache = numbers.normal(2, PAGE, WIDTH)
    if fp8:
        cache = ops.quantize_latents(cache, latent_dim=C)
    ops.append_latents(cache, rows, weight, cos, sin, slots, eps=EPS)
    return [ops.dequantize_latents(cache.cpu(), latent_dim=C)] if fp8 else on_cpu(cache)


def mla_cases() -> dict[str, Case]:
    equal = [130, 5, 70], [130, 5, 70]
    found = {
        "prefill-causal": Case(partial(prefill, equal, True), GRADIENTS),
        "prefill-whole": Case(partial(prefill, equal, False), GRADIENTS),
        "prefill-longer_keys": Case(partial(prefill, ([3, 64], [140, 65]), True), GRADIENTS),
        "prefill-blind": Case(partial(prefill, ([9, 66], [4, 0]), True), FEW_KEYS),
    }
    for fp8 in (False, True):
        kind = "fp8" if fp8 else "bf16"
        found[f"decode-{kind}"] = Case(partial(decode, [200, 0, 1, 70], 15, fp8), ROUNDED)
        found[f"decode-{kind}_wide"] = Case(partial(decode, [300, 65], 66, fp8), ROUNDED)
        found[f"decode-{kind}_nothing"] = Case(partial(decode, [0, 0], 3, fp8))
        found[f"decode-{kind}_append"] = Case(partial(append, fp8), CODES if fp8 else ROUNDED)
    return found
