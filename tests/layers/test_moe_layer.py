"""MoE, feed-forward, norm and embedding modules."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from dsv3rt import presets
from dsv3rt.layers.feed_forward import FeedForward
from dsv3rt.layers.moe import MoE
from dsv3rt.layers.norm import RMSNorm


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module


def make_moe(**changes):
    config = replace(presets.model("tiny"), dim=64, expert_dim=32, **changes)
    return config, fill(MoE(config))


def dense_moe(config, moe, x_TD, routing):
    """Every expert on every token, weighted by its gate (0 where not chosen)."""
    gates_TE = torch.zeros(len(x_TD), config.num_experts).scatter(1, routing.idx_TK, routing.weight_TK)
    y_TD = torch.zeros_like(x_TD) if moe.shared_experts is None else moe.shared_experts(x_TD)
    for e in range(config.num_experts):
        gate, up = (x_TD @ moe.experts.gate_up_proj[e].T).chunk(2, dim=1)
        y_TD = y_TD + gates_TE[:, e, None] * ((functional.silu(gate) * up) @ moe.experts.down_proj[e].T)
    return y_TD


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_moe_and_its_gradients_match_dense_experts(shared):
    config, moe = make_moe(num_shared_experts=shared)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tangent = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    y_TD, routing = moe(x_TD)
    inputs = [x_TD, *moe.parameters()]
    got = torch.autograd.grad(y_TD, inputs, tangent)
    again = moe.route(x_TD)
    dense = dense_moe(config, moe, x_TD, again)
    want = torch.autograd.grad(dense, inputs, tangent)
    torch.testing.assert_close(y_TD, dense, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert (routing.counts_E > 0).all()


def test_moe_handles_experts_without_tokens():
    config, moe = make_moe()
    moe.gate.e_score_correction_bias[:4] = 10.0  # two groups out of four win always
    x_TD = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    y_TD, routing = moe(x_TD)
    y_TD.sum().backward()
    assert routing.counts_E[4:].sum() == 0
    assert (moe.experts.down_proj.grad[4:] == 0).all()
    assert (moe.experts.down_proj.grad[:4][routing.counts_E[:4] > 0].abs().amax((1, 2)) > 0).all()
    torch.testing.assert_close(y_TD, dense_moe(config, moe, x_TD, routing), rtol=1e-5, atol=1e-5)


def test_feed_forward_matches_formula():
    module = fill(FeedForward(64, 96))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    gate, up = x @ module.gate_proj.weight.T, x @ module.up_proj.weight.T
    torch.testing.assert_close(module(x), (functional.silu(gate) * up) @ module.down_proj.weight.T)


def test_norm_of_bf16_is_computed_in_fp32():
    norm = RMSNorm(256, 1e-6, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 256))
    x = (torch.randn(9, 256, generator=torch.Generator().manual_seed(0)) * 30).bfloat16()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    # One rounding to BF16 at the end, nothing before it.
    assert ((got.double() - want).abs() <= want.abs() * 2**-8).all()
