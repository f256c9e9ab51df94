"""PagedLatentCache: who holds which page, and what is in it."""

import random
from dataclasses import replace

import pytest
import torch

from dsv3rt import presets
from dsv3rt.infer.cache import PAGE, PagedLatentCache, pages_of

CONFIG = replace(
    presets.model("tiny"), num_layers=2, num_dense_layers=1, kv_lora_rank=4, qk_rope_head_dim=2, max_position=512
)


def make(num_pages: int, max_tokens: int = 400) -> PagedLatentCache:
    return PagedLatentCache(CONFIG, num_pages, max_tokens=max_tokens)


def write(cache: PagedLatentCache, sequences: list[int | None], values: list[list[float]]) -> None:
    """As a model would: each row's values into the slots of its step, in every block."""
    step = cache.append(sequences, len(values[0]))
    slots_T, values_T = step.slots_T, torch.tensor(values).flatten()
    for layer in cache.layers:
        layer.view(-1, layer.shape[-1])[slots_T[slots_T >= 0]] = values_T[slots_T >= 0, None]


def read(cache: PagedLatentCache, sequence: int) -> list[float]:
    """The tokens of a sequence, by its pages; the same in all blocks."""
    tokens = [torch.cat([layer[page] for page in cache.pages(sequence)] or [layer[0, :0]]) for layer in cache.layers]
    assert all(torch.equal(one, tokens[0]) for one in tokens)
    return tokens[0][: cache.length(sequence), 0].tolist()


def test_fork_shares_pages_until_one_writes() -> None:
    cache = make(8)
    first = cache.allocate()
    write(cache, [first], [[float(i) for i in range(70)]])
    second = cache.fork(first)
    assert cache.pages(second) == cache.pages(first)
    assert cache.num_free_pages == 6
    write(cache, [second], [[100.0]])
    assert cache.pages(second)[0] == cache.pages(first)[0]
    assert cache.pages(second)[1] != cache.pages(first)[1]
    assert cache.num_free_pages == 5
    write(cache, [first], [[200.0]])  # alone on its page again: nothing is copied
    assert cache.num_free_pages == 5
    assert read(cache, first) == [float(i) for i in range(70)] + [200.0]
    assert read(cache, second) == [float(i) for i in range(70)] + [100.0]


def test_the_last_writer_keeps_the_shared_page() -> None:
    cache = make(3)
    first = cache.allocate()
    write(cache, [first], [[1.0, 2.0]])
    forks = [first, cache.fork(first), cache.fork(first)]
    write(cache, list(forks), [[3.0], [4.0], [5.0]])
    assert cache.num_free_pages == 0
    assert [read(cache, one)[-1] for one in forks] == [3.0, 4.0, 5.0]


def test_full_pages_stay_shared() -> None:
    cache = make(4)
    first = cache.allocate()
    write(cache, [first], [[0.5] * PAGE])
    second = cache.fork(first)
    write(cache, [first, second], [[1.0], [2.0]])
    assert cache.num_free_pages == 1
    assert cache.pages(first)[0] == cache.pages(second)[0]


def test_free_gives_back_what_nobody_else_holds() -> None:
    cache = make(4)
    first = cache.allocate()
    write(cache, [first], [[1.0] * 130])
    second = cache.fork(first)
    cache.free(first)
    assert cache.num_free_pages == 1
    assert read(cache, second) == [1.0] * 130
    cache.truncate(second, 64)
    assert cache.num_free_pages == 3
    cache.free(second)
    assert cache.num_free_pages == 4
    with pytest.raises(KeyError):
        cache.length(second)


@pytest.mark.parametrize("length", [64, 65, 70, 128])
def test_rewrite_keeps_what_is_there(length: int) -> None:
    """The last token of several sequences at once, also where it stands alone on a page that they share."""
    cache = make(12)
    values = [float(i) for i in range(length)]
    first, other = cache.allocate(), cache.allocate()
    write(cache, [first, other], [values, [value + 1000 for value in values]])
    second = cache.fork(first)
    rows = [first, other, None, second]
    step = cache.rewrite(rows, 1)
    assert step.lengths_B.tolist() == [length, length, 0, length]
    assert step.slots_T[2] == -1
    slots = step.slots_T[[0, 1, 3]].tolist()
    assert len(set(slots)) == 3
    last = [cache.pages(one)[-1] * PAGE + (length - 1) % PAGE for one in (first, other, second)]
    assert slots == last
    assert read(cache, first) == read(cache, second) == values
    assert read(cache, other) == [value + 1000 for value in values]


def test_exhaustion_changes_nothing() -> None:
    cache = make(2, max_tokens=100)
    first = cache.allocate()
    write(cache, [first], [[1.0] * 60])
    second, third = cache.fork(first), cache.fork(first)
    state = (cache.pages(first), cache.length(first), cache.num_free_pages)
    with pytest.raises(ValueError, match=r"PagedLatentCache.append: must have 2 free pages, got 1"):
        cache.append([first, second, third], 1)
    with pytest.raises(ValueError, match=r"PagedLatentCache.rewrite: must have 2 free pages, got 1"):
        cache.rewrite([first, second, third], 1)
    with pytest.raises(ValueError, match=r"append: must have 2 free pages, got 1"):
        cache.append([first], 5)  # its own copy of the shared page, and one more
    with pytest.raises(ValueError, match=r"append: sequence 0 must stay within 100 tokens, got 60 \+ 41"):
        cache.append([first], 41)
    with pytest.raises(ValueError, match=r"rewrite: sequence 0 must have 61 tokens, got 60"):
        cache.rewrite([first], 61)
    with pytest.raises(ValueError, match=r"truncate: length must be in 0..60, got 61"):
        cache.truncate(first, 61)
    assert (cache.pages(first), cache.length(first), cache.num_free_pages) == state
    assert read(cache, third) == [1.0] * 60


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_keeps_every_sequence(seed: int) -> None:
    """Random calls beside lists of what each sequence should hold; at the end every page is free again."""
    draw, cache = random.Random(seed), make(12, max_tokens=250)
    held: dict[int, list[float]] = {}
    refused = 0
    for call in range(300):
        sequence = draw.choice(list(held)) if held else None
        action = draw.choice(["allocate", "append", "append", "append", "fork", "truncate", "rewrite", "free"])
        if action == "allocate" or sequence is None:
            held[cache.allocate()] = []
        elif action == "fork":
            held[cache.fork(sequence)] = list(held[sequence])
        elif action == "free":
            cache.free(sequence)
            del held[sequence]
        elif action == "truncate":
            length = draw.randint(0, cache.length(sequence))
            cache.truncate(sequence, length)
            held[sequence] = held[sequence][:length]
        else:
            group = draw.sample(list(held), draw.randint(1, len(held)))
            size = draw.randint(1, 40)
            try:
                if action == "append":
                    write(cache, list(group), [[float(call)] * size] * len(group))
                    for one in group:
                        held[one] += [float(call)] * size
                else:
                    cache.rewrite(group, size)  # refused where one is shorter
            except ValueError:
                refused += 1
        for one, values in held.items():
            assert read(cache, one) == values
            assert len(cache.pages(one)) == pages_of(len(values))
        assert cache.num_free_pages == 12 - len({page for one in held for page in cache.pages(one)})
    assert refused > 0
    for one in list(held):
        cache.free(one)
    assert cache.num_free_pages == 12
