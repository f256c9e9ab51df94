"""Generation over the latent cache: prompts one after another in chunks, then all sequences a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.infer.cache import LatentCache
from dsv3rt.infer.sampling import sample
from dsv3rt.model.transformer import Transformer

_PREFILL_CHUNK = 256


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
    config = model.config
    for name, value, fine, rule in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "not be negative"),
        ("temperature", temperature, temperature >= 0, "not be negative"),
        ("top_p", top_p, 0 < top_p <= 1, "be in (0, 1]"),
    ):
        if not fine:
            raise ValueError(f"generate: {name} must {rule}, got {value}")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.max_position - max_new_tokens:
            raise ValueError(
                f"generate: prompts[{row}] must have 1..{config.max_position - max_new_tokens} tokens "
                f"(max_position less max_new_tokens), got {len(prompt)}"
            )
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f"generate: prompts[{row}] must hold tokens in 0..{config.vocab_size - 1}")


def _prefill(model: Transformer, cache: LatentCache, row: int, prompt: list[int]) -> Tensor:
    """The hidden state (1, D) of the prompt's last token; its latents go to the cache."""
    device = cache.block_table.device
    h_BLD = torch.empty(0, device=device)
    for start in range(0, len(prompt), _PREFILL_CHUNK):
        tokens_BL = torch.tensor([prompt[start : start + _PREFILL_CHUNK]], device=device)
        h_BLD = model.decode(tokens_BL, cache.extend([row], tokens_BL.shape[1]), cache.layers)
    return h_BLD[:, -1]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | None = None,
) -> list[list[int]]:
    """Continue every prompt; prompts may differ in length.

    Args:
        max_new_tokens: at most this many tokens a prompt; prompt and continuation must fit config.max_position.
        temperature: 0 is greedy. top_p: nucleus sampling. seed: of the draws; the same call gives the same tokens.
        eos: a sequence ends with this token.
    Returns:
        the new tokens alone, the eos included where it was drawn.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    outputs: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return outputs
    weight = model.embed_tokens.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    capacities = [len(prompt) + max_new_tokens for prompt in prompts]
    cache = LatentCache(model.config, capacities, dtype=weight.dtype, device=weight.device)
    h_BD = torch.cat([_prefill(model, cache, row, prompt) for row, prompt in enumerate(prompts)])
    active = list(range(len(prompts)))
    for remaining in reversed(range(max_new_tokens)):
        logits_BV = model.head(h_BD)
        tokens_B = sample(logits_BV, temperature=temperature, top_p=top_p, generator=generator)
        chosen = list(zip(active, tokens_B.tolist(), strict=True))
        for row, token in chosen:
            outputs[row].append(token)
        active = [row for row, token in chosen if token != eos]
        if not active or remaining == 0:
            break
        tokens_BL = torch.tensor([[token] for _, token in chosen if token != eos], device=weight.device)
        h_BD = model.decode(tokens_BL, cache.extend(active, 1), cache.layers)[:, -1]
    return outputs
