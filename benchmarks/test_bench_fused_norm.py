"""RMSNorm with its casts, rotation and the embedding's gradient: the copy bandwidth, and the chains they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import copy_of, peer_of, with_chains
from benchmarks.shapes import NORMS, TOKENS, Matrix
from benchmarks.timing import Case, Peer
from dsv3rt import ops

Versus = Callable[..., dict[str, Any]]

EPS = 1e-6
STREAMS = NORMS[:2]  # of the model's width
# The chains are timed where they matter, over the residual stream.
STREAM_CASES = with_chains(STREAMS)
CASES = [*STREAM_CASES, *((shape, "copy") for shape in NORMS[2:])]
TOKEN_CASES = with_chains([TOKENS, 4 * TOKENS])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    normed, grad = x.float() * rstd[:, None], dy.float() * weight.float()
    dx = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * rstd[:, None]
    return (dx + residual.float()).bfloat16(), (dy.float() * normed).sum(0)


def cast(tiles: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    wide = tiles.float()
    scale = wide.abs().amax(dim, keepdim=True).clamp(min=2.0**-100) / 448
    return (wide / scale).to(torch.float8_e4m3fn), scale


def norm_cast(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
    total = x + residual
    return [total, *cast(norm(total, weight).unflatten(1, (-1, 128)), 2)]


def norm_cast_both(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
    total = x + residual
    y = norm(total, weight)
    codes_t, scale_t = cast(y.unflatten(0, (-1, 128)), 1)
    return [total, *cast(y.unflatten(1, (-1, 128)), 2), codes_t.flatten(0, 1).t().contiguous(), scale_t]


def turn(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    even, odd = q.float().unflatten(-1, (-1, 2)).unbind(-1)
    q.copy_(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2))


@pytest.mark.parametrize(("shape", "peer"), CASES, ids=str)
def test_bench_rms_norm(versus: Versus, copy_peer: Peer, shape: Matrix, peer: str) -> None:
    x, weight = random(shape.rows, shape.columns), random(shape.columns)
    case = Case("rms_norm", str(shape), "gbps", 2 * shape.bf16_bytes)
    versus(case, lambda: ops.rms_norm(x, weight, EPS), peer_of(peer, copy_peer, norm, x, weight))


@pytest.mark.parametrize(("shape", "peer"), CASES, ids=str)
def test_bench_rms_norm_backward(versus: Versus, copy_peer: Peer, shape: Matrix, peer: str) -> None:
    x, dy, residual = (random(shape.rows, shape.columns) for _ in range(3))
    weight = random(shape.columns)
    rstd = torch.rand(shape.rows, device="cuda") + 0.5
    case = Case("rms_norm_backward and residual", str(shape), "gbps", 4 * shape.bf16_bytes)
    versus(
        case,
        lambda: ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=residual),
        peer_of(peer, copy_peer, norm_backward, dy, x, weight, rstd, residual),
    )


@pytest.mark.parametrize("with_transpose", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_bench_rms_norm_quantize(versus: Versus, copy_peer: Peer, shape: Matrix, with_transpose: bool) -> None:
    x, weight = random(shape.rows, shape.columns), random(shape.columns)
    name = f"rms_norm_quantize_1x128{' and transpose' if with_transpose else ''}"
    versus(
        Case(name, str(shape), "gbps", shape.quantize_bytes(with_transpose=with_transpose)),
        lambda: ops.rms_norm_quantize_1x128(x, weight, EPS, with_transpose=with_transpose),
        copy_peer,
    )


@pytest.mark.parametrize("with_transpose", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize(("shape", "peer"), STREAM_CASES, ids=str)
def test_bench_rms_norm_quantize_of_a_sum(
    versus: Versus, copy_peer: Peer, shape: Matrix, peer: str, with_transpose: bool
) -> None:
    x, residual = (random(shape.rows, shape.columns) for _ in range(2))
    weight = random(shape.columns)
    name = f"rms_norm_quantize_1x128 of a sum{', and transpose' if with_transpose else ''}"
    work = 2 * shape.bf16_bytes + shape.quantize_bytes(with_transpose=with_transpose)
    versus(
        Case(name, str(shape), "gbps", work),
        lambda: ops.rms_norm_quantize_1x128(x, weight, EPS, residual_TD=residual, with_transpose=with_transpose),
        peer_of(peer, copy_peer, norm_cast_both if with_transpose else norm_cast, x, weight, residual),
    )


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("tokens", "peer"), TOKEN_CASES)
def test_bench_rope_in_place(versus: Versus, copy_peer: Peer, tokens: int, peer: str, inverse: bool) -> None:
    """The 64 rope columns of 128 heads of 192, where they lie. Gradients are turned back: the sine's sign changes."""
    q = random(tokens, 128, 192)[..., 128:]
    cos, sin = torch.rand(tokens, 32, device="cuda"), torch.rand(tokens, 32, device="cuda")
    of_chain = cos[:, None], (-sin if inverse else sin)[:, None]
    versus(
        Case("rope_, backward" if inverse else "rope_", f"{tokens}x128heads_64of192", "gbps", rope_bytes(q, cos)),
        lambda: ops.rope_(q, cos, sin, inverse=inverse),
        peer_of(peer, copy_peer, turn, q, *of_chain),
    )


def rope_bytes(x: Tensor, cos: Tensor) -> int:
    """Numbers in BF16 read and written, and both tables in FP32."""
    return 2 * 2 * x.numel() + 2 * 4 * cos.numel()


@pytest.mark.parametrize(("tokens", "peer"), TOKEN_CASES)
def test_bench_rope_in_place_of_the_shared_key(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    """The last 64 columns of the 2112 of both latents."""
    k_rope = random(tokens, 2112)[:, 2048:]
    cos, sin = torch.rand(tokens, 32, device="cuda"), torch.rand(tokens, 32, device="cuda")
    versus(
        Case("rope_ of the shared key", f"{tokens}x64of2112", "gbps", rope_bytes(k_rope, cos)),
        lambda: ops.rope_(k_rope, cos, sin),
        peer_of(peer, copy_peer, turn, k_rope, cos, sin),
    )


@pytest.mark.parametrize(("tokens", "peer"), TOKEN_CASES)
def test_bench_embedding_backward(versus: Versus, copy_peer: Peer, tokens: int, peer: str) -> None:
    """Frequencies as Zipf's law has them; the table's gradient is written once, zeros included."""
    vocab, dim = 129280, 7168
    ids = torch.multinomial(1 / torch.arange(1, vocab + 1, device="cuda"), tokens, replacement=True)
    dy = random(tokens, dim)

    def chain(dy: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(dy, ids, vocab, -1, False)

    versus(
        Case("embedding_backward", f"{tokens}x{dim}_of{vocab}", "gbps", 2 * dim * (vocab + tokens)),
        lambda: torch.ops.dsv3rt.embedding_backward(dy, ids, vocab),
        peer_of(peer, copy_peer, chain, dy, ids),
    )


@pytest.mark.parametrize("shape", STREAMS, ids=str)
@pytest.mark.parametrize("kind", ["rms_norm", "rows", "both", "backward"])
def test_bench_norms_beside_a_copy_of_their_size(versus: Versus, shape: Matrix, kind: str) -> None:
    x, dy, residual = (random(shape.rows, shape.columns) for _ in range(3))
    weight, rstd = random(shape.columns), torch.rand(shape.rows, device="cuda") + 0.5

    def cast_by(*, with_transpose: bool) -> object:
        return ops.rms_norm_quantize_1x128(x, weight, EPS, with_transpose=with_transpose)

    name, work, run = {
        "rms_norm": ("rms_norm", 2 * shape.bf16_bytes, lambda: ops.rms_norm(x, weight, EPS)),
        "rows": ("rms_norm_quantize_1x128", shape.quantize_bytes(), lambda: cast_by(with_transpose=False)),
        "both": (
            "rms_norm_quantize_1x128 and transpose",
            shape.quantize_bytes(with_transpose=True),
            lambda: cast_by(with_transpose=True),
        ),
        "backward": (
            "rms_norm_backward and residual",
            4 * shape.bf16_bytes,
            lambda: ops.rms_norm_backward(dy, x, weight, rstd, grad_residual_TD=residual),
        ),
    }[kind]
    versus(Case(name, str(shape), "gbps", work), run, copy_of(work))
