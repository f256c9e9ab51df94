"""adamw_step on the GPU is bitwise its reference; grad_norms against FP64."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import AdamWHyper, AdamWSlot, reference
from tests.gpu.quant_cases import Guarded

pytestmark = pytest.mark.gpu

HYPER = AdamWHyper(lr=2.2e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SIZES = [1, 7, 8, 4095, 4096, 4097, 0, 8192, 100_003, 12_288, 3, 262_144]
KINDS = [
    (grad, moment, param)
    for grad in (torch.float32, torch.bfloat16)
    for moment in (torch.float32, torch.bfloat16)
    for param in (None, torch.bfloat16, torch.float32)
]


def make_slot(
    size: int,
    grad: torch.dtype,
    moment: torch.dtype,
    param: torch.dtype | None,
    *,
    seed: int | None = None,
    at: int = 0,
) -> AdamWSlot:
    """Magnitudes over many decades, zeros among them; every tensor starts `at` elements into its memory."""

    def draw(dtype: torch.dtype) -> Tensor:
        values = torch.randn(size + at, device="cuda") * 10 ** (torch.rand(size + at, device="cuda") * 12 - 10)
        values[::17] = 0
        return values.to(dtype)[at:]

    copy = None if param is None else torch.full((size + at,), torch.nan, dtype=param, device="cuda")[at:]
    return AdamWSlot(draw(torch.float32), draw(grad), draw(moment), draw(moment).abs(), copy, seed)


def expect(slot: AdamWSlot, step: int, scale: Tensor | None, device: str = "cuda") -> AdamWSlot:
    """What the reference makes of a copy of the slot."""
    moved = [t.clone().to(device) for t in (slot.master, slot.grad, slot.m, slot.v)]
    param = None if slot.param is None else slot.param.clone().to(device)
    numbers = reference.optim.numbers_of(HYPER, step)
    key = None if slot.seed is None else reference.optim.rounding_key(slot.seed, step)
    scale = None if scale is None else scale.to(device)
    reference.optim.adamw_step((moved[0], moved[1], moved[2], moved[3]), param, [], scale, numbers, key)
    return AdamWSlot(*moved, param, slot.seed)


def assert_same(got: AdamWSlot, expected: AdamWSlot) -> None:
    for field in ("master", "grad", "m", "v", "param"):
        ours, theirs = getattr(got, field), getattr(expected, field)
        if theirs is not None:
            torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(("grad", "moment", "param"), KINDS)
@pytest.mark.parametrize("step", [1, 3, 100_000])
def test_adamw_step_matches_reference(
    grad: torch.dtype, moment: torch.dtype, param: torch.dtype | None, step: int, at: int
) -> None:
    scale = torch.rand((), device="cuda")
    slots = [make_slot(size, grad, moment, param, at=at) for size in SIZES]
    expected = [expect(slot, step, scale) for slot in slots]
    ops.adamw_step(slots, hyper=HYPER, step=step, grad_scale=scale)
    for slot, wanted in zip(slots, expected, strict=True):
        assert_same(slot, wanted)


def test_adamw_step_matches_the_reference_of_the_cpu() -> None:
    for seed in (None, 3):
        slot = make_slot(50_001, torch.float32, torch.bfloat16, torch.bfloat16, seed=seed)
        wanted = expect(slot, 7, None, device="cpu")
        ops.adamw_step([slot], hyper=HYPER, step=7)
        assert_same(slot, wanted)


def test_adamw_step_rounds_stochastically_as_the_reference_does() -> None:
    seeds = [0, 1, 2**63 - 1, None, 12345]
    slots = [make_slot(5000 + n, torch.float32, torch.bfloat16, None, seed=seed, at=n) for n, seed in enumerate(seeds)]
    slots[0].grad[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = [expect(slot, 9, None) for slot in slots]
    ops.adamw_step(slots, hyper=HYPER, step=9)
    for slot, wanted in zip(slots, expected, strict=True):
        assert_same(slot, wanted)


def test_adamw_step_takes_more_tensors_than_a_launch() -> None:
    slots = [make_slot(n % 41, torch.float32, torch.bfloat16, torch.bfloat16, at=n % 3) for n in range(1000)]
    expected = [expect(slot, 2, None) for slot in slots]
    ops.adamw_step(slots, hyper=HYPER, step=2)
    for slot, wanted in zip(slots, expected, strict=True):
        assert_same(slot, wanted)


def test_adamw_step_takes_a_list_of_mixed_dtypes_and_gradients_of_any_strides() -> None:
    slots = [make_slot(6000, *kind) for kind in KINDS]
    slots.append(AdamWSlot(*(torch.rand(60, 50, device="cuda") for _ in range(4))))
    slots[-1] = dataclasses.replace(slots[-1], grad=torch.rand(50, 60, device="cuda").t())
    expected = [expect(slot, 2, None) for slot in slots]
    ops.adamw_step(slots, hyper=HYPER, step=2)
    for slot, wanted in zip(slots, expected, strict=True):
        assert_same(slot, wanted)
    with pytest.raises(ValueError, match=r"^adamw_step: m must be contiguous on CUDA, got stride \(1, 60\)$"):
        ops.adamw_step([dataclasses.replace(slots[-1], m=slots[-1].grad)], hyper=HYPER, step=2)


@pytest.mark.parametrize("size", [1, 4096, 5000])
def test_adamw_step_writes_nothing_beside(size: int) -> None:
    room = Guarded()
    tensors = [room.floats(size).copy_(torch.rand(size)) for _ in range(4)]
    param = room.floats(size)
    slot = AdamWSlot(*tensors, param)
    wanted = expect(slot, 4, None)
    ops.adamw_step([slot], hyper=HYPER, step=4)
    assert_same(slot, wanted)
    room.assert_intact()


def test_adamw_step_does_not_wait_and_runs_in_a_graph() -> None:
    slots = [make_slot(size, torch.float32, torch.bfloat16, torch.bfloat16) for size in (5000, 70_000)]
    scale = torch.ones((), device="cuda")
    wanted = [expect(expect(slot, 2, scale), 2, scale) for slot in slots]
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side):
        ops.adamw_step(slots, hyper=HYPER, step=2, grad_scale=scale)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for slot, expected in zip(slots, wanted, strict=True):
        assert_same(slot, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 1])
def test_grad_norms_match_fp64_and_repeat(dtype: torch.dtype, at: int) -> None:
    sizes = [*SIZES, 32768, 32769, 3_000_001]
    grads = [(torch.randn(size + at, device="cuda") * 10.0 ** (n - 6)).to(dtype)[at:] for n, size in enumerate(sizes)]
    norms = ops.grad_norms(grads)
    expected = torch.stack([torch.linalg.vector_norm(grad.double()) for grad in grads])
    # Exact squares, all positive, in FP64 sums: both sides' chains are shorter than 9000, of 2^-53 each.
    torch.testing.assert_close(norms, expected, rtol=2e-12, atol=0)
    assert torch.equal(ops.grad_norms(grads), norms)
    assert torch.equal(ops.grad_norms(grads[3:4]), norms[3:4])


@pytest.mark.parametrize("seed", range(3))
def test_grad_norms_match_fp64_at_random_sizes(seed: int) -> None:
    """Up to 300 tensors of up to 2 million elements, anywhere in their memory, each of a magnitude of its own."""
    rng = random.Random(seed)
    for _ in range(12):
        dtype, number = rng.choice([torch.float32, torch.bfloat16]), int(300 ** rng.random())
        largest = min(2_000_000, (1 << 23) // number)
        places = [(rng.choice([0, 0, rng.randint(1, 9)]), int(largest ** rng.random())) for _ in range(number)]
        print(dtype, places)
        grads = []
        for at, size in places:
            magnitude = 10.0 ** rng.uniform(-15, 15)
            grads.append((torch.randn(size + at, device="cuda") * magnitude).to(dtype)[at:])
        norms = ops.grad_norms(grads)
        expected = torch.stack([torch.linalg.vector_norm(grad.double()) for grad in grads])
        torch.testing.assert_close(norms, expected, rtol=2e-12, atol=0)  # as above
        assert all(torch.equal(ops.grad_norms(grads), norms) for _ in range(3))


def test_grad_norms_take_many_extreme_and_strided_tensors() -> None:
    grads = [torch.full((n % 5,), 1e30 if n % 2 else 1e-30, device="cuda") for n in range(2500)]
    expected = torch.stack([torch.linalg.vector_norm(grad.double()) for grad in grads])
    torch.testing.assert_close(ops.grad_norms(grads), expected, rtol=1e-15, atol=0)
    strided = torch.randn(30, 40, device="cuda").t()
    assert torch.equal(ops.grad_norms([strided]), ops.grad_norms([strided.contiguous()]))
    bad = torch.ones(40_000, device="cuda")
    bad[39_999] = torch.nan
    assert ops.grad_norms([torch.ones(3, device="cuda"), bad]).isnan().tolist() == [False, True]


def test_grad_norms_and_clipping_do_not_wait_for_the_device() -> None:
    grads = [torch.randn(5000, device="cuda")]
    slot = make_slot(5000, torch.float32, torch.bfloat16, None)
    ops.grad_norms(grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale = (1.0 / (torch.linalg.vector_norm(ops.grad_norms(grads)).float() + 1e-6)).clamp(max=1.0)
        ops.adamw_step([slot], hyper=HYPER, step=1, grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
