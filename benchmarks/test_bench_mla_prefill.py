"""Latent attention for training against cuDNN's attention, which is given the rope key expanded to every head."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.shapes import ATTENTIONS, RAGGED_ATTENTION, Attention
from benchmarks.timing import Case, Peer, time_cuda
from dsv3rt import ops

Versus = Callable[..., dict[str, Any]]
N, R, U = 128, 64, 128
SCALE = (N + R) ** -0.5


def draw(length: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_nope and v are views of one projection, as in the layer."""
    q, kv, k_rope = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in [(length, heads, N + R), (length, heads, N + U), (length, R)]
    )
    k_nope, v = kv.split([N, U], dim=2)
    return q, k_nope, k_rope, v


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], object]:
    def run() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE)

    return run


def better_cudnn(inputs: tuple[Tensor, ...], causal: bool) -> Peer:
    """Keys expanded beforehand and not charged; [batch, heads, tokens, dim] dense or in strides of [batch, tokens, ..],
    whichever is quicker."""
    q, k_nope, k_rope, v = inputs
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)), dim=2)
    tokens_first = [x.contiguous().transpose(0, 1)[None] for x in (q, k, v)]
    heads_first = [x.contiguous() for x in tokens_first]
    runs = [cudnn(*arrays, causal) for arrays in (tokens_first, heads_first)]  # type: ignore[arg-type]
    return Peer("cudnn", min(runs, key=lambda run: time_cuda(run, warmup=2, reps=8)))


def reps_for(shape: Attention) -> int:
    """Long runs vary little and take long."""
    return 30 if shape.length <= 16384 else 6


def backward_of(out: Tensor, leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def better_cudnn_backward(inputs: tuple[Tensor, ...], causal: bool) -> Peer:
    """As `better_cudnn`; the gradient of the expanded key is left expanded."""
    q, k_nope, k_rope, v = inputs
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)), dim=2)
    tokens_first = [x.contiguous().transpose(0, 1)[None] for x in (q, k, v)]
    runs = []
    for arrays in (tokens_first, [x.contiguous() for x in tokens_first]):
        leaves = tuple(x.detach().requires_grad_() for x in arrays)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(*leaves, is_causal=causal, scale=SCALE)
        runs.append(backward_of(out, leaves))
    return Peer("cudnn", min(runs, key=lambda run: time_cuda(run, warmup=2, reps=8)))


@pytest.mark.parametrize(
    ("shape", "causal"), [*product(ATTENTIONS, [True]), *product(ATTENTIONS[:2], [False])], ids=str
)
def test_bench_mla_prefill_backward(versus: Versus, shape: Attention, causal: bool) -> None:
    inputs = draw(shape.length, shape.heads)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    cu = torch.tensor([0, shape.length], dtype=torch.int32, device="cuda")
    out, _ = ops.mla_prefill(*leaves, cu, scale=SCALE, causal=causal)  # type: ignore[misc]
    name = "mla_prefill, backward" if causal else "mla_prefill, all keys, backward"
    case = Case(name, str(shape), "tflops", shape.backward_flops * (1 if causal else 2))
    versus(case, backward_of(out, leaves), better_cudnn_backward(inputs, causal), reps=reps_for(shape))


@pytest.mark.parametrize(("shape", "causal"), [*product(ATTENTIONS, [True]), *product(ATTENTIONS, [False])], ids=str)
def test_bench_mla_prefill(versus: Versus, shape: Attention, causal: bool) -> None:
    inputs = draw(shape.length, shape.heads)
    cu = torch.tensor([0, shape.length], dtype=torch.int32, device="cuda")
    work = shape.forward_flops * (1 if causal else 2)
    case = Case("mla_prefill" if causal else "mla_prefill, all keys", str(shape), "tflops", work)
    peer = better_cudnn(inputs, causal)
    versus(case, lambda: ops.mla_prefill(*inputs, cu, scale=SCALE, causal=causal), peer, reps=reps_for(shape))


def draw_ragged() -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, list[tuple[Tensor, ...]], str]:
    """Inputs of all sequences, where they end, the inputs of each, and the name of the shape."""
    ends = [0]
    for shape in RAGGED_ATTENTION:
        ends.append(ends[-1] + shape.length)
    inputs = draw(ends[-1], RAGGED_ATTENTION[0].heads)
    parts = [tuple(x[first:end] for x in inputs) for first, end in pairwise(ends)]
    lengths = "_".join(str(shape.length) for shape in RAGGED_ATTENTION)
    cu = torch.tensor(ends, dtype=torch.int32, device="cuda")
    return inputs, cu, parts, f"{lengths}tokens_{RAGGED_ATTENTION[0].heads}heads"


def one_by_one(peers: list[Peer]) -> Peer:
    return Peer("cudnn", lambda: [peer.run() for peer in peers])


def test_bench_mla_prefill_ragged(versus: Versus) -> None:
    """The peer takes the sequences one by one."""
    inputs, cu, parts, name = draw_ragged()
    case = Case("mla_prefill, ragged", name, "tflops", sum(shape.forward_flops for shape in RAGGED_ATTENTION))
    peer = one_by_one([better_cudnn(part, causal=True) for part in parts])
    versus(case, lambda: ops.mla_prefill(*inputs, cu, scale=SCALE), peer)


def test_bench_mla_prefill_backward_ragged(versus: Versus) -> None:
    """As the forward pass."""
    inputs, cu, parts, name = draw_ragged()
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    out, _ = ops.mla_prefill(*leaves, cu, scale=SCALE)  # type: ignore[misc]
    work = sum(shape.backward_flops for shape in RAGGED_ATTENTION)
    case = Case("mla_prefill, ragged, backward", name, "tflops", work)
    versus(case, backward_of(out, leaves), one_by_one([better_cudnn_backward(part, causal=True) for part in parts]))
