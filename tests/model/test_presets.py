"""Presets, and the front door of the package."""

import subprocess
import sys

import pytest

import dsv3rt
from dsv3rt import presets


def test_671b_is_deepseek_v3():
    config = presets.model("671b")
    assert config == dsv3rt.ModelConfig()
    assert (config.num_layers, config.dim, config.vocab_size) == (61, 7168, 129280)
    assert config.yarn is None
    assert config.max_position == 4096
    assert config.init_std == 0.006


def test_tiny_fits_the_kernels_and_bytes():
    config = presets.model("tiny")
    heads = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank)
    assert heads == (128, 64, 128, 512)
    widths = (config.dim, config.q_lora_rank, config.ffn_dim, config.expert_dim, config.dim * 2)
    assert all(width % 128 == 0 for width in widths)
    assert config.vocab_size >= 258  # bytes, bos, eos


def test_presets_reject_unknown_names():
    for wrong, nearest in (("16B", "16b"), ("671", "671b"), ("tinny", "tiny")):
        with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
            presets.model(wrong)


def test_import_is_light_and_trainer_is_lazy():
    code = "import sys, dsv3rt; assert not [m for m in sys.modules if m.startswith('dsv3rt.train')]; dsv3rt.nothing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'nothing'" in result.stderr, result.stderr
    assert isinstance(dsv3rt.__version__, str)
    assert {"Transformer", "Trainer", "ops", "presets"} <= set(dsv3rt.__all__)
