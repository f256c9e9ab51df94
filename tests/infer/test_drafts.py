"""Drafts change how fast tokens come, not which: greedy ones to the token, drawn ones in their distribution."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dsv3rt import Transformer, presets
from dsv3rt.config import ModelConfig
from dsv3rt.infer.generate import GenerateOptions, Generation, generate
from dsv3rt.infer.sampling import Drafts, Sampler, draft, verify

V = 32
CONFIG = replace(
    presets.model("tiny"), vocab_size=V, dim=64, num_layers=2, num_dense_layers=1, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, ffn_dim=64, expert_dim=32, init_std=0.1, max_position=256,
)  # fmt: skip
LENGTHS = (1, 65, 7, 64, 65, 130, 63)  # ragged; 65 stands twice, its last token alone on a page


def text(batch: int, length: int, seed: int) -> Tensor:
    """Tokens (B, T) that follow from the two before them by a table, but for one in eight, which is drawn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (batch, length), generator=generator)
    is_drawn = torch.rand(batch, length, generator=generator) < 1 / 8
    table = torch.randint(0, V, (V, 4), generator=torch.Generator().manual_seed(0))
    for t in range(2, length):
        follows = table[tokens[:, t - 1], tokens[:, t - 2] % 4]
        tokens[:, t] = torch.where(is_drawn[:, t], tokens[:, t], follows)
    return tokens


def trained_on_text(config: ModelConfig, lr: float) -> Transformer:
    """By a few seconds of training: enough for the MTP block to guess often, and to be wrong often."""
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(100):
        tokens = text(16, 33, seed=step)
        loss = model(tokens[:, :-1], tokens[:, 1:], mtp_weight=0.3).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def trained() -> Transformer:
    return trained_on_text(CONFIG, lr=4e-3)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [text(1, length, seed=1000 + row)[0].tolist() for row, length in enumerate(lengths)]


def run(generation: Generation, count: int) -> tuple[list[list[int]], int, float]:
    """The new tokens of `count` prompts, the number of steps, and seconds."""
    outputs: list[list[int]] = [[] for _ in range(count)]
    steps, start = 0, time.perf_counter()
    for new in generation:
        steps += 1
        for row, tokens in new:
            outputs[row] += tokens
    return outputs, steps, time.perf_counter() - start


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_greedy_drafts_change_no_token(trained: Transformer, num_drafts: int) -> None:
    prompts = prompts_of(*LENGTHS)
    prompts += [prompts[1], prompts[3]]  # forks
    plain, plain_steps, plain_seconds = run(Generation(trained, prompts, GenerateOptions(70)), len(prompts))
    generation = Generation(trained, prompts, GenerateOptions(70, num_drafts=num_drafts))
    drafted, steps, seconds = run(generation, len(prompts))
    assert drafted == plain
    assert [len(tokens) for tokens in drafted] == [70] * len(prompts)
    assert steps < plain_steps == 70
    print(
        f"\n{num_drafts} drafts: {generation.acceptance:.0%} stood; {plain_steps} steps in {plain_seconds:.2f} s "
        f"without, {steps} in {seconds:.2f} s with: {plain_steps / steps:.2f} and {plain_seconds / seconds:.2f} times"
    )
    assert 0 < generation.num_accepted < generation.num_drafted  # both branches were taken


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_an_untrained_block_costs_steps_but_no_token(num_drafts: int) -> None:
    torch.manual_seed(1)
    model = Transformer(CONFIG)
    prompts = prompts_of(*LENGTHS)
    assert generate(model, prompts, GenerateOptions(20, num_drafts=num_drafts)) == generate(
        model, prompts, GenerateOptions(20)
    )


def test_greedy_drafts_stop_at_eos(trained: Transformer) -> None:
    prompts = prompts_of(5, 66, 20)
    eos = generate(trained, prompts, GenerateOptions(20))[1][6]
    for options in (GenerateOptions(40, eos=eos), GenerateOptions(3, eos=eos)):
        plain = generate(trained, prompts, options)
        assert generate(trained, prompts, replace(options, num_drafts=2)) == plain
    assert any(tokens[-1] == eos for tokens in plain) or all(len(tokens) == 3 for tokens in plain)


# For a chi-square variable of k degrees of freedom, P(X >= k + 2 sqrt(k x) + 2 x) <= e^-x (Laurent and Massart 2000,
# lemma 1). Pearson's statistic follows it where each cell expects some tens; cells that expect fewer are joined.
DOUBT = 14.0  # e^-14 is 1e-6
LEAST = 30.0


def pearson(counts: Tensor, probability: Tensor) -> tuple[float, float]:
    """The statistic of counts against a distribution, and what it stays below."""
    expected = probability.double() * counts.sum()
    assert not counts[probability == 0].any()
    rare = expected < LEAST
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    kept = expected >= LEAST
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    return statistic, degrees + 2 * math.sqrt(degrees * DOUBT) + 2 * DOUBT


def chain(seed: int, num_tokens: int, sharpness: float) -> list[Tensor]:
    """Logits of the first, second, ... token after every prefix, (num_tokens,) * depth."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((num_tokens,) * (depth + 1), generator=generator) * sharpness for depth in range(3)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
@pytest.mark.parametrize("accepts_all", [False, True])
def test_verified_drafts_follow_the_model(temperature: float, top_p: float, accepts_all: bool) -> None:
    """Two drafts from one chain of distributions, verified by another: three tokens are drawn from the other's.

    With `accepts_all` the drafts stand unseen, which the same test must reject.
    """
    size, rows = 4, 200_000
    model, guess = chain(0, size, 1.0), chain(1, size, 1.0)
    sampler = Sampler(temperature, top_p, torch.Generator().manual_seed(0))
    one = draft(guess[0].expand(rows, size), sampler)
    two = draft(guess[1][one.tokens_BK[:, 0]], sampler)
    drafts = Drafts.join([one, two])
    first, second = drafts.tokens_BK.T
    logits = torch.stack([model[0].expand(rows, size), model[1][first], model[2][first, second]], dim=1)
    accepted, last = verify(logits, drafts, sampler)
    if accepts_all:
        accepted, last = torch.full_like(accepted, 2), sampler.sample(logits[:, 2])
    tokens = torch.cat([drafts.tokens_BK, last[:, None]], dim=1).scatter(1, accepted[:, None], last[:, None])
    # What verify leaves open comes from the model, as it would in the steps after.
    a, b, c = tokens.T
    b = torch.where(accepted < 1, sampler.sample(model[1][a]), b)
    c = torch.where(accepted < 2, sampler.sample(model[2][a, b]), c)
    p = [sampler.probabilities(logits) for logits in model]
    joint = p[0][:, None, None] * p[1][:, :, None] * p[2]
    if accepts_all and top_p < 1:
        assert torch.bincount(a * size * size + b * size + c, minlength=size**3)[joint.flatten() == 0].any()
        return
    statistic, bound = pearson(torch.bincount(a * size * size + b * size + c, minlength=size**3), joint.flatten())
    assert (statistic < bound) != accepts_all, f"{statistic:.1f} against {bound:.1f}"


def continuations(model: Transformer, prompt: list[int], length: int, sampler: Sampler) -> Tensor:
    """The probability of every continuation, by full forwards."""
    joint = torch.ones(())
    for depth in range(length):
        prefixes = torch.tensor([[*prompt, *more] for more in product(range(model.config.vocab_size), repeat=depth)])
        with torch.no_grad():
            logits = model(prefixes).logits_BTV
        assert logits is not None
        joint = (joint.reshape(-1, 1) * sampler.probabilities(logits[:, -1])).flatten()
    return joint


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_sampling_with_drafts_follows_the_model(num_drafts: int) -> None:
    """2048 continuations of one prompt against all that there are, each with its probability."""
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, vocab_size=5, init_std=0.12))
    prompt, options = [1, 4, 2], GenerateOptions(3, temperature=0.9, top_p=0.95, num_drafts=num_drafts)
    sampler = Sampler(options.temperature, options.top_p, torch.Generator())
    generation = Generation(model, [prompt] * 2048, options)
    outputs, _, _ = run(generation, 2048)
    a, b, c = torch.tensor(outputs).T
    statistic, bound = pearson(
        torch.bincount(a * 25 + b * 5 + c, minlength=125), continuations(model, prompt, 3, sampler)
    )
    assert statistic < bound
    assert num_drafts == 0 or 0.1 < generation.acceptance < 0.95
