"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits_BV: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """(B,) int64 tokens. Temperature 0 takes the largest logit (ties: any one of them); otherwise the draw is from the
    fewest tokens whose probabilities at that temperature reach `top_p`."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probability_BV, token_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    probability_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
    choice_B1 = torch.multinomial(probability_BV, 1, generator=generator)
    return token_BV.gather(1, choice_B1).squeeze(1)
