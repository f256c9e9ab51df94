"""Rotary position tables, plain and YaRN, for interleaved pairs (`ops.rope`).

Source: DeepSeek-V3 inference/model.py `precompute_freqs_cis`; transformers `_compute_yarn_parameters`. Tables are
computed from the configuration at each call rather than kept in a buffer: a few thousand cosines cost nothing, and a
model that was built on the meta device then has nothing to lose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3rt.config import ModelConfig, YarnConfig


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _pair_turning(turns: float, dim: int, config: ModelConfig, yarn: YarnConfig) -> float:
    """The (fractional) pair that turns `turns` times within the original context."""
    return dim * math.log(yarn.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def inverse_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """(R / 2,) FP32: radians per position of each pair.

    YaRN keeps the pairs that turn more than beta_fast times within the original context, divides those below beta_slow
    turns by `factor`, and blends linearly between.
    """
    dim = config.qk_rope_head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    plain = 1.0 / config.rope_theta**exponent
    yarn = config.yarn
    if yarn is None:
        return plain
    low = max(math.floor(_pair_turning(yarn.beta_fast, dim, config, yarn)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, dim, config, yarn)), dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / width).clamp(0, 1)
    return plain / yarn.factor * stretched + plain * (1 - stretched)


def rope_tables(config: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, R / 2) FP32 at the given positions, on their device.

    YaRN applies at every length once `config.yarn` is set (as `config.softmax_scale` does). Its table factor is the
    ratio of the two mscales, 1 for DeepSeek-V3.
    """
    angle_TR = positions_T.to(torch.float32)[:, None] * inverse_frequencies(config, positions_T.device)
    cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()
    if config.yarn is not None:
        factor = config.yarn.factor
        scale = _mscale(factor, config.yarn.mscale) / _mscale(factor, config.yarn.mscale_all_dim)
        if scale != 1.0:
            cos_TR, sin_TR = cos_TR * scale, sin_TR * scale
    return cos_TR, sin_TR
