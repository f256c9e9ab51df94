"""adamw_step with casts on the GPU is bitwise its reference, and what two passes over the weights give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops import AdamWHyper, AdamWSlot, QuantTensor, reference
from tests.gpu.quant_cases import FP8, MATRICES, Guarded, assert_same_bits, random_rows

pytestmark = pytest.mark.gpu

HYPER = AdamWHyper(lr=2.2e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SHAPES = [*MATRICES, (16, 8), (4, 256, 384), (2, 128, 24), (0, 128), (3, 0, 64)]
KINDS = [(grad, moment) for grad in (torch.float32, torch.bfloat16) for moment in (torch.float32, torch.bfloat16)]


def empty_cast(shape: tuple[int, ...], with_transpose: bool) -> tuple[QuantTensor, QuantTensor | None]:
    """Full of NaN."""
    parts = reference.quant.empty_128x128(torch.empty(shape, device="cuda"), True)
    for part in parts:
        (part.view(torch.uint8) if part.dtype == FP8 else part).fill_(0x7F)
    q, q_t = QuantTensor(parts[0], parts[1], (128, 128)), QuantTensor(parts[2], parts[3], (128, 128))
    return q, q_t if with_transpose else None


def make_slot(
    shape: tuple[int, ...],
    grad: torch.dtype = torch.float32,
    moment: torch.dtype = torch.bfloat16,
    *,
    with_transpose: bool = True,
    seed: int | None = None,
    at: int = 0,
) -> AdamWSlot:
    """Masters whose rows differ by decades, so that every scale does; tensors start `at` elements into their memory."""

    def shifted(x: Tensor) -> Tensor:
        room = x.new_empty(x.numel() + at)
        return room[at:].view(shape).copy_(x)

    def draw(dtype: torch.dtype, number: int) -> Tensor:
        return shifted(random_rows(shape, dtype, number, decades=4))

    master, v = draw(torch.float32, 1), draw(moment, 4).abs()
    cast = empty_cast(shape, with_transpose)
    return AdamWSlot(master, draw(grad, 2), draw(moment, 3), shifted(v), seed=seed, cast=cast)


def copy_of(slot: AdamWSlot, device: str = "cuda") -> AdamWSlot:
    cast = slot.cast
    assert cast is not None
    moved = [t.clone().to(device) for t in (slot.master, slot.grad, slot.m, slot.v)]
    quants = [
        None if q is None else QuantTensor(q.data.clone().to(device), q.scale.clone().to(device), q.tile) for q in cast
    ]
    assert quants[0] is not None
    return AdamWSlot(*moved, seed=slot.seed, cast=(quants[0], quants[1]))


def expect(slot: AdamWSlot, step: int, scale: Tensor | None, device: str = "cuda") -> AdamWSlot:
    """What the reference makes of a copy of the slot."""
    wanted = copy_of(slot, device)
    assert wanted.cast is not None
    parts = [part for q in wanted.cast if q is not None for part in (q.data, q.scale)]
    key = None if slot.seed is None else reference.optim.rounding_key(slot.seed, step)
    state = (wanted.master, wanted.grad, wanted.m, wanted.v)
    scale = None if scale is None else scale.to(device)
    reference.optim.adamw_step(state, None, parts, scale, reference.optim.numbers_of(HYPER, step), key)
    return wanted


def assert_same(got: AdamWSlot, expected: AdamWSlot) -> None:
    for field in ("master", "grad", "m", "v"):
        ours, theirs = getattr(got, field), getattr(expected, field)
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True)
    assert got.cast is not None
    assert expected.cast is not None
    for q, want in zip(got.cast, expected.cast, strict=True):
        if want is not None:
            assert q is not None
            compact = QuantTensor(q.data.contiguous().cpu(), q.scale.contiguous().cpu(), q.tile)
            assert_same_bits(compact, QuantTensor(want.data.cpu(), want.scale.cpu(), want.tile))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("with_transpose", [True, False])
@pytest.mark.parametrize(("grad", "moment"), KINDS)
def test_adamw_step_casts_as_the_reference_does(
    grad: torch.dtype, moment: torch.dtype, with_transpose: bool, at: int
) -> None:
    scale = torch.rand((), device="cuda")
    slots = [make_slot(shape, grad, moment, with_transpose=with_transpose, at=at) for shape in SHAPES]
    expected = [expect(slot, 3, scale) for slot in slots]
    ops.adamw_step(slots, hyper=HYPER, step=3, grad_scale=scale)
    for slot, wanted in zip(slots, expected, strict=True):
        assert_same(slot, wanted)


def test_adamw_step_casts_as_the_reference_of_the_cpu() -> None:
    for seed in (None, 3):
        slot = make_slot((3, 200, 272), seed=seed)
        wanted = expect(slot, 7, None, device="cpu")
        ops.adamw_step([slot], hyper=HYPER, step=7)
        assert_same(slot, wanted)


def test_adamw_step_casts_many_random_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(100):
        unit = [1, 4, 8, 16][number % 4]  # which of these divides decides whether rows start on 16 bytes
        shape = tuple(unit * int(torch.randint(1, 400 // unit, (), generator=generator)) for _ in range(2))
        slot = make_slot(shape, *KINDS[number // 4 % 4], seed=number if number % 3 else None, at=number % 5 // 4)
        wanted = expect(slot, number + 1, None)
        ops.adamw_step([slot], hyper=HYPER, step=number + 1)
        assert_same(slot, wanted)


def test_one_pass_gives_what_two_give() -> None:
    """The update with a copy in BF16, then the cast of that."""
    for shape in [(4096, 7168), (4, 512, 2048), (576, 7168)]:
        slot = make_slot(shape)
        two = dataclasses.replace(copy_of(slot), cast=None, param=torch.empty(shape, device="cuda").bfloat16())
        ops.adamw_step([slot], hyper=HYPER, step=2)
        ops.adamw_step([two], hyper=HYPER, step=2)
        assert two.param is not None
        assert_same(slot, dataclasses.replace(two, cast=ops.quantize_128x128(two.param, with_transpose=True)))


@pytest.mark.parametrize(("first", "second"), [(1536, 576), (128, 130), (256, 48)])
def test_adamw_step_casts_parts_of_a_stack(first: int, second: int) -> None:
    """Each weight's codes lie in the stack's, transposed as columns; one launch for both, or one weight alone."""
    columns, rows = 512, [first, second]
    w, w_t = empty_cast((first + second, columns), True)
    assert w_t is not None
    slots = []
    for start, count in zip((0, first), rows, strict=True):
        part, blocks = slice(start, start + count), slice(start // 128, -(-(start + count) // 128))
        cast = (
            QuantTensor(w.data[part], w.scale[blocks], w.tile),
            QuantTensor(w_t.data[:, part], w_t.scale[:, blocks], w_t.tile),
        )
        slots.append(dataclasses.replace(make_slot((count, columns)), cast=cast))
    ops.adamw_step(slots, hyper=HYPER, step=2)
    stacked = torch.cat([slot.master for slot in slots]).bfloat16()
    for got, want in zip((w, w_t), ops.quantize_128x128(stacked, with_transpose=True), strict=True):
        assert_same_bits(got, want)
    before = [q.data.clone() for q in (w, w_t)]
    slots[1].grad.mul_(-3.0)
    ops.adamw_step(slots[1:], hyper=HYPER, step=3)
    assert torch.equal(w.data[:first].view(torch.uint8), before[0][:first].view(torch.uint8))
    assert torch.equal(w_t.data[:, :first].view(torch.uint8), before[1][:, :first].view(torch.uint8))
    stacked = torch.cat([slot.master for slot in slots]).bfloat16()
    for got, want in zip((w, w_t), ops.quantize_128x128(stacked, with_transpose=True), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_poisons_its_tile_alone(value: float) -> None:
    slot = make_slot((2, 300, 272))
    slot.grad[1, 150, 270] = value
    wanted = expect(slot, 1, None)
    ops.adamw_step([slot], hyper=HYPER, step=1)
    assert_same(slot, wanted)
    assert slot.cast is not None
    assert (~slot.cast[0].scale.isfinite()).sum() == 1


def test_adamw_step_takes_more_tensors_with_casts_than_a_launch() -> None:
    slots = [make_slot((n % 41, 16 + n % 3), at=n % 2) for n in range(700)]
    expected = [expect(slot, 2, None) for slot in slots]
    ops.adamw_step(slots, hyper=HYPER, step=2)
    for slot, wanted in zip(slots, expected, strict=True):
        assert_same(slot, wanted)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (144, 144), (130, 144), (1, 8), (129, 257)])
def test_adamw_step_with_casts_writes_nothing_beside(rows: int, columns: int) -> None:
    room = Guarded()
    r, c = -(-rows // 128), -(-columns // 128)
    tensors = [room.floats(rows, columns).copy_(torch.rand(rows, columns)) for _ in range(4)]
    q = QuantTensor(room.codes(rows, columns).view(FP8), room.floats(r, c), (128, 128))
    q_t = QuantTensor(room.codes(columns, rows).view(FP8), room.floats(c, r), (128, 128))
    slot = AdamWSlot(*tensors, cast=(q, q_t))
    wanted = expect(slot, 4, None)
    ops.adamw_step([slot], hyper=HYPER, step=4)
    assert_same(slot, wanted)
    room.assert_intact()


def test_adamw_step_with_casts_runs_in_a_graph() -> None:
    slots = [make_slot(shape) for shape in ((300, 512), (2, 128, 256))]
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
