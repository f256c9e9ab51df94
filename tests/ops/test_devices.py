"""Every op that has no kernel runs its reference on CUDA tensors, forward and backward, as on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv3rt import ops

pytestmark = pytest.mark.gpu

Case = Callable[[str], list[Tensor]]  # the results on a device, from the same random numbers


def draw(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()


def int32(device: str, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def with_gradients(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    total = torch.stack([result.double().sin().sum() for result in results if result.requires_grad]).sum()
    return [*results, *torch.autograd.grad(total, inputs)]


def norms(device: str) -> list[Tensor]:
    x, weight, cos, sin = draw(device, 5, 8), draw(device, 8), draw(device, 5, 4), draw(device, 5, 4)
    results = [ops.rms_norm(x, weight, 1e-6), ops.rope(x, cos.detach(), sin.detach()), ops.swiglu(x, x * 2)]
    return with_gradients(results, [x, weight])


def attention(device: str) -> list[Tensor]:
    inputs = [draw(device, *shape) for shape in [(150, 2, 6), (150, 2, 4), (150, 2), (150, 2, 3)]]
    results: list[Tensor] = []
    for ends in ([0, 75, 150], [0, 3, 150]):
        results += ops.mla_prefill(*inputs[:4], int32(device, ends), scale=0.5)  # type: ignore[misc]
    return with_gradients(results, inputs)


def decoding(device: str) -> list[Tensor]:
    q, cache = draw(device, 2, 2, 3, 10), draw(device, 4, 64, 10)
    table = int32(device, [2, 1, 0, 3]).view(2, 2)
    return list(ops.mla_decode(q.detach(), cache.detach(), table, int32(device, [70, 9]), scale=0.3, latent_dim=8))


def experts(device: str) -> list[Tensor]:
    x, gate, w = draw(device, 11, 4), draw(device, 6, 4), draw(device, 6, 4, 4)
    bias = torch.zeros(6, dtype=torch.float64, device=device)
    routing = ops.route(x @ gate.t(), bias, top_k=2, num_groups=3, groups_kept=2)
    rows, layout, permutation = ops.permute(x, routing, num_experts=6, block=4)
    y = ops.unpermute(ops.grouped_gemm_nt(rows, w, layout), permutation, routing.weight_TK)
    balance = ops.balance_loss(routing.scores_TE, routing.idx_TK, int32(device, [0, 5, 11]), alpha=1.0)
    bias = ops.update_bias(bias, routing.counts_E, gamma=0.1)
    placed = [permutation.row_of_TK, layout.offsets, layout.counts_X]
    return [bias, *placed, *with_gradients([y, balance], [x, gate, w])]


def head(device: str) -> list[Tensor]:
    h, w = draw(device, 9, 4), draw(device, 7, 4)
    labels = torch.tensor([0, 1, 2, -100, 4, 5, 6, 0, -100], device=device)
    return with_gradients([ops.linear_cross_entropy(h, w, labels, z_loss=0.1)], [h, w])


def fp8(device: str) -> list[Tensor]:
    w = ops.quantize_128x128(draw(device, 130, 144).detach().float())
    return [w.data, w.scale, ops.dequantize(w)]


@pytest.mark.parametrize("case", [norms, attention, decoding, experts, head, fp8])
def test_reference_runs_alike_on_cuda(case: Case) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        results.append(case(device))
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert on_cuda.device.type == "cuda"
        # FP64 sums in another order.
        close = {"rtol": 1e-9, "atol": 1e-11} if on_cpu.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(on_cuda.cpu().double(), on_cpu.double(), **close)


@pytest.mark.parametrize("case", [norms, attention, experts, head])
def test_reference_is_deterministic_on_cuda(case: Case) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(case("cuda"))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
