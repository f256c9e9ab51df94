"""Rotary positions and the embedding's gradient on the GPU: the references to the bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.layers.rotary import rotate_queries
from dsv3rt.ops.reference import embed as reference
from tests.gpu.quant_cases import Guarded, random_rows

pytestmark = pytest.mark.gpu

SHAPES = [(0, 3, 64), (1, 1, 8), (129, 128, 64), (33, 5, 24), (4097, 64), (7, 3, 16), (0, 64), (1000, 128, 64)]


def tables(T: int, R: int) -> tuple[Tensor, Tensor]:
    """Any numbers: YaRN scales its cosines, too."""
    return torch.randn(T, R // 2, device="cuda"), torch.randn(T, R // 2, device="cuda")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return random_rows(shape, torch.bfloat16, seed, decades=3)


def assert_turns(shape: tuple[int, ...], inverse: bool) -> None:
    """To the bit as the reference, and near a product of complex numbers in FP64."""
    x, (cos, sin) = rows(*shape), tables(shape[0], shape[-1])
    want = reference.rope(x, cos, sin, inverse)
    pairs = x.double().unflatten(-1, (-1, 2))
    turn = torch.complex(cos.double(), sin.double() * (-1 if inverse else 1))
    turn = turn.unsqueeze(1) if x.dim() == 3 else turn
    exact = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    # Two products and a sum in FP32, each 2^-24 of the products at most, then half a step of BF16.
    bound = 2.0**-8 * exact.abs() + 2.0**-22 * (pairs.abs().sum(-1) * turn.abs()).unsqueeze(-1)
    assert ((want.double().unflatten(-1, (-1, 2)) - exact).abs() <= bound).all()
    assert torch.equal(torch.ops.dsv3rt.rope(x, cos, sin, inverse), want)
    assert ops.rope_(x, cos, sin, inverse=inverse) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_kernel_matches_reference(shape: tuple[int, ...], inverse: bool) -> None:
    assert_turns(shape, inverse)


@pytest.mark.parametrize("seed", range(2))
def test_rope_kernel_matches_reference_at_random_shapes(seed: int) -> None:
    """Whole rows, and the last columns of wider ones, whose first ones stay as they were."""
    rng = random.Random(seed)
    for _ in range(50):
        R, heads, before = 8 * rng.randint(1, 32), rng.choice([1, rng.randint(2, 128)]), 8 * rng.randint(0, 20)
        T, inverse = rng.randint(1, min(5000, (1 << 22) // (heads * (R + before)))), rng.random() < 0.5
        shape = (T, R) if heads == 1 and rng.random() < 0.5 else (T, heads, R)
        print(shape, before, inverse)
        assert_turns(shape, inverse)
        wide, (cos, sin) = rows(*shape[:-1], before + R, seed=1), tables(T, R)
        whole, last = wide.clone(), wide[..., before:]
        ops.rope_(last, cos, sin, inverse=inverse)
        assert torch.equal(last, reference.rope(whole[..., before:], cos, sin, inverse))
        assert torch.equal(wide[..., :before], whole[..., :before])


@pytest.mark.parametrize("T", [1, 129, 700])
def test_rope_kernel_turns_the_last_columns_of_wider_rows(T: int) -> None:
    q, kv, (cos, sin) = rows(T, 16, 192), rows(T, 576, seed=1), tables(T, 64)
    before, want = q.clone(), reference.rope(q[..., 128:], cos, sin, False)
    assert torch.equal(ops.rope(q[..., 128:], cos, sin), want)
    assert torch.equal(ops.rope(kv[:, 512:], cos, sin), reference.rope(kv[:, 512:], cos, sin, False))
    ops.rope_(q[..., 128:], cos, sin)
    assert torch.equal(q[..., 128:], want)
    assert torch.equal(q[..., :128], before[..., :128])


def test_rope_kernel_writes_every_element_and_no_other() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    for shape in [(1, 1, 8), (129, 3, 64), (17, 128, 64)]:
        x, (cos, sin), room = rows(*shape), tables(shape[0], shape[-1]), Guarded()
        y = room.halves(*shape)
        extension.rope(x, y, cos, sin)
        assert torch.equal(y, reference.rope(x, cos, sin, False))
        room.assert_intact()


def test_rope_kernel_passes_bad_numbers_to_their_pair_alone() -> None:
    x, (cos, sin) = rows(5, 2, 16), tables(5, 16)
    x[3, 1, 6] = torch.nan
    bad = ops.rope(x, cos, sin).isnan().nonzero().tolist()
    assert bad == [[3, 1, 6], [3, 1, 7]]


def test_rope_is_differentiable_on_the_kernel() -> None:
    x, (cos, sin) = rows(40, 8, 64).requires_grad_(), tables(40, 64)
    dy = rows(40, 8, 64, seed=1)
    (dx,) = torch.autograd.grad(ops.rope(x, cos, sin), (x,), dy)
    assert torch.equal(dx, reference.rope(dy, cos, sin, True))


def test_rotate_queries_equals_rope_beside_a_copy() -> None:
    w, hidden, (cos, sin) = rows(96, 32).requires_grad_(), rows(40, 32, seed=1), tables(40, 16)
    dy = rows(40, 2, 48, seed=2)
    q = (hidden @ w.t()).view(40, 2, 48)
    separate = torch.cat((q[..., :32], ops.rope(q[..., 32:], cos, sin)), dim=-1)
    (want,) = torch.autograd.grad(separate, (w,), dy)
    q = (hidden @ w.t()).view(40, 2, 48)
    turned = rotate_queries(q, cos, sin)
    assert turned.data_ptr() == q.data_ptr()
    assert torch.equal(turned, separate)
    assert torch.equal(torch.autograd.grad(turned, (w,), dy)[0], want)


def test_rope_kernel_rejects_what_it_cannot_take() -> None:
    x, (cos, sin) = rows(4, 3, 24), tables(4, 16)
    with pytest.raises(ValueError, match=r"^rope: x must be aligned to 16 bytes, got"):
        ops.rope_(x[..., 4:20], cos, sin)
    with pytest.raises(ValueError, match=r"^rope: y must have a stride of at least 8 along axis 1, got 0$"):
        ops.rope_(x[:, :1, :16].expand(4, 3, 16), cos, sin)


def test_rope_ops_are_registered() -> None:
    x, (cos, sin) = rows(5, 2, 16), tables(5, 16)
    torch.library.opcheck(torch.ops.dsv3rt.rope.default, (x, cos, sin, True))
    torch.library.opcheck(torch.ops.dsv3rt.rope_.default, (x, cos, sin, True))

    def chain(x: Tensor) -> Tensor:
        return ops.rope_(x * 1, cos, sin) + ops.rope(x, cos, sin)

    torch.testing.assert_close(torch.compile(chain, fullgraph=True)(x), chain(x), rtol=2**-7, atol=0)


def assert_sums(tokens: Tensor, V: int, D: int) -> None:
    grad = rows(len(tokens), D, seed=2)
    got = torch.ops.dsv3rt.embedding_backward(grad, tokens.cuda(), V)
    # On the CPU the reference adds in the order of the tokens, as the kernel does.
    assert torch.equal(got.cpu(), reference.embedding_backward(grad.cpu(), tokens, V))
    assert all(torch.equal(torch.ops.dsv3rt.embedding_backward(grad, tokens.cuda(), V), got) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("T", "V", "D"), [(0, 5, 64), (1, 1, 8), (129, 7, 7168), (4096, 1000, 512), (300, 4, 7296), (97, 6, 16400)]
)
def test_embedding_backward_kernel_matches_reference(T: int, V: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(T)
    tokens = torch.randint(V, (T,), generator=generator).square().div(V, rounding_mode="floor").to(dtype)
    assert_sums(tokens, V, D)


@pytest.mark.parametrize("seed", range(3))
def test_embedding_backward_kernel_matches_reference_at_random_shapes(seed: int) -> None:
    """Runs of one token on either side of 16 and of a step of 12, in vocabularies of any size."""
    rng = random.Random(seed)
    for _ in range(20):
        V, D = int(50000 ** rng.random()), 8 * int(2100 ** rng.random())
        T = rng.randint(1, max(1, min(5000, (1 << 20) // D)))
        V = min(V, 1 + (1 << 22) // D)
        used = rng.choice([1, max(1, T // 16), max(1, T // 12), V])  # tokens there are
        print(T, V, D, used)
        tokens = torch.randperm(V)[torch.randint(min(used, V), (T,))].to(rng.choice([torch.int64, torch.int32]))
        assert_sums(tokens, V, D)


def test_embedding_backward_kernel_sums_one_token_in_fp32() -> None:
    grad = torch.full((4096, 64), 2.0**-9, device="cuda", dtype=torch.bfloat16)
    grad[0] = 1.0  # in BF16 the others would vanish beside it
    tokens = torch.full((4096,), 3, device="cuda")
    got = torch.ops.dsv3rt.embedding_backward(grad, tokens, 5)
    assert got[3].eq(torch.tensor(1 + 4095 * 2.0**-9).bfloat16().item()).all()
    assert got[[0, 1, 2, 4]].eq(0).all()


def test_embedding_is_differentiable_on_the_kernel() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    weight = rows(50, 144).requires_grad_()
    tokens = torch.randint(50, (4, 33), device="cuda")
    dy = rows(4, 33, 288, seed=1)[..., 144:]
    y = ops.embedding(tokens, weight)
    assert torch.equal(y, torch.nn.functional.embedding(tokens, weight))
    (got,) = torch.autograd.grad(y, (weight,), dy)
    want = reference.embedding_backward(dy.reshape(-1, 144).cpu(), tokens.flatten().cpu(), 50)
    assert torch.equal(got.cpu(), want)

    room = Guarded()
    target = room.halves(50, 144)
    order, no_tokens, offsets = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (0, 0, 51))
    extension.embedding_backward(dy[:0, 0], order.long(), no_tokens, offsets, target)
    assert target.eq(0).all()
    room.assert_intact()
    torch.library.opcheck(torch.ops.dsv3rt.embedding_backward.default, (dy[0].contiguous(), tokens[0], 50))
