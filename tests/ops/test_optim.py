"""adamw_step, against torch.optim.AdamW and the formula in FP64; grad_norms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import AdamWHyper, AdamWSlot, QuantTensor
from dsv3rt.ops.reference import optim as reference

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
        ops.adamw_step([AdamWSlot(master, grad, m, v)], hyper=HYPER, step=step)
        # Torch groups the operations otherwise: each side is a few roundings of 2^-24 away, of the largest term of a
        # sum (for m, whose terms may cancel, that is up to |grad|), and master moves by lr a step.
        torch.testing.assert_close(master, theirs.detach(), rtol=3e-7, atol=3e-3 * 5 * 2**-21)
        largest = grad.abs().amax().item() if grad.numel() else 0.0
        torch.testing.assert_close(m, optimizer.state[theirs]["exp_avg"], rtol=3e-7, atol=2**-22 * largest)
        torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"], rtol=5e-7, atol=0.0)


def test_adamw_step_rounds_every_operation_to_nearest() -> None:
    """Bit for bit what numpy gets, whose FP32 operations, the root among them, are those of IEEE 754."""
    count, step = 50_001, 7
    draw = lambda: torch.randn(count) * 10 ** (torch.rand(count) * 12 - 10)  # noqa: E731
    master, grad, m, v = draw(), draw(), draw(), draw().abs()
    v[::17] = 1e-42  # subnormal
    x, g, m32, v32 = (t.numpy().copy() for t in (master, grad, m, v))
    f = [np.float32(number) for number in reference.numbers_of(HYPER, step)]
    m32, v32 = m32 * f[0] + g * f[1], v32 * f[2] + g * g * f[3]
    x = x * f[6] + m32 * f[7] / (np.sqrt(v32) * f[4] + f[5])
    ops.adamw_step([AdamWSlot(master, grad, m, v)], hyper=HYPER, step=step)
    for ours, theirs in ((m, m32), (v, v32), (master, x)):
        assert torch.equal(ours, torch.from_numpy(theirs))


def test_adamw_step_rounds_bf16_moments_after_using_them() -> None:
    master, m, v = state(1000, moment_dtype=torch.bfloat16)
    master64 = master.double()
    for step in range(1, 4):
        grad = torch.randn(1000)
        m64 = 0.9 * m.double() + 0.1 * grad.double()
        v64 = 0.95 * v.double() + 0.05 * grad.double() ** 2
        update = m64 / (1 - 0.9**step) / ((v64 / (1 - 0.95**step)).sqrt() + 1e-8)
        master64 = master64 * (1 - 3e-4) - 3e-3 * update
        ops.adamw_step([AdamWSlot(master, grad, m, v)], hyper=HYPER, step=step)
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
    scale = torch.tensor([0.25]) if as_tensor else 0.25
    ops.adamw_step([AdamWSlot(master, grad, m, v)], hyper=HYPER, step=1, grad_scale=scale)
    ops.adamw_step([AdamWSlot(other, grad * 0.25, other_m, other_v)], hyper=HYPER, step=1)
    assert torch.equal(master, other)
    assert torch.equal(v, other_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adamw_step_writes_the_parameter(dtype: torch.dtype) -> None:
    master, m, v = state(8, 3)
    param = torch.nn.Parameter(torch.zeros(8, 3, dtype=dtype))
    grad = torch.randn(8, 3).to(dtype)
    before = grad.clone()
    ops.adamw_step([AdamWSlot(master, grad, m, v, param)], hyper=HYPER, step=1)
    assert torch.equal(param.detach(), master.to(dtype))
    assert torch.equal(grad, before)


def test_adamw_step_takes_the_parameter_itself_as_master() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    slot = AdamWSlot(param, torch.ones(3), *state(3)[1:])
    ops.adamw_step([slot], hyper=AdamWHyper(lr=0.5, weight_decay=0.0), step=1)
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.5))


def test_adamw_step_decays_weights_without_gradient() -> None:
    master, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
    ops.adamw_step([AdamWSlot(master, torch.zeros(2), m, v)], hyper=AdamWHyper(lr=0.1, weight_decay=0.5), step=1)
    torch.testing.assert_close(master, torch.full((2,), 0.95))


def test_adamw_step_shows_bad_numbers() -> None:
    master, m, v = state(3)
    ops.adamw_step([AdamWSlot(master, torch.tensor([1.0, float("nan"), 1.0]), m, v)], hyper=HYPER, step=1)
    assert master.isnan().tolist() == [False, True, False]


def test_adamw_step_takes_lists_of_mixed_dtypes_as_it_takes_each() -> None:
    kinds = [(torch.float32, torch.bfloat16, True), (torch.bfloat16, torch.float32, False)] * 2
    slots, copies = [], []
    for n, (grad_dtype, moment_dtype, with_param) in enumerate(kinds):
        master, m, v = state(n + 3, moment_dtype=moment_dtype)
        param = torch.empty(n + 3, dtype=torch.bfloat16) if with_param else None
        slot = AdamWSlot(master, torch.randn(n + 3).to(grad_dtype), m, v, param)
        slots.append(slot)
        copies.append(AdamWSlot(*(None if t is None else t.clone() for t in (master, slot.grad, m, v, param))))
    ops.adamw_step(slots, hyper=HYPER, step=2)
    for copy, slot in zip(copies, slots, strict=True):
        ops.adamw_step([copy], hyper=HYPER, step=2)
        assert torch.equal(copy.master, slot.master)
        assert torch.equal(copy.m, slot.m)
        assert copy.param is None or torch.equal(copy.param, slot.master.bfloat16())
    ops.adamw_step([], hyper=HYPER, step=1)


def test_stochastic_rounding_goes_to_neighbours_and_keeps_the_mean() -> None:
    count = 200_000
    x = torch.full((count,), 1.0 + 0.3 * 2**-7)  # three tenths of the way between two BF16 numbers
    random = reference.rounding_bits(reference.rounding_key(7, 3), count, x.device)
    assert random.min() >= 0
    assert random.max() < 2**32
    for half in (random & 0xFFFF, random >> 16):
        rounded = reference.round_stochastically(x, half)
        assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
        # A share of 0.3 has a standard deviation of 0.001 here.
        assert (rounded > 1).double().mean().item() == pytest.approx(0.3, abs=0.006)
        assert torch.equal(reference.round_stochastically(-x, half), -rounded)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 1.5])
    kept = reference.round_stochastically(special, torch.full((5,), 0xFFFF))
    torch.testing.assert_close(kept, special, rtol=0, atol=0, equal_nan=True)


def test_adamw_step_rounds_stochastically_by_seed_step_and_element() -> None:
    def moments(seed: int | None, step: int, count: int) -> Tensor:
        master, m, v = state(count, moment_dtype=torch.bfloat16)
        slot = AdamWSlot(master, torch.full((count,), 1.0 + 0.4 * 2**-7), m, v, seed=seed)
        ops.adamw_step([slot], hyper=AdamWHyper(lr=0.1, beta1=0.5, beta2=0.5), step=step)
        assert slot.m.unique().numel() == (1 if seed is None else 2)
        return slot.m

    first = moments(5, 1, 1000)
    assert torch.equal(moments(5, 1, 1000), first)
    assert torch.equal(moments(5, 1, 100), first[:100])
    for other in (moments(6, 1, 1000), moments(5, 2, 1000), moments(5 + 2**40, 1, 1000)):
        assert 0.3 < (other == first).double().mean().item() < 0.7  # independent: 0.52 of them agree
    moments(None, 1, 10)


def test_grad_norms_match_fp64() -> None:
    grads = [torch.randn(shape) for shape in [(17, 5), (), (0,), (1000,)]]
    norms = ops.grad_norms(grads)
    assert norms.dtype == torch.float64
    expected = torch.stack([grad.double().square().sum().sqrt() for grad in grads])
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)  # 1000 roundings of 2^-53
    bf16 = ops.grad_norms([grads[0].bfloat16()])
    torch.testing.assert_close(bf16, ops.grad_norms([grads[0].bfloat16().float()]), rtol=0, atol=0)


def test_grad_norms_of_pieces_make_the_norm_of_the_whole() -> None:
    """As an FP32 number, to the bit: where a parameter is cut into shards must not change how gradients are clipped."""
    for cut in range(1, 200):
        grad = torch.randn(200, 7)
        whole, *pieces = ops.grad_norms([grad, grad[:cut], grad[cut:]])
        assert torch.linalg.vector_norm(torch.stack(pieces)).float() == whole.float(), cut


def test_grad_norms_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^grad_norms: grads must not be empty, got no tensor$"):
        ops.grad_norms([])
    with pytest.raises(TypeError, match=r"^grad_norms: grads must be bfloat16 or float32, got float64$"):
        ops.grad_norms([torch.ones(2, dtype=torch.float64)])
    with pytest.raises(TypeError, match=r"^grad_norms: grads must be float32, got bfloat16$"):
        ops.grad_norms([torch.ones(2), torch.ones(2, dtype=torch.bfloat16)])


def test_adamw_step_rejects_bad_arguments() -> None:
    master, m, v = state(4)
    grad = torch.randn(4)
    with pytest.raises(TypeError, match=r"^adamw_step: master must be float32, got bfloat16$"):
        ops.adamw_step([AdamWSlot(master.bfloat16(), grad, m, v)], hyper=HYPER, step=1)
    with pytest.raises(ValueError, match=r"^adamw_step: v must have shape \(4,\), got \(3,\)$"):
        ops.adamw_step([AdamWSlot(master, grad, m, v[1:])], hyper=HYPER, step=1)
    with pytest.raises(TypeError, match=r"^adamw_step: v must be float32, got bfloat16$"):
        ops.adamw_step([AdamWSlot(master, grad, m, v.bfloat16())], hyper=HYPER, step=1)
    with pytest.raises(TypeError, match=r"^adamw_step: param must be bfloat16 or float32, got float16$"):
        ops.adamw_step([AdamWSlot(master, grad, m, v, master.half())], hyper=HYPER, step=1)
    with pytest.raises(ValueError, match=r"^adamw_step: step must be at least 1, got 0$"):
        ops.adamw_step([AdamWSlot(master, grad, m, v)], hyper=HYPER, step=0)
    with pytest.raises(ValueError, match=r"^adamw_step: grad_scale must have one element, got \(2,\)$"):
        ops.adamw_step([AdamWSlot(master, grad, m, v)], hyper=HYPER, step=1, grad_scale=torch.ones(2))


def cast_of(shape: tuple[int, ...]) -> tuple[QuantTensor, QuantTensor]:
    return ops.quantize_128x128(torch.full(shape, torch.nan), with_transpose=True)


@pytest.mark.parametrize("with_transpose", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (130, 72), (3, 40, 200)])
def test_adamw_step_casts_what_it_would_have_copied(shape: tuple[int, ...], with_transpose: bool) -> None:
    """The same update; the cast is of the copy in BF16."""
    states = [state(*shape, moment_dtype=torch.bfloat16) for _ in range(2)]
    grad = torch.randn(shape)
    for ours, theirs in zip(*states, strict=True):
        theirs.copy_(ours)
    param, casts = torch.empty(shape, dtype=torch.bfloat16), cast_of(shape)
    slots = [
        AdamWSlot(states[0][0], grad, *states[0][1:], cast=(casts[0], casts[1] if with_transpose else None)),
        AdamWSlot(states[1][0], grad, *states[1][1:], param),
    ]
    ops.adamw_step(slots, hyper=HYPER, step=3)
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours, theirs)
    want = ops.quantize_128x128(param, with_transpose=True)
    for got, right in list(zip(casts, want, strict=True))[: 1 + with_transpose]:
        assert torch.equal(got.data, right.data)
        assert torch.equal(got.scale, right.scale)
    if not with_transpose:
        assert casts[1].scale.isnan().all()


def test_adamw_step_casts_into_columns_of_a_wider_matrix() -> None:
    master, m, v = state(128, 48)
    whole, whole_t = cast_of((256, 48))
    part = QuantTensor(whole.data[128:], whole.scale[1:], whole.tile)
    part_t = QuantTensor(whole_t.data[:, 128:], whole_t.scale[:, 1:], whole_t.tile)
    ops.adamw_step([AdamWSlot(master, torch.randn(128, 48), m, v, cast=(part, part_t))], hyper=HYPER, step=1)
    q, q_t = ops.quantize_128x128(master.bfloat16(), with_transpose=True)
    assert torch.equal(whole.data[128:], q.data)
    assert torch.equal(whole_t.data[:, 128:], q_t.data)
    assert torch.equal(whole_t.scale[:, 1:], q_t.scale)
    assert whole.scale[0].isnan().all()
    assert whole_t.data[:, :128].float().isnan().all()


def test_adamw_step_rejects_bad_casts() -> None:
    master, m, v = state(40, 16)
    q, q_t = cast_of((40, 16))
    slot = AdamWSlot(master, torch.randn(40, 16), m, v, cast=(q, q_t))
    bad = [
        (replace(slot, param=master.clone()), r"cast must be None where param is given, got both"),
        (replace(slot, cast=(q_t, q_t)), r"cast\[0\]\.data must have shape \(40, 16\), got \(16, 40\)"),
        (replace(slot, cast=(q, q)), r"cast\[1\]\.data must have shape \(16, 40\), got \(40, 16\)"),
        (replace(slot, cast=(q, ops.quantize_1x128(q_t.data.float()[:, :32]))), r"cast\[1\]\.data must have shape"),
        (replace(slot, cast=(q, QuantTensor(q.data.t(), q_t.scale, q.tile))), r"cast\[1\]\.data must have contiguous"),
    ]
    for one, message in bad:
        with pytest.raises(ValueError, match=f"^adamw_step: {message}"):
            ops.adamw_step([one], hyper=HYPER, step=1)
    flat, *moments = state(640)
    with pytest.raises(ValueError, match=r"^adamw_step: master must have 2 or 3 dimensions with a cast, got \(640,\)$"):
        ops.adamw_step([AdamWSlot(flat, flat.clone(), *moments, cast=(q, q_t))], hyper=HYPER, step=1)
