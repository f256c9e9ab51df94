"""Generation over the latent cache: prompts one after another in chunks, then all sequences a step at a time.

With drafts a step takes the last token and what the first MTP block guesses to follow it, and keeps what the model
confirms: the same tokens in greedy mode, the same distribution otherwise (DeepSeek-V3 report sec. 5.4.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3rt.infer.cache import PagedLatentCache, pages_of
from dsv3rt.infer.runner import Runner, can_be_captured
from dsv3rt.infer.sampling import Drafts, Sampler, draft, verify
from dsv3rt.layers.mla import DecodeStep
from dsv3rt.model.transformer import Transformer

_PREFILL_CHUNK = 256
MAX_DRAFTS = 3  # with the last token the four queries that mla_decode is measured for

NewTokens = list[tuple[int, list[int]]]  # a prompt's index, and what follows


@dataclass(frozen=True)
class GenerateOptions:
    """max_new_tokens: at most this many a prompt; prompt and continuation must fit config.max_position.

    temperature: 0 is greedy. top_p: nucleus sampling. seed: of the draws; the same call gives the same tokens. eos: a
    sequence ends with this token. num_drafts: tokens guessed a step by the first MTP block, from the second on by its
    own output. fp8_cache: see `ops.quantize_latents`.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos: int | None = None
    num_drafts: int = 0
    fp8_cache: bool = False

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("max_new_tokens", self.max_new_tokens >= 0, "not be negative"),
            ("temperature", self.temperature >= 0, "not be negative"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]"),
            ("num_drafts", 0 <= self.num_drafts <= MAX_DRAFTS, f"be in 0..{MAX_DRAFTS}"),
        ):
            if not fine:
                raise ValueError(f"generate: {name} must {rule}, got {getattr(self, name)}")


def _check(model: Transformer, prompts: list[list[int]], options: GenerateOptions) -> None:
    config, most = model.config, model.config.max_position - options.max_new_tokens
    if options.num_drafts > 0 and config.mtp_depth == 0:
        raise ValueError(f"generate: num_drafts must be 0 for a model without MTP blocks, got {options.num_drafts}")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= most:
            raise ValueError(
                f"generate: prompts[{row}] must have 1..{most} tokens "
                f"(max_position less max_new_tokens), got {len(prompt)}"
            )
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f"generate: prompts[{row}] must hold tokens in 0..{config.vocab_size - 1}")


class Generation:
    """Continues prompts, which may differ in length. Iterate over it once: every step gives `NewTokens`.

    num_drafted, num_accepted: so far, of sequences still going.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], options: GenerateOptions) -> None:
        _check(model, prompts, options)
        self.num_drafted = self.num_accepted = 0
        self._model, self._prompts, self._options = model, prompts, options
        weight = model.embed_tokens.weight
        self._device = weight.device
        generator = torch.Generator(weight.device).manual_seed(options.seed)
        self._sampler = Sampler(options.temperature, options.top_p, generator)
        most = [len(prompt) + options.max_new_tokens + options.num_drafts for prompt in prompts]
        self._cache = PagedLatentCache(
            model.config,
            sum(map(pages_of, most)),
            max_tokens=max(most, default=0),
            dtype=weight.dtype,
            device=weight.device,
            fp8=options.fp8_cache,
        )
        self._runner = Runner(model, self._cache, capture=can_be_captured(model))
        self._sequences: list[int | None] = []  # of each prompt; None: it has ended
        self._left = [options.max_new_tokens] * len(prompts)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that stood; 0 before any."""
        return self.num_accepted / max(self.num_drafted, 1)

    @torch.no_grad()
    def __iter__(self) -> Iterator[NewTokens]:
        if not self._prompts or self._options.max_new_tokens == 0:
            return
        h_BD = self._prefill()
        last_B = self._sampler.sample(self._model.head(h_BD))
        yield self._take([[token] for token in last_B.tolist()])
        drafts = self._first_drafts(last_B, h_BD)
        while any(sequence is not None for sequence in self._sequences):
            tokens_BL = torch.cat([last_B[:, None], drafts.tokens_BK], dim=1)
            step = self._cache.append(self._sequences, tokens_BL.shape[1])
            h_BLD = self._runner.step(tokens_BL, step)
            accepted_B, last_B = verify(self._model.head(h_BLD), drafts, self._sampler)
            # Row by row the drafts that stand, the token after them, and drafts that nobody looks at.
            place_B1 = accepted_B[:, None]
            next_BL = torch.cat([drafts.tokens_BK, last_B[:, None]], dim=1).scatter(1, place_B1, last_B[:, None])
            accepted = accepted_B.tolist()
            self._count(accepted)
            self._forget(accepted)
            yield self._take([row[: count + 1] for row, count in zip(next_BL.tolist(), accepted, strict=True)])
            drafts = self._next_drafts(next_BL, h_BLD, step, accepted_B)

    def _prefill(self) -> Tensor:
        """The hidden state (B, D) of each prompt's last token. Equal prompts are read once and share their pages."""
        known: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        hidden = []
        for prompt in self._prompts:
            key = tuple(prompt)
            if key in known:
                sequence, h_D = known[key]
                self._sequences.append(self._cache.fork(sequence))
            else:
                sequence = self._cache.allocate()
                h_D = self._read(sequence, prompt)
                known[key] = sequence, h_D
                self._sequences.append(sequence)
            hidden.append(h_D)
        return torch.stack(hidden)

    def _read(self, sequence: int, prompt: list[int]) -> Tensor:
        """The hidden state (D,) of the prompt's last token; the latents of all go to the cache."""
        tokens_1T = torch.tensor([prompt], device=self._device)
        following_1T = tokens_1T.roll(-1, dims=1)  # what follows the last token is not known: it is written again
        h_1LD = torch.empty(0, device=self._device)
        for start in range(0, len(prompt), _PREFILL_CHUNK):
            chunk = slice(start, start + _PREFILL_CHUNK)
            tokens_1L = tokens_1T[:, chunk]
            step = self._cache.append([sequence], tokens_1L.shape[1])
            h_1LD = self._runner.prefill(tokens_1L, step)
            if self._options.num_drafts > 0:
                self._runner.prefill_mtp(following_1T[:, chunk], h_1LD, step)
        return h_1LD[0, -1]

    def _first_drafts(self, last_B: Tensor, h_BD: Tensor) -> Drafts:
        """The MTP block has yet to read the token after the prompt's last, in that one's place."""
        if self._options.num_drafts == 0:
            return Drafts(last_B[:, None][:, :0], None)
        step = self._cache.rewrite(self._sequences, 1)
        return self._next_drafts(last_B[:, None], h_BD[:, None], step, torch.zeros_like(last_B))

    def _next_drafts(self, next_BL: Tensor, h_BLD: Tensor, step: DecodeStep, place_B: Tensor) -> Drafts:
        """What may follow next_BL at `place_B`; step and h_BLD are of the tokens before next_BL."""
        if self._options.num_drafts == 0:
            return Drafts(next_BL[:, :0], None)
        rows = torch.arange(len(place_B), device=self._device)
        h_BD = self._runner.step_mtp(next_BL, h_BLD, step)[rows, place_B]
        parts = [draft(self._model.head(h_BD), self._sampler)]
        lengths = [None if sequence is None else self._cache.length(sequence) for sequence in self._sequences]
        while len(parts) < self._options.num_drafts:
            step = self._cache.append(self._sequences, 1)
            h_BD = self._runner.step_mtp(parts[-1].tokens_BK, h_BD[:, None], step)[:, 0]
            parts.append(draft(self._model.head(h_BD), self._sampler))
        for sequence, length in zip(self._sequences, lengths, strict=True):
            if sequence is not None and length is not None:
                self._cache.truncate(sequence, length)
        return Drafts.join(parts)

    def _count(self, accepted: list[int]) -> None:
        going = [count for count, sequence in zip(accepted, self._sequences, strict=True) if sequence is not None]
        self.num_drafted += len(going) * self._options.num_drafts
        self.num_accepted += sum(going)

    def _forget(self, accepted: list[int]) -> None:
        """Drafts that fell leave the cache."""
        for sequence, count in zip(self._sequences, accepted, strict=True):
            if sequence is not None:
                fallen = self._options.num_drafts - count
                self._cache.truncate(sequence, self._cache.length(sequence) - fallen)

    def _take(self, rows: list[list[int]]) -> NewTokens:
        """What is new of sequences still going, up to their end; those that end give their pages back."""
        new: NewTokens = []
        for row, tokens in enumerate(rows):
            sequence = self._sequences[row]
            if sequence is None:
                continue
            tokens = tokens[: self._left[row]]
            ended = self._options.eos in tokens
            if ended:
                tokens = tokens[: tokens.index(self._options.eos) + 1]  # type: ignore[arg-type]
            self._left[row] -= len(tokens)
            if ended or self._left[row] == 0:
                self._cache.free(sequence)
                self._sequences[row] = None
            new.append((row, tokens))
        return new


def generate(model: Transformer, prompts: list[list[int]], options: GenerateOptions) -> list[list[int]]:
    """The new tokens of each prompt alone, the eos included where it was drawn; see `Generation`."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for new in Generation(model, prompts, options):
        for row, tokens in new:
            outputs[row] += tokens
    return outputs
