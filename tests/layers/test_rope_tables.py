"""Rotary tables against transformers, plain and YaRN."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from dsv3rt import presets
from dsv3rt.config import YarnConfig
from dsv3rt.layers.rope import inverse_frequencies, rope_tables

YARNS = [
    None,
    YarnConfig(),
    YarnConfig(factor=8.0, original_max_position=512, beta_fast=16.0, beta_slow=2.0, mscale=0.707, mscale_all_dim=1.0),
]


def hf_config(yarn):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn is not None:
        rope |= {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
                 "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
                 "original_max_position_embeddings": yarn.original_max_position}  # fmt: skip
    length = 4096 if yarn is None else int(yarn.original_max_position * yarn.factor)
    return DeepseekV3Config(rope_parameters=rope, max_position_embeddings=length, hidden_size=64, q_lora_rank=32)


@pytest.mark.parametrize("yarn", YARNS)
def test_rope_tables_match_transformers(yarn):
    config = replace(presets.model("671b"), yarn=yarn)
    reference = DeepseekV3RotaryEmbedding(hf_config(yarn))
    torch.testing.assert_close(inverse_frequencies(config), reference.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 2, 77, 511, 512, 4095, 20000])
    cos, sin = rope_tables(config, positions)
    want_cos, want_sin = reference(torch.zeros(1), positions[None])
    assert cos.dtype == sin.dtype == torch.float32
    # The angle is FP32: at position 20000 one rounding of the frequency is 20000 * 6e-8 = 1.2e-3 rad.
    torch.testing.assert_close(cos, want_cos[0, :, :32], rtol=0, atol=2e-3)
    torch.testing.assert_close(sin, want_sin[0, :, :32], rtol=0, atol=2e-3)
    torch.testing.assert_close(cos[:5], want_cos[0, :5, :32], rtol=0, atol=1e-4)


@pytest.mark.parametrize("yarn", YARNS)
def test_softmax_scale_matches_transformers(yarn):
    config = replace(presets.model("671b"), yarn=yarn)
    want = DeepseekV3Attention(hf_config(yarn), layer_idx=0).scaling
    assert config.softmax_scale == pytest.approx(want, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    plain = inverse_frequencies(presets.model("671b"))
    yarn = inverse_frequencies(replace(presets.model("671b"), yarn=YarnConfig(factor=40.0)))
    assert torch.equal(yarn[:10], plain[:10])
    torch.testing.assert_close(yarn[-8:], plain[-8:] / 40)
    assert ((yarn <= plain) & (yarn >= plain / 40 * (1 - 1e-6))).all()
