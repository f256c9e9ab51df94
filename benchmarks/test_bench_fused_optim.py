"""The loss and the optimizer against the copy bandwidth of the same run, and against the chains of torch ops that they
replace. The list of the optimizer is one layer's share of a rank: attention, a shared expert and eight routed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.conftest import record
from benchmarks.peers import CHAINS, chain_of
from benchmarks.shapes import TOKENS, Matrix
from benchmarks.timing import Case, Peer, Run, sample_cuda
from dsv3rt import ops
from dsv3rt.ops import AdamWHyper, AdamWSlot
from dsv3rt.ops.cuda.extension import load
from dsv3rt.train.average import Average

Versus = Callable[..., dict[str, Any]]

VOCAB, DIM = 129280, 7168
LOGITS = (Matrix(TOKENS, VOCAB), Matrix(4 * TOKENS, VOCAB))
SHAPES: list[tuple[int, ...]] = [
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (256, 7168), *[(4096, 7168), (7168, 2048)] * 9,
    *[(7168,)] * 3, (1536,), (512,),
]  # fmt: skip
ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES)
LIST = f"{len(SHAPES)}tensors_{ELEMENTS / 1e6:.0f}M"
LARGEST = [(7168, 16384)]
HYPER = AdamWHyper(lr=2.2e-4)
# AdamW: FP32 gradients, a BF16 copy of the weights.


def make_slots(
    moment: torch.dtype, seed: int | None = None, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[AdamWSlot]:
    slots = []
    for shape in shapes:
        moments = [torch.zeros(shape, dtype=moment, device="cuda") for _ in range(2)]
        grad, param = torch.randn(shape, device="cuda") * 1e-3, torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        slots.append(AdamWSlot(torch.randn(shape, device="cuda"), grad, moments[0], moments[1], param, seed))
    return slots


def adamw_by_torch(slots: list[AdamWSlot], scale: Tensor) -> Run:
    """The same update as elementwise ops on lists."""

    def run() -> None:
        for slot in slots:
            g = slot.grad * scale
            m = slot.m.float() * HYPER.beta1 + g * (1 - HYPER.beta1)
            v = slot.v.float() * HYPER.beta2 + g * g * (1 - HYPER.beta2)
            update = m * (-HYPER.lr / 0.5) / (v.sqrt() * 2.0 + HYPER.eps)
            slot.master.mul_(1 - HYPER.lr * HYPER.weight_decay).add_(update)
            for target, source in ((slot.m, m), (slot.v, v), (slot.param, slot.master)):
                if target is not None:
                    target.copy_(source)

    return run


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("moment", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bench_adamw_step(versus: Versus, copy_peer: Peer, moment: torch.dtype, rounding: str) -> None:
    if rounding == "stochastic" and moment == torch.float32:
        pytest.skip("FP32 moments are not rounded")
    slots, scale = make_slots(moment, seed=1 if rounding == "stochastic" else None), torch.ones((), device="cuda")
    name = f"adamw_step, {str(moment).removeprefix('torch.')} moments rounded to {rounding}"
    work = ELEMENTS * (4 + 4 + 4 + 4 * moment.itemsize + 2)
    ours = lambda: ops.adamw_step(slots, hyper=HYPER, step=2, grad_scale=scale)  # noqa: E731
    versus(Case(name, LIST, "gbps", work), ours, copy_peer)


@pytest.mark.parametrize("peer", CHAINS)
def test_bench_adamw_step_beside_torch(versus: Versus, peer: str) -> None:
    shapes, name = (SHAPES, LIST) if peer == "torch_eager" else (LARGEST, str(Matrix(*LARGEST[0])))
    slots, scale = make_slots(torch.bfloat16, shapes=shapes), torch.ones((), device="cuda")
    ours = lambda: ops.adamw_step(slots, hyper=HYPER, step=2, grad_scale=scale)  # noqa: E731
    versus(
        Case("adamw_step, bfloat16 moments", name, "us"), ours, Peer(peer, chain_of(peer, adamw_by_torch(slots, scale)))
    )


def test_bench_adamw_step_beside_fused_adamw(versus: Versus) -> None:
    """Torch's fused kernel has FP32 moments and writes no BF16 copy; a copy of the list follows it."""
    slots, scale = make_slots(torch.float32), torch.ones((), device="cuda")
    masters = [torch.nn.Parameter(slot.master) for slot in slots]
    for master, slot in zip(masters, slots, strict=True):
        master.grad = slot.grad
    optimizer = torch.optim.AdamW(masters, lr=HYPER.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    params = [slot.param for slot in slots if slot.param is not None]

    def theirs() -> None:
        optimizer.step()
        torch._foreach_copy_(params, [master.detach() for master in masters])

    ours = lambda: ops.adamw_step(slots, hyper=HYPER, step=2, grad_scale=scale)  # noqa: E731
    versus(Case("adamw_step, float32 moments", LIST, "us"), ours, Peer("torch_fused", theirs))


# AdamW that writes FP8 in both orientations instead of the copy: the matrices of the list.

MATRICES = [shape for shape in SHAPES if len(shape) == 2]
WEIGHTS = sum(torch.Size(shape).numel() for shape in MATRICES)
WEIGHT_LIST = f"{len(MATRICES)}matrices_{WEIGHTS / 1e6:.0f}M"


def with_casts(slots: list[AdamWSlot]) -> list[AdamWSlot]:
    casts = [ops.quantize_128x128(slot.master, with_transpose=True) for slot in slots]
    return [replace(slot, param=None, cast=cast) for slot, cast in zip(slots, casts, strict=True)]


@pytest.mark.parametrize("moment", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bench_adamw_step_with_casts(versus: Versus, copy_peer: Peer, moment: torch.dtype) -> None:
    slots, scale = with_casts(make_slots(moment, shapes=MATRICES)), torch.ones((), device="cuda")
    name = f"adamw_step with FP8 casts, {str(moment).removeprefix('torch.')} moments"
    work = WEIGHTS * (4 + 4 + 4 + 4 * moment.itemsize + 2)  # scales are one number in 16384
    ours = lambda: ops.adamw_step(slots, hyper=HYPER, step=2, grad_scale=scale)  # noqa: E731
    versus(Case(name, WEIGHT_LIST, "gbps", work), ours, copy_peer)


def test_bench_adamw_step_with_casts_beside_two_passes(versus: Versus) -> None:
    plain, scale = make_slots(torch.bfloat16, shapes=MATRICES), torch.ones((), device="cuda")
    slots = with_casts(make_slots(torch.bfloat16, shapes=MATRICES))

    def theirs() -> None:
        ops.adamw_step(plain, hyper=HYPER, step=2, grad_scale=scale)
        for slot in plain:
            assert slot.param is not None
            ops.quantize_128x128(slot.param, with_transpose=True)

    ours = lambda: ops.adamw_step(slots, hyper=HYPER, step=2, grad_scale=scale)  # noqa: E731
    case = Case("adamw_step with FP8 casts, bfloat16 moments", WEIGHT_LIST, "us")
    versus(case, ours, Peer("adamw_then_quantize", theirs))


def test_bench_products_beside_average(versus: Versus) -> None:
    """A step's products while the average of 67 million weights comes to the host, and without it: 330 GFLOP for every
    million weights, as a step on 55000 tokens has."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    average = Average({"w": torch.randn(2**26, device="cuda")}, decay=0.999)

    def products() -> None:
        for _ in range(20):
            torch.mm(a, b)

    def beside() -> None:
        average.update(1)
        products()

    versus(Case("products beside the average", "67M", "us"), beside, Peer("alone", products), reps=15)
    average.wait()


# The norm of all gradients.


def total_norm(grads: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def test_bench_grad_norms(versus: Versus, copy_peer: Peer) -> None:
    grads = [torch.randn(shape, device="cuda") for shape in SHAPES]
    versus(Case("grad_norms", LIST, "gbps", 4 * ELEMENTS), lambda: ops.grad_norms(grads), copy_peer)


@pytest.mark.parametrize("peer", CHAINS)
def test_bench_grad_norm_beside_torch(versus: Versus, peer: str) -> None:
    grads = [torch.randn(shape, device="cuda") for shape in SHAPES]
    ours = lambda: torch.linalg.vector_norm(ops.grad_norms(grads))  # noqa: E731
    versus(Case("norm of all gradients", LIST, "us"), ours, Peer(peer, chain_of(peer, total_norm, grads)))


# The loss: what lies between the products, then all of it.


def softmax_loss(logits: Tensor, labels: Tensor) -> Run:
    factor, losses = torch.ones((), device="cuda"), torch.empty(len(labels), device="cuda")
    dlogits = torch.empty(logits.shape, dtype=torch.bfloat16, device="cuda")
    return lambda: load().softmax_loss(logits, labels, factor, losses, dlogits=dlogits)


@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_bench_softmax_loss(versus: Versus, copy_peer: Peer, shape: Matrix) -> None:
    logits = torch.randn((shape.rows, shape.columns), device="cuda")
    labels = torch.randint(shape.columns, (shape.rows,), device="cuda")
    work = shape.rows * shape.columns * (4 + 2)
    versus(Case("softmax_loss with gradients", str(shape), "gbps", work), softmax_loss(logits, labels), copy_peer)


@pytest.mark.parametrize("peer", CHAINS)
@pytest.mark.parametrize("shape", LOGITS[:1], ids=str)
def test_bench_softmax_loss_beside_torch(versus: Versus, shape: Matrix, peer: str) -> None:
    logits = torch.randn((shape.rows, shape.columns), device="cuda", requires_grad=True)
    labels = torch.randint(shape.columns, (shape.rows,), device="cuda")

    def theirs() -> Tensor:
        return torch.autograd.grad(losses_of(logits, labels), logits)[0].bfloat16()

    losses_of = torch.compile(cross_entropy) if peer == "torch_compile" else cross_entropy
    ours = softmax_loss(logits.detach(), labels)
    versus(Case("softmax_loss with gradients", str(shape), "us"), ours, Peer(peer, theirs))


HEADS = [(TOKENS, "torch_eager"), (4 * TOKENS, "torch_eager"), (TOKENS, "torch_compile")]


def head(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn((tokens, DIM), device="cuda").bfloat16().requires_grad_()
    w = (torch.randn((VOCAB, DIM), device="cuda") / DIM**0.5).bfloat16().requires_grad_()
    return h, w, torch.randint(VOCAB, (tokens,), device="cuda")


def plain_loss(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((h @ w.t()).float(), labels)


@pytest.mark.parametrize(("tokens", "peer"), HEADS)
def test_bench_linear_cross_entropy(versus: Versus, tokens: int, peer: str) -> None:
    h, w, labels = head(tokens)
    plain = torch.compile(plain_loss) if peer == "torch_compile" else plain_loss
    case = Case("linear_cross_entropy with gradients", f"{tokens}x{VOCAB}x{DIM}", "tflops", 6.0 * tokens * VOCAB * DIM)
    versus(
        case,
        lambda: torch.autograd.grad(ops.linear_cross_entropy(h, w, labels), (h, w)),
        Peer(peer, lambda: torch.autograd.grad(plain(h, w, labels), (h, w))),
        reps=9,
    )


@pytest.mark.parametrize(("tokens", "peer"), HEADS)
def test_bench_memory_of_linear_cross_entropy(
    request: pytest.FixtureRequest, benchmark: Any, tokens: int, peer: str
) -> None:
    """Peak beside the inputs and the weight gradient."""
    h, w, labels = head(tokens)
    plain = torch.compile(plain_loss) if peer == "torch_compile" else plain_loss

    def peak_mb(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(loss(h, w, labels), (h, w))
        return (torch.cuda.max_memory_allocated() - before - 2 * w.numel()) / 1e6

    ours, theirs = peak_mb(ops.linear_cross_entropy), peak_mb(plain)
    samples = sample_cuda(lambda: torch.autograd.grad(ops.linear_cross_entropy(h, w, labels), (h, w)), warmup=1, reps=3)
    figures = {"metric": "mb", "value": round(ours, 1), "peer": peer, "peer_value": round(theirs, 1)}
    names = {"op": "linear_cross_entropy, peak memory", "shape": f"{tokens}x{VOCAB}x{DIM}"}
    record(request, benchmark, samples, {**names, **figures, "ratio": round(theirs / ours, 4)})
