"""The kernels of the balance loss against FP64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.balance import _balance_loss, _balance_loss_backward

pytestmark = pytest.mark.gpu

CASES = [  # lengths of the sequences, experts, choices
    ([1], 8, 1),
    ([4096], 256, 8),
    ([0, 5, 0, 700, 3], 64, 6),
    ([37] * 100, 384, 8),
    ([16000, 1, 383], 256, 8),
    ([300], 512, 16),
    ([33], 33, 2),
]


def given(lengths: list[int], experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    logits = torch.randn((sum(lengths), experts), device="cuda")
    return torch.sigmoid(logits), logits.topk(top_k, dim=1).indices, ends


def assert_matches_fp64(lengths: list[int], experts: int, top_k: int) -> None:
    scores, idx, ends = given(lengths, experts, top_k)
    scores.requires_grad_()
    wide = scores.detach().double().requires_grad_()
    loss, want = (ops.balance_loss(s, idx, ends, alpha=0.3) for s in (scores, wide))
    # Positive terms: a sum of n of them, in trees and runs of at most 700, is off by less than 700 roundings of 2^-24.
    torch.testing.assert_close(loss.double(), want, rtol=700 * 2.0**-24, atol=0)
    (got,), (expected,) = (torch.autograd.grad(5 * value, s) for value, s in ((loss, scores), (want, wide)))
    # A difference of two numbers of the size of a slope over a sum, each off by some tens of roundings.
    slope = _balance_loss(scores.detach(), idx, ends, 0.3)[1].max()
    bound = 5 * slope / scores.detach().sum(dim=1).min() * 64 * 2.0**-24
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=float(bound))


@pytest.mark.parametrize(("lengths", "experts", "top_k"), CASES, ids=str)
def test_balance_loss_kernel_matches_fp64(lengths: list[int], experts: int, top_k: int) -> None:
    assert_matches_fp64(lengths, experts, top_k)


@pytest.mark.parametrize("seed", range(3))
def test_balance_loss_kernel_matches_fp64_at_random_shapes(seed: int) -> None:
    """Up to 5000 tokens in up to 301 sequences, some of them empty."""
    rng = random.Random(seed)
    for _ in range(30):
        tokens, experts = rng.randint(1, 5000), rng.randint(1, 512)
        cuts = sorted(rng.randint(0, tokens) for _ in range(rng.choice([0, 1, 5, 40, 300])))
        lengths = [end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)]
        top_k = rng.randint(1, min(16, experts))
        print(len(lengths), tokens, experts, top_k)
        assert_matches_fp64(lengths, experts, top_k)


def test_balance_loss_kernel_is_deterministic() -> None:
    scores, idx, ends = given([5000, 0, 3000, 192], 256, 8)
    first = _balance_loss(scores, idx, ends, 0.5)
    grad = _balance_loss_backward(torch.ones((), device="cuda"), scores, first[1], ends)
    for _ in range(20):
        again = _balance_loss(scores, idx, ends, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(grad, _balance_loss_backward(torch.ones((), device="cuda"), scores, again[1], ends))


@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_balance_loss_kernel_handles_empty(ends: list[int]) -> None:
    scores = torch.empty((0, 64), device="cuda", requires_grad=True)
    idx = torch.empty((0, 6), dtype=torch.int64, device="cuda")
    loss = ops.balance_loss(scores, idx, torch.tensor(ends, dtype=torch.int32, device="cuda"), alpha=1.0)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, scores)[0].shape == (0, 64)


def test_balance_loss_kernel_gives_tokens_of_no_sequence_no_gradient() -> None:
    scores, idx, _ = given([40], 64, 6)
    ends = torch.tensor([3, 3, 20, 31], dtype=torch.int32, device="cuda")
    scores.requires_grad_()
    (grad,) = torch.autograd.grad(ops.balance_loss(scores, idx, ends, alpha=1.0), scores)
    outside = torch.tensor([t < 3 or t >= 31 for t in range(40)], device="cuda")
    assert grad[outside].eq(0).all()
    assert grad[~outside].ne(0).any(dim=1).all()


def test_balance_loss_kernel_leaves_out_what_is_out_of_range_and_counts_twins_once() -> None:
    scores = torch.full((4, 8), 0.5, device="cuda")
    idx = torch.tensor([[0, 1], [2, 2], [99, 3], [-1, 4]], device="cuda")
    ends = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    # Five of the eight choices count, each as 8 / (2 * 4) of a load, and every share is an eighth.
    loss, slope = _balance_loss(scores, idx, ends, 1.0)
    assert loss.item() == 5 / 8
    assert slope.tolist() == [[0.25] * 5 + [0.0] * 3]


def test_balance_loss_is_registered_on_cuda() -> None:
    scores, idx, ends = given([5, 7], 8, 2)
    torch.library.opcheck(torch.ops.dsv3rt.balance_loss.default, (scores, idx, ends, 0.5))
    slope = _balance_loss(scores, idx, ends, 0.5)[1]
    one = torch.ones((), device="cuda")
    torch.library.opcheck(torch.ops.dsv3rt.balance_loss_backward.default, (one, scores, slope, ends))
