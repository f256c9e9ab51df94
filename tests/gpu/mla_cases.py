"""Inputs and batches that the tests of the latent-attention kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

N, R, U = 128, 64, 128
SCALE = (N + R) ** -0.5

Lengths = list[int]


def ends(lengths: Lengths) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)


def draw(num_queries: int, num_keys: int, heads: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_nope and v are views of one projection, as in the layer."""
    q = torch.randn((num_queries, heads, N + R), device="cuda") * size
    kv = torch.randn((num_keys, heads, N + U), device="cuda") * torch.tensor([size] * N + [1.0] * U, device="cuda")
    k_rope = torch.randn((num_keys, R), device="cuda") * size
    k_nope, v = kv.bfloat16().split([N, U], dim=2)
    return q.bfloat16(), k_nope, k_rope.bfloat16(), v


BATCHES = [
    ([1], [1]),
    ([128], [128]),
    ([777], [777]),
    ([1, 127, 128, 129, 300, 5, 1000, 64, 63, 65], [1, 127, 128, 129, 300, 5, 1000, 64, 63, 65]),
    ([0, 3, 0, 0, 200, 0], [0, 3, 0, 0, 200, 0]),
    ([100, 1, 130], [1000, 513, 131]),  # more keys than queries: ends align
    ([1000, 300, 7], [100, 299, 0]),  # queries without a key
    ([33] * 70, [33] * 70),  # more than two windows of sequences in the scheduler
]
