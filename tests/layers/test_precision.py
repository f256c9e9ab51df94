"""Which modules multiply in FP8, and widths that FP8 can't have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsv3rt import presets
from dsv3rt.layers.precision import check_patterns, set_precision
from dsv3rt.model.transformer import Transformer


def tiny(**changes: Any) -> Transformer:
    return Transformer(replace(presets.model("tiny"), **changes))


def test_precision_chooses_attention_and_feed_forward() -> None:
    names = set_precision(tiny(), "fp8")
    assert "layers.0.self_attn.q_a_proj" in names
    assert "layers.0.mlp.down_proj" in names
    assert "layers.1.mlp.experts" in names
    assert "layers.3.self_attn.o_proj" in names, "the MTP block is a block"
    assert not any(part in name for name in names for part in ("gate.", "lm_head", "embed", "eh_proj", "norm"))


def test_precision_keeps_what_patterns_name() -> None:
    model = tiny()
    every = set_precision(model, "fp8")
    some = set_precision(model, "fp8", ["layers.0.*", "*.o_proj"])
    assert some == [name for name in every if not name.startswith("layers.0.") and not name.endswith(".o_proj")]
    assert set_precision(model, "bf16") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_dim": 192}, "layers.1.mlp.experts must have its expert_dim width divisible by 128 for fp8, got 192"),
        ({"ffn_dim": 320}, "layers.0.mlp.gate_proj must have its hidden width divisible by 128 for fp8, got 320"),
        ({"q_lora_rank": 72}, "layers.0.self_attn.q_a_proj must have its output width divisible by 16 for fp8, got 72"),
        ({"dim": 72}, "layers.0.self_attn.q_a_proj must have its input width divisible by 16 for fp8, got 72"),
    ],
)
def test_precision_rejects_widths(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^precision: {message}$"):
        set_precision(tiny(**changes), "fp8")


def test_precision_takes_odd_widths_that_stay_in_bf16() -> None:
    assert "layers.1.mlp.experts" not in set_precision(tiny(expert_dim=192), "fp8", ["*.mlp.*"])


def test_precision_rejects_patterns_that_name_nothing() -> None:
    names = ["layers.0.self_attn.o_proj", "layers.0.input_layernorm"]
    check_patterns(["layers.0.*"], names, "train.bf16_modules")
    with pytest.raises(ValueError, match=r"^train\.bf16_modules must name modules .*got 'layers\.9\.\*'$"):
        check_patterns(["layers.9.*"], names, "train.bf16_modules")
    with pytest.raises(ValueError, match=r"got 'layers\.0\.input_layernorm'$"):
        check_patterns(["layers.0.input_layernorm"], names, "train.bf16_modules")
