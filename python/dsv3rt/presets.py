"""Model shapes by name: `presets.model("tiny" | "16b" | "671b")`."""

from __future__ import annotations

import difflib

from dsv3rt.config import ModelConfig


def _tiny() -> ModelConfig:
    """A byte-level model that learns on a laptop: V3's head shapes and routing, everything else small.

    Vocabulary: 0..255 the bytes, 256 bos, 257 eos, the rest unused.
    """
    return ModelConfig(
        vocab_size=288,
        dim=128,
        num_layers=3,
        num_dense_layers=1,
        num_heads=2,
        q_lora_rank=128,
        ffn_dim=384,
        expert_dim=128,
        num_experts=8,
        top_k=2,
        num_expert_groups=4,
        num_groups_kept=2,
        max_position=512,
        init_std=0.06,
    )


def _16b() -> ModelConfig:
    """DeepSeek-V2-Lite's widths with V3's routing (the shape of Moonlight-16B-A3B), V3's vocabulary and MTP."""
    return ModelConfig(
        dim=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_lora_rank=None,
        ffn_dim=11264,
        expert_dim=1408,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
        num_expert_groups=1,
        num_groups_kept=1,
        route_scale=2.446,
    )


_PRESETS = {"tiny": _tiny, "16b": _16b, "671b": ModelConfig}


def model(name: str) -> ModelConfig:
    """The model configuration called `name`; "671b" is DeepSeek-V3 as pretrained (4096 positions, plain RoPE).

    Raises:
        ValueError: no such preset; the message suggests the nearest name.
    """
    if name in _PRESETS:
        return _PRESETS[name]()
    nearest = difflib.get_close_matches(str(name).lower(), _PRESETS, n=1, cutoff=0.0)[0]
    known = ", ".join(_PRESETS)
    raise ValueError(f"presets.model: name must be one of {known}, got {name!r}; did you mean {nearest!r}?")
