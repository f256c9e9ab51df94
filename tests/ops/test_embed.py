"""Rotation in place, and the embedding with its gradient."""

from __future__ import annotations

import pytest
import torch

from dsv3rt import ops


def tables(T: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(T, R // 2), torch.randn(T, R // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 3, 8), (6, 8), (0, 2, 4)])
def test_rope_in_place_equals_rope(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wide = torch.randn(*shape[:-1], shape[-1] + 5).to(dtype)
    x, (cos, sin), untouched = wide[..., 5:], tables(shape[0], shape[-1]), wide[..., :5].clone()
    want = ops.rope(x, cos, sin)
    assert ops.rope_(x, cos, sin) is x
    assert torch.equal(x, want)
    assert torch.equal(wide[..., :5], untouched)


def test_rope_inverse_is_the_transpose() -> None:
    x, dy, (cos, sin) = torch.randn(5, 2, 8), torch.randn(5, 2, 8), tables(5, 8)
    x.requires_grad_()
    (want,) = torch.autograd.grad(ops.rope(x, cos, sin), (x,), dy)
    assert torch.equal(ops.rope_(dy, cos, sin, inverse=True), want)
    turn = torch.randn(5, 4)
    y = torch.randn(5, 8)
    back = ops.rope_(ops.rope(y, turn.cos(), turn.sin()), turn.cos(), turn.sin(), inverse=True)
    torch.testing.assert_close(back, y, rtol=1e-5, atol=1e-5)


def test_rope_in_place_rejects_recorded_gradients() -> None:
    x, (cos, sin) = torch.randn(5, 8, requires_grad=True), tables(5, 8)
    with pytest.raises(ValueError, match=r"^rope_: x must need no gradient, got one that is recorded$"):
        ops.rope_(x, cos, sin)
    with torch.no_grad():
        ops.rope_(x, cos, sin)
    with pytest.raises(ValueError, match=r"^rope_: sin_TR must have shape \(5, 4\), got \(5, 3\)$"):
        ops.rope_(x.detach(), cos, sin[:, :3])


@pytest.mark.parametrize("tokens", [[], [3], [2, 2, 0, 4, 2, 0]])
def test_embedding_matches_torch(tokens: list[int]) -> None:
    weight, ids = torch.randn(5, 7, requires_grad=True), torch.tensor(tokens, dtype=torch.int64)
    y, want = ops.embedding(ids, weight), torch.nn.functional.embedding(ids, weight)
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    got, expected = (torch.autograd.grad(result, (weight,), dy)[0] for result in (y, want))
    assert torch.equal(got, expected)


def test_embedding_takes_any_shape_of_tokens() -> None:
    weight, tokens = torch.randn(5, 7), torch.tensor([[0, 4, 1], [2, 2, 3]], dtype=torch.int32)
    assert torch.equal(ops.embedding(tokens, weight), weight[tokens.long()])


def test_embedding_gradient_is_summed_in_fp32() -> None:
    weight = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.full((4096, 3), 2.0**-9).bfloat16()
    dy[0] = 1.0  # in BF16 the others would vanish beside it
    (got,) = torch.autograd.grad(ops.embedding(torch.ones(4096, dtype=torch.int64), weight), (weight,), dy)
    assert got[1].eq(torch.tensor(1 + 4095 * 2.0**-9).bfloat16().item()).all()
    assert got[0].eq(0).all()


def test_embedding_passes_gradcheck() -> None:
    weight, tokens = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1, 3, 1])
    assert torch.autograd.gradcheck(lambda weight: ops.embedding(tokens, weight), (weight,))


def test_embedding_rejects_bad_arguments() -> None:
    weight = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"^embedding: tokens must be int64 or int32, got float32$"):
        ops.embedding(torch.ones(2), weight)
    with pytest.raises(ValueError, match=r"^embedding: weight_VD must have shape \(\*, \*\), got \(3,\)$"):
        ops.embedding(torch.ones(2, dtype=torch.int64), weight[0])
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([4]), weight)


def test_embed_ops_are_registered() -> None:
    x, (cos, sin) = torch.randn(5, 2, 8), tables(5, 8)
    torch.library.opcheck(torch.ops.dsv3rt.rope.default, (x, cos, sin, True))
    torch.library.opcheck(torch.ops.dsv3rt.rope_.default, (x, cos, sin, True))
    tokens = torch.tensor([1, 0, 1, 3, 3])
    torch.library.opcheck(torch.ops.dsv3rt.embedding_backward.default, (torch.randn(5, 8), tokens, 4))
