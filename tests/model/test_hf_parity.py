"""Logits against transformers' DeepseekV3ForCausalLM, weights copied by name."""

from dataclasses import replace

import pytest
import torch

from dsv3rt import Transformer, presets
from dsv3rt.config import YarnConfig
from tests.hf.hf_cases import hf_model

SMALL = replace(
    presets.model("tiny"), vocab_size=96, dim=96, num_layers=3, num_heads=3, q_lora_rank=48, kv_lora_rank=32,
    qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, ffn_dim=112, expert_dim=40, init_std=0.08,
)  # fmt: skip
CONFIGS = {
    "groups": SMALL,
    "one group, no query latent, two shared": replace(
        SMALL, q_lora_rank=None, num_expert_groups=1, num_groups_kept=1, num_shared_experts=2, top_k=3, route_scale=1.7
    ),
    "all MoE, gates not renormalised": replace(SMALL, num_layers=2, num_dense_layers=0, renormalize_gates=False),
    "yarn": replace(SMALL, yarn=YarnConfig(factor=4.0, original_max_position=16, mscale=0.8, mscale_all_dim=0.6)),
}


def hf_name(name):
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_state(model):
    return {hf_name(name): value for name, value in model.state_dict().items()}


def randomise(model, seed):
    """Norm weights and router biases away from their neutral values, so that a wrong place for them shows."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for moe in model.moe_layers:
            # Positive, so that masking dropped groups with 0 (older transformers) or -inf agrees.
            moe.gate.e_score_correction_bias.uniform_(0.0, 0.3, generator=generator)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers(name):
    config = replace(CONFIGS[name], mtp_depth=0)
    model = Transformer(config)
    randomise(model, seed=0)
    reference = hf_model(config)
    reference.load_state_dict(hf_state(model), strict=True)
    tokens = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(tokens).logits_BTV
        want = reference(tokens).logits
    # FP32 sums of up to 112 terms through 3 layers; a rounding that flipped a near-tie of experts would show as > 1e-2.
    relative = ((got - want).norm() / want.norm()).item()
    assert want.std() > 0.1
    assert relative < 1e-5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_loss_gradients_match_transformers():
    config = replace(SMALL, mtp_depth=0)
    model = Transformer(config)
    randomise(model, seed=3)
    reference = hf_model(config)
    reference.load_state_dict(hf_state(model), strict=True)
    stream = torch.randint(0, config.vocab_size, (2, 34), generator=torch.Generator().manual_seed(1))
    tokens, labels = stream[:, :-1], stream[:, 1:]
    output = model(tokens, labels)
    output.loss.backward()
    want_loss = torch.nn.functional.cross_entropy(reference(tokens).logits.flatten(0, 1), labels.flatten())
    want_loss.backward()
    torch.testing.assert_close(output.loss, want_loss, rtol=1e-6, atol=0)
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        want = wanted[hf_name(name)].grad
        assert want.norm() > 0
        assert (parameter.grad - want).norm() / want.norm() < 1e-4, name
