"""Choosing the next token, and which drafted tokens stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """temperature 0 takes the largest logit (ties: any one of them); otherwise draws are from the fewest tokens whose
    probabilities at that temperature reach `top_p`."""

    temperature: float
    top_p: float
    generator: torch.Generator

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) FP32 of the distribution that is drawn from; not for a greedy one."""
        falling, tokens = torch.softmax(logits.float() / self.temperature, dim=-1).sort(dim=-1, descending=True)
        before = falling.cumsum(dim=-1) - falling
        kept = falling.masked_fill(before >= self.top_p, 0.0)
        kept = kept / kept.sum(dim=-1, keepdim=True)
        return torch.zeros_like(kept).scatter_(-1, tokens, kept)

    def draw(self, probability_BV: Tensor) -> Tensor:
        return torch.multinomial(probability_BV, 1, generator=self.generator).squeeze(1)

    def sample(self, logits_BV: Tensor) -> Tensor:
        """(B,) int64 tokens."""
        return logits_BV.argmax(dim=-1) if self.is_greedy else self.draw(self.probabilities(logits_BV))


@dataclass(frozen=True)
class Drafts:
    """tokens_BK, and the distributions (B, K, V) they were drawn from: None where they are largest logits, or none."""

    tokens_BK: Tensor
    probability_BKV: Tensor | None

    @staticmethod
    def join(parts: list[Drafts]) -> Drafts:
        probabilities = [part.probability_BKV for part in parts if part.probability_BKV is not None]
        tokens_BK = torch.cat([part.tokens_BK for part in parts], dim=1)
        return Drafts(tokens_BK, torch.cat(probabilities, dim=1) if probabilities else None)


def draft(logits_BV: Tensor, sampler: Sampler) -> Drafts:
    """One token a sequence."""
    if sampler.is_greedy:
        return Drafts(logits_BV.argmax(dim=-1, keepdim=True), None)
    probability_BV = sampler.probabilities(logits_BV)
    return Drafts(sampler.draw(probability_BV)[:, None], probability_BV[:, None])


def verify(logits_BLV: Tensor, drafts: Drafts, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """How many drafts of each sequence stand, (B,), and the token after those, (B,).

    logits_BLV: L = K + 1, of the last token before the drafts and of each draft. Greedy: a draft stands where it is
    what would have been taken. Otherwise it stands with probability min(1, p / q), and the first that falls is replaced
    by a draw from what p exceeds q by: the tokens are distributed as draws from p (Leviathan, arXiv 2211.17192).
    """
    tokens_BK = drafts.tokens_BK
    if tokens_BK.shape[1] == 0:
        return tokens_BK.new_zeros(len(tokens_BK)), sampler.sample(logits_BLV[:, 0])
    if drafts.probability_BKV is None:
        choice_BL = logits_BLV.argmax(dim=-1)
        accepted_B = _leading(choice_BL[:, :-1] == tokens_BK)
        return accepted_B, choice_BL.gather(1, accepted_B[:, None]).squeeze(1)
    p_BLV, q_BKV = sampler.probabilities(logits_BLV), drafts.probability_BKV
    p_BK, q_BK = (x.gather(2, tokens_BK[:, :, None]).squeeze(2) for x in (p_BLV[:, :-1], q_BKV))
    chance_BK = torch.rand(p_BK.shape, generator=sampler.generator, device=p_BK.device)
    accepted_B = _leading(chance_BK * q_BK < p_BK)
    q_BLV = torch.cat([q_BKV, torch.zeros_like(q_BKV[:, :1])], dim=1)  # after the last draft all of p is left
    row = accepted_B[:, None, None].expand(-1, 1, p_BLV.shape[2])
    p_BV, q_BV = p_BLV.gather(1, row).squeeze(1), q_BLV.gather(1, row).squeeze(1)
    rest_BV = (p_BV - q_BV).clamp(min=0)
    # Where rounding leaves nothing, p and q are the same and any draw from p will do.
    return accepted_B, sampler.draw(torch.where(rest_BV.sum(dim=1, keepdim=True) > 0, rest_BV, p_BV))


def _leading(stands_BK: Tensor) -> Tensor:
    return stands_BK.long().cumprod(dim=1).sum(dim=1)
