"""The latent cache: C + R numbers a token and layer, in pages of 64 tokens as `ops.mla_decode` reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.config import ModelConfig
from dsv3rt.layers.mla import DecodeStep
from dsv3rt.layers.rope import rope_tables

PAGE = 64


class LatentCache:
    """Pages for a fixed set of sequences, all reserved at the start.

    layers: one (pages, 64, C + R) tensor a main block. block_table: (B, max_pages) int32, each sequence's pages in
    order (0 past its own). lengths: tokens written of each sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacities: list[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config
        self.capacities = capacities
        self.lengths = [0] * len(capacities)
        counts = [-(-capacity // PAGE) for capacity in capacities]
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (sum(counts), PAGE, width)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        table = torch.zeros(len(counts), max(counts, default=0), dtype=torch.int32)
        first = 0
        for row, count in enumerate(counts):
            table[row, :count] = torch.arange(first, first + count, dtype=torch.int32)
            first += count
        self.block_table = table.to(device)

    def extend(self, rows: list[int], num_tokens: int) -> DecodeStep:
        """Take places for `num_tokens` more tokens in each of the sequences `rows`; the step that fills them."""
        for row in rows:
            if self.lengths[row] + num_tokens > self.capacities[row]:
                raise ValueError(
                    f"LatentCache.extend: sequence {row} must stay within {self.capacities[row]} tokens, "
                    f"got {self.lengths[row]} + {num_tokens}"
                )
        device = self.block_table.device
        starts_B = torch.tensor([self.lengths[row] for row in rows], device=device)
        positions_BL = starts_B[:, None] + torch.arange(num_tokens, device=device)
        table: Tensor = self.block_table[torch.tensor(rows, device=device)]
        slots_BL = table.long().gather(1, positions_BL // PAGE) * PAGE + positions_BL % PAGE
        cos_TR, sin_TR = rope_tables(self.config, positions_BL.flatten())
        for row in rows:
            self.lengths[row] += num_tokens
        lengths_B = (starts_B + num_tokens).to(torch.int32)
        return DecodeStep(cos_TR, sin_TR, slots_BL.flatten(), table, lengths_B)
