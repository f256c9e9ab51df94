"""The latent cache: C + R numbers a token and layer, in pages of 64 tokens as `ops.mla_decode` reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.layers.mla import DecodeStep
from dsv3rt.layers.rope import rope_tables

PAGE = 64


def pages_of(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)


class PagedLatentCache:
    """Pages that sequences take as they grow, give back, and share by reference count. All layers use the same pages.

    layers: one (num_pages, 64, C + R) tensor a block, MTP blocks last; with `fp8` bytes as `ops.quantize_latents` makes
        them.
    max_tokens: of one sequence; the width of block tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        fp8: bool = False,
    ) -> None:
        self.config, self.max_tokens = config, max_tokens
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        shape = (num_pages, PAGE, ops.fp8_token_bytes(rank, rope) if fp8 else rank + rope)
        kind = torch.uint8 if fp8 else dtype
        num_layers = config.num_layers + config.mtp_depth
        self.layers = [torch.zeros(shape, dtype=kind, device=device) for _ in range(num_layers)]
        self._device = self.layers[0].device
        self._users = [0] * num_pages
        self._free = list(range(num_pages))[::-1]
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_sequence = 0

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def pages(self, sequence: int) -> tuple[int, ...]:
        return tuple(self._pages[sequence])

    def allocate(self) -> int:
        """A new sequence without tokens."""
        return self._add([], 0)

    def fork(self, sequence: int) -> int:
        """A sequence with the same tokens, on the same pages until one of both writes."""
        pages = self._pages[sequence]
        for page in pages:
            self._users[page] += 1
        return self._add(list(pages), self._lengths[sequence])

    def free(self, sequence: int) -> None:
        self.truncate(sequence, 0)
        del self._pages[sequence], self._lengths[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens past the first `length`."""
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"PagedLatentCache.truncate: length must be in 0..{self._lengths[sequence]}, got {length}")
        self._lengths[sequence] = length
        pages = self._pages[sequence]
        while len(pages) > pages_of(length):
            self._release(pages.pop())

    def append(self, sequences: Sequence[int | None], num_tokens: int) -> DecodeStep:
        """Take places for `num_tokens` more tokens in each sequence; the step that fills them.

        None stands for a row of the batch that is idle: it writes nothing and sees nothing.

        Raises:
            ValueError: a sequence would exceed max_tokens, or there are not enough pages; nothing has changed then.
        """
        for sequence in sequences:
            if sequence is not None and self._lengths[sequence] + num_tokens > self.max_tokens:
                raise ValueError(
                    f"PagedLatentCache.append: sequence {sequence} must stay within {self.max_tokens} tokens, "
                    f"got {self._lengths[sequence]} + {num_tokens}"
                )
        return self._step("append", sequences, num_tokens, added=num_tokens)

    def rewrite(self, sequences: Sequence[int | None], num_tokens: int) -> DecodeStep:
        """The step that fills the places of the last `num_tokens` tokens again, for a block that has not seen them.

        What other blocks hold there stays. Raises as `append`, and where a sequence has fewer tokens.
        """
        for sequence in sequences:
            if sequence is not None and self._lengths[sequence] < num_tokens:
                raise ValueError(
                    f"PagedLatentCache.rewrite: sequence {sequence} must have {num_tokens} tokens, "
                    f"got {self._lengths[sequence]}"
                )
        return self._step("rewrite", sequences, num_tokens, added=0)

    def _step(self, name: str, sequences: Sequence[int | None], num_tokens: int, *, added: int) -> DecodeStep:
        written = [sequence for sequence in sequences if sequence is not None]
        self._check_room(name, written, num_tokens, added)
        for sequence in written:
            self._grow(sequence, num_tokens, added)
        rows = [self._row(sequence, num_tokens) for sequence in sequences]
        positions, slots, tables, lengths = (list(column) for column in zip(*rows, strict=True))
        positions_T = torch.tensor(positions, device=self._device).flatten()
        return DecodeStep(
            *rope_tables(self.config, positions_T),
            torch.tensor(slots, device=self._device).flatten(),
            torch.tensor(tables, dtype=torch.int32, device=self._device),
            torch.tensor(lengths, dtype=torch.int32, device=self._device),
        )

    def _add(self, pages: list[int], length: int) -> int:
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _shared(self, sequence: int, start: int) -> list[int]:
        """Where in the sequence's pages those lie that it shares, from the one of token `start`."""
        pages = self._pages[sequence]
        return [place for place in range(start // PAGE, len(pages)) if self._users[pages[place]] > 1]

    def _check_room(self, name: str, sequences: list[int], num_tokens: int, added: int) -> None:
        needed = 0
        writers: Counter[int] = Counter()
        for sequence in sequences:
            pages, length = self._pages[sequence], self._lengths[sequence] + added
            needed += pages_of(length) - len(pages)
            writers.update(pages[place] for place in self._shared(sequence, length - num_tokens))
        needed += sum(min(count, self._users[page] - 1) for page, count in writers.items())  # the last one keeps it
        if needed > len(self._free):
            raise ValueError(f"PagedLatentCache.{name}: must have {needed} free pages, got {len(self._free)}")

    def _grow(self, sequence: int, num_tokens: int, added: int) -> None:
        """Own the pages of the last `num_tokens` tokens, `added` of which are new."""
        pages = self._pages[sequence]
        self._lengths[sequence] += added
        for place in self._shared(sequence, self._lengths[sequence] - num_tokens):
            own = self._take()
            for layer in self.layers:
                layer[own] = layer[pages[place]]
            self._release(pages[place])
            pages[place] = own
        while len(pages) < pages_of(self._lengths[sequence]):
            pages.append(self._take())

    def _row(self, sequence: int | None, num_tokens: int) -> tuple[list[int], list[int], list[int], int]:
        """Positions, slots, block table and length of one row of a step."""
        width = pages_of(self.max_tokens)
        if sequence is None:
            return [0] * num_tokens, [-1] * num_tokens, [0] * width, 0
        pages, length = self._pages[sequence], self._lengths[sequence]
        positions = list(range(length - num_tokens, length))
        slots = [pages[position // PAGE] * PAGE + position % PAGE for position in positions]
        return positions, slots, pages + [0] * (width - len(pages)), length
