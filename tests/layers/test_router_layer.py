"""The router's traps: what selects, what weighs, what stays FP32, what balances."""

from dataclasses import replace

import pytest
import torch

from dsv3rt import presets
from dsv3rt.layers.router import Router


def make_router(dtype=torch.float32, **changes):
    config = replace(presets.model("tiny"), dim=128, **changes)
    router = Router(config, dtype=dtype)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return config, router


def inputs(num_tokens=64, dim=128):
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(2))


def brute_force(config, router, x_TD):
    """(experts, gates) of each token as sets, from the report's words."""
    scores = torch.sigmoid(x_TD.double() @ router.weight.double().T)
    biased = scores + router.e_score_correction_bias.double()
    per_group = config.num_experts // config.num_expert_groups
    result = []
    for t in range(len(x_TD)):
        groups = [range(g * per_group, (g + 1) * per_group) for g in range(config.num_expert_groups)]
        strength = [sum(sorted((biased[t, e].item() for e in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -strength[g])[: config.num_groups_kept]
        allowed = [e for g in best for e in groups[g]]
        chosen = sorted(allowed, key=lambda e: -biased[t, e].item())[: config.top_k]
        total = sum(scores[t, e].item() for e in chosen)
        result.append({e: scores[t, e].item() / total * config.route_scale for e in chosen})
    return result


@pytest.mark.parametrize("offset", [0.0, -3.0, 3.0])
def test_router_matches_brute_force(offset):
    """With an offset of -3 every biased score is negative: masking dropped groups with 0 would choose them."""
    config, router = make_router(num_experts=32, num_expert_groups=8, num_groups_kept=3, top_k=4)
    bias = offset + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    router.e_score_correction_bias.copy_(bias)
    x_TD = inputs()
    routing = router(x_TD)
    for t, want in enumerate(brute_force(config, router, x_TD)):
        got = dict(zip(routing.idx_TK[t].tolist(), routing.weight_TK[t].tolist(), strict=True))
        assert got.keys() == want.keys()
        assert got == pytest.approx(want, rel=1e-5)
    assert routing.counts_E.sum() == 64 * 4


def test_router_keeps_bias_fp32_and_out_of_the_gradient():
    _, router = make_router()
    router.e_score_correction_bias.fill_(0.001234567)
    exact = router.e_score_correction_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, exact)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert "e_score_correction_bias" in router.state_dict()
    router(inputs().bfloat16()).weight_TK.square().sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.e_score_correction_bias.grad is None


def test_router_computes_bf16_inputs_in_fp32():
    _, router = make_router(torch.bfloat16)
    x_TD = inputs().bfloat16()
    want = torch.sigmoid(x_TD.double() @ router.weight.double().T)
    scores = router(x_TD).scores_TE
    assert scores.dtype == torch.float32
    # BF16 logits would be off by up to 2^-9 of their size; FP32 sums of 128 terms stay near 1e-6.
    assert (scores - want).abs().max() < 2e-6


def test_update_bias_brings_loads_to_balance():
    """A router that starts out favouring half of the experts spreads its load as its bias moves, gates untouched."""
    _, router = make_router(num_experts=8, num_expert_groups=1, num_groups_kept=1, top_k=2)
    x_TD = inputs(512)
    router.e_score_correction_bias.copy_(torch.tensor([0.3] * 4 + [-0.3] * 4))
    mean = 512 * 2 / 8
    start = router(x_TD).counts_E
    assert start.max() > 1.5 * mean
    for _ in range(300):
        router.update_bias(router(x_TD).counts_E, 0.002)
    end = router(x_TD).counts_E
    assert end.max() < 1.1 * mean
    assert end.min() > 0.9 * mean
