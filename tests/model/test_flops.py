"""Parameter counts and FLOPs against the built model and the published figures."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3rt import Transformer, presets
from dsv3rt.model.flops import parameter_counts, train_flops_per_token

VARIANTS = [
    presets.model("tiny"),
    presets.model("16b"),
    presets.model("671b"),
    replace(presets.model("tiny"), mtp_depth=2, q_lora_rank=None, num_shared_experts=0, num_dense_layers=0),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_counts_match_the_model(config):
    model = Transformer(config, device="meta")
    counts = parameter_counts(config)
    mtp = sum(parameter.numel() for block in model.mtp_blocks for parameter in block.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert counts.mtp == mtp
    assert counts.main == total - mtp
    unused = sum(
        (config.num_experts - config.top_k) * parameter[0].numel()
        for block in model.main_blocks
        for name, parameter in block.named_parameters()
        if ".experts." in name
    )
    assert counts.activated == counts.main - unused - model.embed_tokens.weight.numel()


def test_counts_of_deepseek_v3():
    counts = parameter_counts(presets.model("671b"))
    assert counts.main / 1e9 == pytest.approx(671.03, abs=0.01)
    assert counts.mtp / 1e9 == pytest.approx(11.6, abs=0.1)
    assert counts.activated / 1e9 == pytest.approx(37, abs=0.5)
    assert 15.5e9 < parameter_counts(presets.model("16b")).main < 16.5e9


def test_flops_of_deepseek_v3():
    config = presets.model("671b")
    assert train_flops_per_token(config, 4096) / 1e9 == pytest.approx(250.5, abs=0.1)
    assert train_flops_per_token(config, 4096, causal=False) / 1e9 == pytest.approx(281, abs=0.5)
    assert train_flops_per_token(config, 4096, with_mtp=True) / 1e9 == pytest.approx(260.6, abs=0.1)


@pytest.mark.parametrize("config", [VARIANTS[0], VARIANTS[3]])
def test_flops_of_weights_match_torch_counter(config):
    """A forward's products with weights as torch counts them; at length 0 the formula has no attention in it."""
    model = Transformer(config)
    tokens = torch.arange(32)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert 3 * counted == 32 * train_flops_per_token(config, 0, with_mtp=True)


def test_flops_of_attention():
    """6 (multiply-add, three passes) * layers * heads * (query and value width) * keys, half the keys when causal."""
    config = presets.model("671b")
    causal = train_flops_per_token(config, 4096) - train_flops_per_token(config, 0)
    full = train_flops_per_token(config, 4096, causal=False) - train_flops_per_token(config, 0)
    assert full == 2 * causal == 6 * 61 * 128 * (192 + 128) * 4096
