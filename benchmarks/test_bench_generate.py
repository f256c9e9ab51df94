"""Generation at V3's widths: steps from CUDA graphs against the same op by op, and with drafts against without.

Weights are random, so the MTP block's guesses would never stand: whether one does is drawn, with the share that the V3
report gives (sec. 5.4.3: 85 to 90 %). All that steps compute is computed. Times are the host's, between tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import record
from benchmarks.slice_models import Slice, free
from benchmarks.timing import ROUNDS, Case, Peer, figures
from dsv3rt import Transformer
from dsv3rt.infer import generate as module
from dsv3rt.infer.generate import GenerateOptions, Generation
from dsv3rt.infer.sampling import Drafts, Sampler, verify
from dsv3rt.layers.precision import set_precision

# One dense layer and two of experts, and an MTP block.
CONFIG = replace(Slice(layers=3).config, num_dense_layers=1, mtp_depth=1)
PROMPT = 512
STANDS = 0.85
WARMUP, STEPS = 4, 16  # first calls capture graphs


@dataclass(frozen=True)
class Way:
    """How tokens are generated."""

    peer: str
    num_drafts: int = 0
    by_graphs: bool = True


CASES = {
    "generate, steps from graphs": (Way(""), Way("op_by_op", by_graphs=False)),
    "generate, 1 draft": (Way("", num_drafts=1), Way("no_drafts")),
    "generate, 2 drafts": (Way("", num_drafts=2), Way("no_drafts")),
}


class Going:
    """A generation of some sequences under way."""

    def __init__(self, model: Transformer, batch: int, way: Way, patch: pytest.MonkeyPatch) -> None:
        prompts = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT)).tolist()
        most = (way.num_drafts + 1) * (WARMUP + ROUNDS * STEPS + 1)  # nobody ends before
        with patch.context() as inner:
            if not way.by_graphs:
                inner.setattr(module, "can_be_captured", lambda model: False)
            self.generation = Generation(model, prompts, GenerateOptions(most, num_drafts=way.num_drafts))
        self._steps = iter(self.generation)
        self.advance(WARMUP)

    def advance(self, num_steps: int = STEPS) -> tuple[float, int]:
        """Seconds of so many steps, and the tokens they gave; a step ends when its tokens are on the host."""
        tokens, start = 0, time.perf_counter()
        for _ in range(num_steps):
            tokens += sum(len(new) for _, new in next(self._steps))
        return time.perf_counter() - start, tokens


def stand_by_lot(logits_BLV: Tensor, drafts: Drafts, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """As `verify`, which is called as well, but for how many stand."""
    _, last_B = verify(logits_BLV, drafts, sampler)
    shape = drafts.tokens_BK.shape
    stands_BK = torch.rand(shape, generator=sampler.generator, device=last_B.device) < STANDS
    return stands_BK.long().cumprod(dim=1).sum(dim=1), last_B


@pytest.fixture(scope="module")
def model() -> Iterator[Transformer]:
    torch.manual_seed(0)
    model = Transformer(CONFIG, dtype=torch.bfloat16, device="cuda")
    set_precision(model, "fp8", orientations=1)
    yield model
    del model
    free()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_bench_generate(
    request: pytest.FixtureRequest,
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
    model: Transformer,
    name: str,
    batch: int,
) -> None:
    """Microseconds a token, of all sequences together; both are under way and take turns."""
    monkeypatch.setattr(module, "verify", stand_by_lot)
    ways = CASES[name]
    ours, peer = (Going(model, batch, way, monkeypatch) for way in ways)
    windows = [(ours.advance(), peer.advance()) for _ in range(ROUNDS)]
    mine, theirs = ([seconds / tokens for seconds, tokens in side] for side in zip(*windows, strict=True))
    layers = f"{CONFIG.num_layers}layers_{CONFIG.num_experts}experts"
    case = Case(name, f"{layers}_{batch}sequences_{PROMPT}tokens", "us")
    line: dict[str, Any] = figures(case, median(mine), Peer(ways[1].peer, lambda: None), median(theirs))
    line |= {
        "tokens_per_s": round(1 / median(mine)),
        "peer_tokens_per_s": round(1 / median(theirs)),
        "us_per_step": round(median(one[0][0] for one in windows) / STEPS * 1e6, 1),
        "peer_us_per_step": round(median(one[1][0] for one in windows) / STEPS * 1e6, 1),
        "stood": round(ours.generation.acceptance, 3),
    }
    with request.getfixturevalue("capsys").disabled():
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
    record(request, benchmark, mine, line)
