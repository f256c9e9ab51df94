"""linear_cross_entropy, against torch's cross entropy in FP64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3rt import ops
from dsv3rt.ops.reference import loss as reference

FP32_CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # FP32 sums of about 30 terms


def oracle(h: Tensor, w: Tensor, labels: Tensor, z_loss: float = 0.0, ignore_index: int = -100) -> Tensor:
    kept = labels != ignore_index
    logits = h[kept] @ w.t()
    return cross_entropy(logits, labels[kept]) + z_loss * torch.logsumexp(logits, 1).square().mean()


def problem(T: int, V: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (torch.randn(n, D, dtype=torch.float64).to(dtype).requires_grad_() for n in (T, V))
    labels = torch.randint(V, (T,))
    labels[::3] = -100
    return h, w, labels


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
def test_linear_cross_entropy_matches_fp64(z_loss: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", chunk * 30)
    h, w, labels = problem(11, 30, 8)
    loss = ops.linear_cross_entropy(h, w, labels, z_loss=z_loss)
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = oracle(h64, w64, labels, z_loss)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss.double(), expected, **FP32_CLOSE)
    got = torch.autograd.grad(loss * 3, (h, w))
    want = torch.autograd.grad(expected * 3, (h64, w64))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, **FP32_CLOSE)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_linear_cross_entropy_passes_gradcheck(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 2 * 5)
    h, w, labels = problem(5, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: ops.linear_cross_entropy(h, w, labels, z_loss=z_loss), (h, w))


def test_linear_cross_entropy_takes_another_ignore_index() -> None:
    h, w, labels = problem(6, 7, 4)
    labels = torch.where(labels == -100, 2, labels)
    got = ops.linear_cross_entropy(h, w, labels, ignore_index=2)
    torch.testing.assert_close(got, oracle(h, w, labels, ignore_index=2), **FP32_CLOSE)


@pytest.mark.parametrize("T", [0, 4])
def test_linear_cross_entropy_is_zero_when_all_is_ignored(T: int) -> None:
    h, w, _ = problem(T, 7, 4)
    loss = ops.linear_cross_entropy(h, w, torch.full((T,), -100), z_loss=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert h.grad is not None
    assert w.grad is not None
    assert h.grad.eq(0).all()
    assert w.grad.eq(0).all()


def test_linear_cross_entropy_ignores_bad_numbers_of_ignored_tokens() -> None:
    h, w, labels = problem(6, 7, 4)
    with torch.no_grad():
        h[0] = float("nan")
    loss = ops.linear_cross_entropy(h, w, labels)
    assert loss.isfinite()
    assert ops.linear_cross_entropy(h[1:], w, labels[1:]).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1e4])
def test_linear_cross_entropy_takes_extreme_logits(size: float) -> None:
    h, w, labels = problem(6, 7, 4)
    loss = ops.linear_cross_entropy(h * size, w, labels)
    torch.testing.assert_close(loss.double(), oracle((h * size).double(), w.double(), labels), rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_computes_bf16_in_fp32() -> None:
    h, w, labels = problem(6, 7, 4, torch.bfloat16)
    loss = ops.linear_cross_entropy(h, w, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle(h.double(), w.double(), labels), **FP32_CLOSE)
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    assert (h.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16)


class Watch(TorchDispatchMode):
    """Notes the largest result of any torch op run inside, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        leaves: Iterable[Any] = tree_leaves(result)
        self.numel = max([self.numel, *(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))])
        return result


class Results(TorchDispatchMode):
    """Notes how many results the registered op gave, each time: the loss and the gradients that were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.dsv3rt.linear_cross_entropy.default:
            self.counts.append(len(result))
        return result


def test_linear_cross_entropy_never_holds_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 4 * 50)
    h, w, labels = problem(64, 50, 3)
    with torch.no_grad(), Watch() as watch:
        reference.linear_cross_entropy(h, w, labels, -100, 0.0, with_dh=True, with_dw=True)
    assert watch.numel == 4 * 50  # all logits would be 64 * 50
    assert watch.products == 16 * 3


def test_linear_cross_entropy_takes_no_gradients_under_no_grad() -> None:
    h, w, labels = problem(6, 7, 4)
    with torch.no_grad(), Results() as results:
        loss = ops.linear_cross_entropy(h, w, labels)
    assert results.counts == [1]
    assert not loss.requires_grad
    with Results() as results:
        assert loss.item() == ops.linear_cross_entropy(h, w, labels).item()
        ops.linear_cross_entropy(h, w.detach(), labels)
    assert results.counts == [3, 2]
    with torch.no_grad(), Watch() as watch:
        reference.linear_cross_entropy(h, w, labels, -100, 0.0, with_dh=False, with_dw=False)
    assert watch.products == 1


def test_linear_cross_entropy_may_be_differentiated_twice_over() -> None:
    h, w, labels = problem(6, 7, 4)
    loss = ops.linear_cross_entropy(h, w, labels)
    loss.backward(retain_graph=True)
    once = h.grad.clone() if h.grad is not None else None
    loss.backward()
    assert h.grad is not None
    assert once is not None
    torch.testing.assert_close(h.grad, 2 * once)


def test_linear_cross_entropy_scales_its_gradients_in_place_only_where_the_graph_goes() -> None:
    h, w, labels = problem(6, 7, 4)
    loss = ops.linear_cross_entropy(h, w, labels)
    kept = torch.autograd.grad(loss, (h, w), torch.tensor(0.5), retain_graph=True)
    used = torch.autograd.grad(loss, (h, w), torch.tensor(0.5))
    for a, b in zip(kept, used, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_linear_cross_entropy_rejects_bad_arguments() -> None:
    h, w, labels = torch.randn(4, 3), torch.randn(7, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: w_VD must have shape \(\*, 3\), got \(7, 2\)$"):
        ops.linear_cross_entropy(h, w[:, :2], labels)
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: labels_T must have shape \(4,\), got \(3,\)$"):
        ops.linear_cross_entropy(h, w, labels[1:])
    with pytest.raises(TypeError, match=r"^linear_cross_entropy: labels_T must be int64, got int32$"):
        ops.linear_cross_entropy(h, w, labels.int())
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: labels_T must be in 0..6 or -100, got \[7\]$"):
        ops.linear_cross_entropy(h, w, labels + 7)
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: z_loss must not be negative, got -1.0$"):
        ops.linear_cross_entropy(h, w, labels, z_loss=-1.0)
