"""The backward kernel of latent attention against the reference's gradients in FP64 of the same BF16 numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from tests.gpu.mla_cases import (
    BATCHES,
    SCALE,
    WIDE_BATCHES,
    Batch,
    Lengths,
    assert_gradients,
    draw,
    ends,
    gradients_of,
    random_batch,
)

pytestmark = pytest.mark.gpu

# Rounding a number to BF16 is a relative error of 2^-8 sqrt(0.541 / 3) = 1.7e-3 in the mean square, of random sign
# (0.541: the mean of 1 / m^2 over significands m). For dk weights, their gradients, the product and the result are
# rounded, four in quadrature: 3.3e-3 (dq has three, dv two); calc_diff is half of the square, 5.6e-6. Rounded out adds
# to delta, the more the fewer keys there are, as in causal batches: 4 to 7e-6 in all from 32 keys on. 1e-5 is allowed.
DIFF = 1e-5
# A query that sees few keys has weights near one: then dout v - delta cancels, and what is left, near dlse (about 1),
# meets the rounding of out in delta, |dout| |v| 1.7e-3, about 0.019: half of its square is 1.8e-4, a few times that in
# the tail.
DIFF_FEW_KEYS = 1e-3
FEW_KEYS = 32
NAMES = ("dq", "dk_nope", "dk_rope", "dv")


def gradients(
    inputs: tuple[Tensor, ...],
    cu: Tensor,
    cu_k: Tensor,
    causal: bool,
    weights: tuple[Tensor, Tensor],
    scale: float = SCALE,
) -> list[Tensor]:
    """Of sum(out * weights[0]) + sum(lse * weights[1]) over queries that see a key, in the dtype of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = ops.mla_prefill(*leaves, cu, scale=scale, causal=causal, cu_seqlens_k=cu_k)  # type: ignore[misc]
    seeing = lse.detach() > -math.inf
    torch.autograd.backward((out, lse), (weights[0].to(out.dtype), weights[1].to(lse.dtype) * seeing))
    return [x.grad for x in leaves if x.grad is not None]


def assert_batch(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool, size: float = 1.0) -> None:
    inputs = draw(sum(q_lengths), sum(k_lengths), heads, size)
    cu, cu_k = ends(q_lengths), ends(k_lengths)
    dout = torch.randn((sum(q_lengths), heads, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(q_lengths), heads), device="cuda")
    got = gradients(inputs, cu, cu_k, causal, (dout, dlse))
    want = gradients(tuple(x.double() for x in inputs), cu, cu_k, causal, (dout, dlse))
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert not mine.isnan().any(), name
        diff = ops.calc_diff(mine, theirs) if mine.numel() else 0.0
        assert diff < (DIFF if max(k_lengths) >= FEW_KEYS else DIFF_FEW_KEYS), (name, diff)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), BATCHES, ids=lambda lengths: "_".join(map(str, lengths))[:40])
def test_mla_backward_kernel_matches_fp64(q_lengths: Lengths, k_lengths: Lengths, heads: int, causal: bool) -> None:
    assert_batch(q_lengths, k_lengths, heads, causal)


@dataclass(frozen=True)
class Sizes:
    qk: float = 1.0
    v: float = 1.0
    dout: float = 1.0
    dlse: float = 1.0
    scale: float = SCALE


ONES = Sizes()


def assert_blocks(batch: Batch, sizes: Sizes = ONES) -> None:
    """Sequence by sequence, in blocks of 64 rows of one head; the bounds stand beside `gradients_of`."""
    cu, cu_k = ends(batch.q_lengths), ends(batch.k_lengths)
    inputs = draw(sum(batch.q_lengths), sum(batch.k_lengths), batch.heads, sizes.qk, sizes.v)
    dout = (torch.randn((len(inputs[0]), batch.heads, 128), device="cuda") * sizes.dout).bfloat16()
    dlse = torch.randn((len(inputs[0]), batch.heads), device="cuda") * sizes.dlse
    got = gradients(inputs, cu, cu_k, batch.causal, (dout, dlse), sizes.scale)
    query = key = 0
    for num_queries, num_keys in zip(batch.q_lengths, batch.k_lengths, strict=True):
        rows, keys = slice(query, query + num_queries), slice(key, key + num_keys)
        parts = (rows, keys, keys, keys)
        own = tuple(x[part] for x, part in zip(inputs, parts, strict=True))
        true = gradients_of(own, (dout[rows], dlse[rows]), batch.causal, sizes.scale)
        assert_gradients({name: x[part] for name, x, part in zip(NAMES, got, parts, strict=True)}, true)
        query, key = rows.stop, keys.stop


@pytest.mark.parametrize("seed", range(40))
def test_mla_backward_kernel_matches_fp64_on_random_batches(seed: int) -> None:
    torch.manual_seed(seed)
    assert_blocks(random_batch(seed))


@pytest.mark.parametrize("name", NAMES)
def test_mla_backward_bounds_see_a_block_that_is_off(name: str) -> None:
    """By 2 % in 64 rows of one head, of 2000 tokens; dk_rope has no heads."""
    inputs, cu = draw(2000, 2000, 2), ends([2000])
    weights = torch.randn((2000, 2, 128), device="cuda").bfloat16(), torch.randn((2000, 2), device="cuda")
    got = dict(zip(NAMES, gradients(inputs, cu, cu, True, weights), strict=True))
    true = gradients_of(inputs, weights, True, SCALE)
    assert_gradients(got, true)
    rows = got[name][1024:1088]
    (rows if name == "dk_rope" else rows[:, 1]).mul_(1.02)
    with pytest.raises(AssertionError, match=name):
        assert_gradients(got, true)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), WIDE_BATCHES, ids=str)
def test_mla_backward_kernel_takes_128_heads(q_lengths: Lengths, k_lengths: Lengths, causal: bool) -> None:
    assert_blocks(Batch(q_lengths, k_lengths, 128, causal))


@pytest.mark.parametrize(
    "sizes",
    [
        *(Sizes(qk=qk) for qk in (1e-3, 8.0, 60.0)),
        *(Sizes(qk=qk, scale=scale) for qk, scale in ((1.0, 1e-6), (1.0, 0.3), (1.0, 5.0), (3e-6, 1e9), (1e5, 1e-9))),
        *(Sizes(v=v, dout=dout, dlse=v * dout) for v, dout in ((3e-10, 7e-9), (2e10, 3e9), (3e12, 2e-14))),
        *(Sizes(dout=dout, dlse=dlse) for dout, dlse in ((0.0, 1.0), (1.0, 0.0), (1.0, 300.0))),
    ],
    ids=str,
)
def test_mla_backward_kernel_takes_any_size(sizes: Sizes) -> None:
    """From weights that are all alike to one that is nearly 1; some queries see no key."""
    assert_blocks(Batch([300, 129, 70], [300, 200, 64], 3, causal=True), sizes)


@pytest.mark.parametrize(
    ("of_q", "of_scale", "of_v", "of_dout"), [(40, 0, 0, 0), (-40, 0, 30, 30), (20, 15, -30, -30), (-15, -30, 40, -40)]
)
def test_mla_backward_kernel_passes_on_powers_of_two(of_q: int, of_scale: int, of_v: int, of_dout: int) -> None:
    """Gradients have what their formulas say, bitwise: no number comes near the ends of FP32's range."""
    (q, k_nope, k_rope, v), cu = draw(900, 900, 5), ends([500, 400])
    dout, dlse = torch.randn((900, 5, 128), device="cuda").bfloat16(), torch.randn((900, 5), device="cuda")
    before = gradients((q, k_nope, k_rope, v), cu, cu, True, (dout, dlse))
    of_k, of_dlse = -(of_q + of_scale), of_v + of_dout
    moved = (q * 2.0**of_q, k_nope * 2.0**of_k, k_rope * 2.0**of_k, v * 2.0**of_v)
    weights = (dout * 2.0**of_dout, dlse * 2.0**of_dlse)
    got = gradients(moved, cu, cu, True, weights, SCALE * 2.0**of_scale)
    powers = (of_dlse - of_q, of_dlse - of_k, of_dlse - of_k, of_dout)
    for name, mine, plain, power in zip(NAMES, got, before, powers, strict=True):
        assert torch.equal(mine, plain * 2.0**power), name


@pytest.mark.parametrize(("k_lengths", "causal"), [([100, 64, 0], True), ([300, 64, 0], False)], ids=str)
def test_mla_backward_kernel_gives_nothing_to_queries_without_keys(k_lengths: Lengths, causal: bool) -> None:
    """Their lse is -inf, and the gradient that comes back through it is anything; that of out may be large."""
    q_lengths = [300, 65, 77]
    cu, cu_k = ends(q_lengths), ends(k_lengths)
    inputs = draw(sum(q_lengths), sum(k_lengths), 3)
    dout = torch.randn((sum(q_lengths), 3, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(q_lengths), 3), device="cuda")
    blind = ops.mla_prefill(*inputs, cu, scale=SCALE, causal=causal, cu_seqlens_k=cu_k)[1][:, 0] == -math.inf
    hidden = [max(0, n - m) if causal or m == 0 else 0 for n, m in zip(q_lengths, k_lengths, strict=True)]
    assert blind.sum() == sum(hidden)
    before = gradients(inputs, cu, cu_k, causal, (dout, dlse))
    dout[blind] *= 1e30
    dlse[blind] = torch.nan
    got = gradients(inputs, cu, cu_k, causal, (dout, dlse))
    for mine, plain in zip(got, before, strict=True):
        assert torch.equal(mine, plain)
    assert got[0][blind].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[100, 77, 130, 128], [200, 1], [128, 128], [1, 1, 1]], ids=str)
def test_mla_backward_kernel_keeps_neighbours_out(lengths: Lengths, causal: bool) -> None:
    """NaN in the second sequence's inputs and gradients reaches no other, though tiles reach into it."""
    inputs = draw(sum(lengths), sum(lengths), 3)
    cu = ends(lengths)
    dout = torch.randn((sum(lengths), 3, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(lengths), 3), device="cuda")
    clean = gradients(inputs, cu, cu, causal, (dout, dlse))
    foreign = slice(lengths[0], lengths[0] + lengths[1])
    for x in (*inputs, dout, dlse):
        x[foreign] = torch.nan
    got = gradients(inputs, cu, cu, causal, (dout, dlse))
    for mine, before in zip(got, clean, strict=True):
        for rows in (slice(0, foreign.start), slice(foreign.stop, None)):
            assert not mine[rows].isnan().any()
            assert torch.equal(mine[rows], before[rows])


@pytest.mark.parametrize("lengths", [[1537], [300, 5, 1000, 64, 129]], ids=str)
def test_mla_backward_kernel_is_deterministic(lengths: Lengths) -> None:
    inputs, cu = draw(sum(lengths), sum(lengths), 16), ends(lengths)
    dout = torch.randn((sum(lengths), 16, 128), device="cuda").bfloat16()
    dlse = torch.randn((sum(lengths), 16), device="cuda")
    first = gradients(inputs, cu, cu, True, (dout, dlse))
    for _ in range(20):
        again = gradients(inputs, cu, cu, True, (dout, dlse))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_mla_backward_kernel_fills_one_gradient_for_keys_and_values() -> None:
    inputs = draw(300, 300, 3)
    dout, dlse = torch.randn((300, 3, 128), device="cuda").bfloat16(), torch.zeros((300, 3), device="cuda")
    out, lse = ops.mla_prefill(*inputs, ends([300]), scale=SCALE)
    _, dk_nope, _, dv = torch.ops.dsv3rt.mla_prefill_backward(
        list(inputs), [out, lse], [dout, dlse], [ends([300])] * 2, SCALE, True
    )
    assert dk_nope.stride() == dv.stride() == (3 * 256, 256, 1)
    assert dv.data_ptr() - dk_nope.data_ptr() == 128 * 2


def test_mla_backward_kernel_handles_no_keys_and_no_queries() -> None:
    assert_batch([5], [0], 3, causal=True)
    assert_batch([0], [0], 3, causal=True)
    inputs = draw(0, 5, 2)
    weights = (torch.zeros((0, 2, 128), device="cuda"), torch.zeros((0, 2), device="cuda"))
    for gradient in gradients(inputs, ends([0]), ends([5]), True, weights):
        assert gradient.eq(0).all()
