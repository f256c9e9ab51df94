"""Generation against the full forward; sampling; the cache."""

from dataclasses import replace

import pytest
import torch

from dsv3rt import Transformer, presets
from dsv3rt.infer import generate as generate_module
from dsv3rt.infer.cache import PagedLatentCache
from dsv3rt.infer.generate import GenerateOptions, generate
from dsv3rt.infer.sampling import Sampler

SMALL = replace(
    presets.model("tiny"), vocab_size=64, dim=64, num_layers=3, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, ffn_dim=64, expert_dim=32, init_std=0.1, max_position=160,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(SMALL)


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]


def greedy_by_full_forward(model, prompt, count):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(model(torch.tensor([tokens])).logits_BTV[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_greedy_matches_full_forward(model, monkeypatch):
    """Different lengths, a page border met while decoding (60 + 10), one inside a chunk, and several chunks."""
    monkeypatch.setattr(generate_module, "_PREFILL_CHUNK", 48)
    prompts = prompts_of(1, 60, 7, 131)
    got = generate(model, prompts, GenerateOptions(10))
    want = [greedy_by_full_forward(model, prompt, 10) for prompt in prompts]
    assert got == want
    assert len({tuple(tokens) for tokens in got}) > 1


def test_decoded_hidden_states_match_full_forward(model):
    (prompt,) = prompts_of(70)
    cache = PagedLatentCache(SMALL, 2, max_tokens=70)
    sequence = cache.allocate()
    parts = []
    for size in (33, 1, 36):
        done = cache.length(sequence)
        tokens = torch.tensor([prompt[done : done + size]])
        parts.append(model.decode(tokens, cache.append([sequence], size), cache.layers))
    with torch.no_grad():
        want = model(torch.tensor([prompt])).logits_BTV
        torch.testing.assert_close(model.head(torch.cat(parts, dim=1)), want, rtol=1e-4, atol=1e-5)


def test_eos_ends_its_sequence_alone(model):
    prompts = prompts_of(5, 9, 12)
    full = generate(model, prompts, GenerateOptions(12))
    eos = full[0][3]
    got = generate(model, prompts, GenerateOptions(12, eos=eos))
    for one, whole in zip(got, full, strict=True):
        end = whole.index(eos) + 1 if eos in whole else len(whole)
        assert one == whole[:end]
    assert len(got[0]) <= 4


def test_sampling_is_seeded(model):
    prompts = prompts_of(4, 8)
    options = GenerateOptions(12, temperature=1.0, top_p=0.95, seed=1)
    first = generate(model, prompts, options)
    assert first == generate(model, prompts, options)
    assert first != generate(model, prompts, replace(options, seed=2))
    assert generate(model, prompts, replace(options, top_p=1e-6)) == generate(model, prompts, GenerateOptions(12))


def test_sample_follows_the_nucleus():
    probability = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probability.log().expand(4000, 4)

    def shares(temperature, top_p):
        sampler = Sampler(temperature, top_p, torch.Generator().manual_seed(0))
        return torch.bincount(sampler.sample(logits), minlength=4) / 4000

    # 0.5 + 0.3 reaches 0.75; standard error of a share 0.625 of 4000 is 0.008.
    torch.testing.assert_close(shares(1.0, 0.75), torch.tensor([0, 0.625, 0, 0.375]), rtol=0, atol=0.03)
    torch.testing.assert_close(shares(1.0, 1.0), probability, rtol=0, atol=0.03)
    torch.testing.assert_close(shares(0.5, 1.0), probability**2 / (probability**2).sum(), rtol=0, atol=0.03)


def test_equal_prompts_share_their_pages(model):
    """Four samples of one prompt of 70 tokens: two pages, of which the first stays shared."""
    (prompt,) = prompts_of(70)
    alone = generate(model, [prompt], GenerateOptions(8))
    assert generate(model, [prompt] * 4, GenerateOptions(8)) == alone * 4
    options = GenerateOptions(8, temperature=1.0)
    assert len({tuple(tokens) for tokens in generate(model, [prompt] * 4, options)}) > 1


def test_generate_rejects_bad_arguments(model):
    assert generate(model, [], GenerateOptions(3)) == []
    assert generate(model, [[1], [2]], GenerateOptions(0)) == [[], []]
    for prompts, message in (
        ([[]], r"prompts\[0\] must have 1..157 tokens"),
        ([[1], [1] * 158], r"prompts\[1\] must have 1..157 tokens .*, got 158"),
        ([[64]], "tokens in 0..63"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, GenerateOptions(3))
    for options, message in (
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"num_drafts": 4}, r"num_drafts must be in 0..3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerateOptions(**{"max_new_tokens": 3, **options})


def test_bf16_generates():
    torch.manual_seed(0)
    low = Transformer(SMALL, dtype=torch.bfloat16)
    for fp8_cache in (False, True):
        tokens = generate(low, prompts_of(3, 6), GenerateOptions(5, fp8_cache=fp8_cache))
        assert [len(one) for one in tokens] == [5, 5]
