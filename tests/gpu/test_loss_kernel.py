"""linear_cross_entropy on the GPU against FP64, and the softmax kernel by itself against torch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsv3rt import ops
from dsv3rt.ops.cuda import loss as cuda_loss
from tests.gpu.quant_cases import Guarded

pytestmark = pytest.mark.gpu

IGNORED = -100
VOCABS = [1, 7, 8, 1000, 4097, 32768, 32769, 65537, 129280, 131073, 200003, 262144]  # every instance, and odd ones


def random_labels(T: int, V: int, ignored: float = 0.3) -> Tensor:
    labels = torch.randint(V, (T,), device="cuda")
    return torch.where(torch.rand(T, device="cuda") < ignored, IGNORED, labels)


def oracle(logits: Tensor, labels: Tensor, factor: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """Losses of tokens and factor times their gradients, FP64."""
    logits = logits.double()
    kept = labels != IGNORED
    lse = torch.logsumexp(logits, dim=1)
    target = torch.where(kept, labels, 0)
    losses = lse - logits.gather(1, target[:, None]).squeeze(1) + z_loss * lse.square()
    dlogits = (logits - lse[:, None]).exp() * (1 + 2 * z_loss * lse)[:, None]
    dlogits[torch.arange(len(labels)), target] -= 1
    return losses.where(kept, 0.0), (dlogits * factor).where(kept[:, None], 0.0)


def run(logits: Tensor, labels: Tensor, factor: float, z_loss: float, guard: Guarded) -> tuple[Tensor, Tensor]:
    """Into poisoned outputs with nothing to spare; a row of dlogits ends in a pad that must stay as it is."""
    extension = pytest.importorskip("dsv3rt._C")
    T, V = logits.shape
    width = -(-V // 8) * 8
    losses = guard.floats(T)
    dlogits = guard.floats(T * width // 2).view(torch.bfloat16).view(T, width).fill_(torch.nan)
    factor_tensor = torch.tensor(factor, device="cuda")
    arguments = {"ignore_index": IGNORED, "z_loss": z_loss}
    extension.softmax_loss(logits, labels, factor_tensor, losses, dlogits=dlogits[:, :V], **arguments)
    alone = torch.full_like(losses, torch.nan)
    extension.softmax_loss(logits, labels, factor_tensor, alone, **arguments)
    torch.testing.assert_close(alone, losses, rtol=0, atol=0, equal_nan=True)
    assert dlogits[:, V:].isnan().all()
    return losses, dlogits[:, :V]


def random_logits(T: int, V: int, size: float) -> Tensor:
    """Rows that start on 16 bytes and are followed by NaN."""
    room = torch.full((T, -(-V // 8) * 8), torch.nan, device="cuda")
    room[:, :V] = torch.randn(T, V, device="cuda") * size
    return room[:, :V]


def assert_softmax_matches_fp64(labels: Tensor, V: int, size: float, z_loss: float, factor: float) -> None:
    logits, guard = random_logits(len(labels), V, size), Guarded()
    losses, dlogits = run(logits, labels, factor, z_loss, guard)
    guard.assert_intact()
    expected, gradients = oracle(logits, labels, factor, z_loss)
    # The difference of two logits is rounded (2^-24 of it), log2(e) times it again, 2 ulp of the power, and 40
    # roundings in the sum: under 2^-18 for differences up to 100, and 2^-22 of the logits themselves.
    torch.testing.assert_close(losses.double(), expected, rtol=2**-18, atol=2**-18 + 2**-22 * size)
    # One BF16 rounding. A likely label's gradient is the difference of two numbers near factor: its error is of those.
    torch.testing.assert_close(dlogits.double(), gradients, rtol=2**-8 + 2**-16, atol=2**-18 * factor)


@pytest.mark.parametrize("V", VOCABS)
@pytest.mark.parametrize(("size", "z_loss"), [(1.0, 0.0), (8.0, 1e-3), (1e4, 0.0)])
def test_softmax_loss_matches_fp64(V: int, size: float, z_loss: float) -> None:
    labels = random_labels(40, V)
    labels[0] = V - 1
    assert_softmax_matches_fp64(labels, V, size, z_loss, factor=1 / 29)


@pytest.mark.parametrize("seed", range(3))
def test_softmax_loss_matches_fp64_at_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        V = rng.choice([rng.randint(1, 262144), int(262144 ** rng.random())])
        T = rng.randint(1, max(1, min(5000, (1 << 22) // V)))
        ignored, factor = rng.choice([0.0, 0.3, 0.9, 1.0]), rng.choice([1.0, 1 / T])
        size, z_loss = rng.choice([(0.1, 1e-3), (2.0, 0.0), (2.0, 1e-4), (8.0, 1e-3), (50.0, 0.0), (1e4, 0.0)])
        print(T, V, ignored, size, z_loss)
        assert_softmax_matches_fp64(random_labels(T, V, ignored), V, size, z_loss, factor)


def test_softmax_loss_is_repeatable() -> None:
    logits, labels = random_logits(300, 129280, 3.0), random_labels(300, 129280)
    results = [run(logits, labels, 0.5, 1e-4, Guarded()) for _ in range(3)]
    for losses, dlogits in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(dlogits, results[0][1])


def test_softmax_loss_does_not_read_ignored_rows_and_shows_bad_ones() -> None:
    logits, labels = random_logits(6, 5001, 1.0), torch.tensor([IGNORED, 5, 6, 7, 5001, -3], device="cuda")
    logits[0] = torch.nan
    logits[2, 4000] = torch.nan
    logits[3, 100] = torch.inf
    losses, dlogits = run(logits, labels, 1.0, 0.0, Guarded())
    assert losses[0] == 0
    assert dlogits[0].eq(0).all()
    assert losses[1].isfinite()
    assert not losses[2:].isfinite().any()  # NaN, infinity, and labels outside the vocabulary
    assert dlogits[2].isnan().all()


def test_softmax_loss_takes_minus_infinity_for_what_cannot_be() -> None:
    logits, labels = random_logits(3, 40000, 1.0), torch.tensor([1, 39999, 3], device="cuda")
    logits[0, 8:] = -torch.inf
    logits[1, :39992] = -torch.inf
    losses, dlogits = run(logits, labels, 1.0, 0.0, Guarded())
    expected, gradients = oracle(logits, labels, 1.0, 0.0)
    torch.testing.assert_close(losses.double(), expected, rtol=2**-18, atol=2**-18)
    torch.testing.assert_close(dlogits.double(), gradients, rtol=2**-8 + 2**-16, atol=2**-18)


def test_softmax_loss_handles_no_tokens() -> None:
    extension = pytest.importorskip("dsv3rt._C")
    empty = torch.empty((0, 100), device="cuda")
    extension.softmax_loss(empty, random_labels(0, 9), torch.ones((), device="cuda"), torch.empty(0, device="cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x: (x.bfloat16(), x), "logits must be float32, got bfloat16"),
        (lambda x: (x.cpu(), x), "logits must be a CUDA array"),
        (lambda x: (x[:, 1:], x), "logits must be aligned to 16 bytes"),
        (lambda x: (x.t(), x), "logits must have strides"),
        (lambda x: (x, x), "labels must be int64, got float32"),
        (lambda x: (x[:, :0], x), "logits must have 1 to 262144 columns, got 0"),
    ],
)
def test_softmax_loss_rejects_bad_arrays(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    extension = pytest.importorskip("dsv3rt._C")
    x = torch.randn((8, 16), device="cuda")
    with pytest.raises((ValueError, TypeError), match="softmax_loss: " + message):
        extension.softmax_loss(*arguments(x), torch.ones((), device="cuda"), torch.empty(8, device="cuda"))


def problem(T: int, V: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(T, D, device="cuda").bfloat16().requires_grad_()
    w = (torch.randn(V, D, device="cuda") * 2 / D**0.5).bfloat16().requires_grad_()
    return h, w, random_labels(T, V)


def assert_close_to_fp64(h: Tensor, w: Tensor, labels: Tensor, z_loss: float) -> None:
    loss = ops.linear_cross_entropy(h, w, labels, z_loss=z_loss)
    got = torch.autograd.grad(loss * 3, (h, w))
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    kept = labels != IGNORED
    logits = h64[kept] @ w64.t()
    expected = cross_entropy(logits, labels[kept]) + z_loss * torch.logsumexp(logits, 1).square().mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(got, torch.autograd.grad(expected * 3, (h64, w64)), strict=True):
        assert gradient.dtype == torch.bfloat16
        # BF16 gradients of logits and of the result, each 2^-9 of what it rounds at most: squared and halved, under
        # 2^-17 together.
        assert ops.calc_diff(gradient, wanted) < 2**-16
        assert torch.equal(wanted.abs().amax(dim=1) == 0, gradient.abs().amax(dim=1) == 0) or gradient is got[1]


@pytest.mark.parametrize(("T", "V", "D"), [(1, 1000, 64), (300, 5001, 192), (1111, 32003, 256), (257, 129280, 128)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_linear_cross_entropy_on_cuda_matches_fp64(T: int, V: int, D: int, z_loss: float) -> None:
    h, w, labels = problem(T, V, D)
    labels[0] = V // 2
    assert_close_to_fp64(h, w, labels, z_loss)


@pytest.mark.parametrize("scratch_rows", [3, 200])
def test_linear_cross_entropy_on_cuda_takes_tokens_in_groups(
    scratch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    T, V, D = 1000, 4003, 128
    monkeypatch.setattr(cuda_loss, "DLOGITS_BYTES", 300 * 2 * 4008)
    monkeypatch.setattr(cuda_loss, "SCRATCH_BYTES", scratch_rows * 4 * 4008)
    assert_close_to_fp64(*problem(T, V, D), 1e-3)
    monkeypatch.setattr(cuda_loss, "FEW_ROWS", 8)  # the weight gradient's memory is enough then
    assert_close_to_fp64(*problem(T, V, 512), 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_linear_cross_entropy_on_cuda_matches_fp64_at_random_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens in one to five groups, or more where these are few, and the same bits each time."""
    rng = random.Random(seed)
    for _ in range(12):
        V, D = int(2 * 40000 ** rng.random()), rng.choice([8 * rng.randint(2, 64), rng.randint(16, 300)])
        T = rng.randint(1, min(5000, (1 << 22) // V))
        z_loss, ignored = rng.choice([0.0, 1e-4, 1e-3]), rng.choice([0.0, 0.3, 0.9])
        monkeypatch.setattr(cuda_loss, "DLOGITS_BYTES", 2 * (V + 7) * rng.randint(-(-T // 5), 2 * T))
        monkeypatch.setattr(cuda_loss, "SCRATCH_BYTES", 4 * (max(V, D) + 7) * rng.randint(T // 20 + 1, T + 8))
        monkeypatch.setattr(cuda_loss, "FEW_ROWS", rng.choice([8, 512]))
        print(T, V, D, z_loss, ignored, cuda_loss.DLOGITS_BYTES, cuda_loss.SCRATCH_BYTES, cuda_loss.FEW_ROWS)
        h, w, _ = problem(T, V, D)
        labels = random_labels(T, V, ignored)
        labels[rng.randrange(T)] = rng.randrange(V)
        assert_close_to_fp64(h, w, labels, z_loss)
        assert_repeats(h, w, labels, z_loss, times=3)


def assert_repeats(h: Tensor, w: Tensor, labels: Tensor, z_loss: float, times: int) -> None:
    def run() -> tuple[Tensor, ...]:
        loss = ops.linear_cross_entropy(h, w, labels, z_loss=z_loss)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    first = run()
    for _ in range(times - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_linear_cross_entropy_on_cuda_is_repeatable() -> None:
    assert_repeats(*problem(700, 32001, 256), z_loss=0.0, times=10)
    assert_repeats(*problem(4500, 16001, 512), z_loss=1e-3, times=10)


@pytest.mark.parametrize("T", [0, 5])
def test_linear_cross_entropy_on_cuda_is_zero_when_all_is_ignored(T: int) -> None:
    h, w, _ = problem(T, 1001, 64)
    loss = ops.linear_cross_entropy(h, w, torch.full((T,), IGNORED, device="cuda"), z_loss=1.0)
    dh, dw = torch.autograd.grad(loss, (h, w))
    assert loss.item() == 0.0
    assert dh.shape == h.shape
    assert dh.eq(0).all()
    assert dw.eq(0).all()


def test_linear_cross_entropy_on_cuda_gives_the_gradients_that_are_asked_for() -> None:
    h, w, labels = problem(100, 5003, 128)
    both = torch.autograd.grad(ops.linear_cross_entropy(h, w, labels), (h, w))
    (dh,) = torch.autograd.grad(ops.linear_cross_entropy(h, w.detach(), labels), (h,))
    (dw,) = torch.autograd.grad(ops.linear_cross_entropy(h.detach(), w, labels), (w,))
    assert torch.equal(dh, both[0])
    assert torch.equal(dw, both[1])
    with torch.no_grad():
        loss = ops.linear_cross_entropy(h, w, labels)
    assert torch.equal(loss, ops.linear_cross_entropy(h, w, labels).detach())


def test_linear_cross_entropy_on_cuda_does_not_wait_for_the_device() -> None:
    h, w, labels = problem(64, 5003, 128)
    ops.linear_cross_entropy(h, w, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear_cross_entropy(h, w, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_linear_cross_entropy_on_cuda_needs_little_memory() -> None:
    """4096 tokens of DeepSeek-V3's head, both passes: under 1.2 GB beside the inputs and the weight gradient."""
    T, V, D = 4096, 129280, 7168
    h, w, labels = problem(T, V, D)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_cross_entropy(h, w, labels).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert w.grad is not None
    assert peak - w.grad.numel() * 2 < 1.2e9
    w.grad = None
    torch.cuda.empty_cache()
