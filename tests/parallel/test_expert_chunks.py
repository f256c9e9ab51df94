"""A micro-batch's tokens cut into chunks: the same numbers, and each phase waits for its own chunk alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chunks_worker import KINDS
from fleet import configuration, output_of, torchrun

from dsv3rt.parallel.pipeline.lanes import Lanes, OfChunk, Phase, Walk


@pytest.mark.parametrize("size", [2, 4])
def test_chunks_change_no_result(tmp_path: Path, size: int) -> None:
    """Of a token, to the bit where products of other heights are the same; weight gradients but for the sums' order."""
    out = tmp_path / "out.json"
    output_of(torchrun(size, "-m", "tests.parallel.chunks_worker", str(out)), timeout=300)
    for rank, cases in enumerate(json.loads(out.read_text())):
        assert len(cases) == 4 * 2 * (len(KINDS) + 2)
        wrong = [(case, name) for case, found in cases.items() for name, same in found.items() if not same]
        assert not wrong, f"rank {rank} of {size}"


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"dp": 2, "ep": 2, "expert_chunks": 0}, r"parallel\.expert_chunks must be positive, got 0"),
        ({"dp": 2, "expert_chunks": 2}, r"parallel\.expert_chunks must be 1 without ep, got 2"),
        (
            {"dp": 2, "ep": 2, "expert_chunks": 33},
            r"parallel\.expert_chunks must be at most a micro-batch's 32 tokens, got 33",
        ),
    ],
)
def test_config_rejects_chunks(parallel: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        configuration({"parallel": parallel})


class _Stream:
    """Names what it records, and notes what it waits for."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self._name = name
        self._seen = seen
        self._awaited: list[str] = []

    def wait_event(self, event: str) -> None:
        self._awaited.append(event)

    def record_event(self) -> str:
        done = f"{self._name}{len(self._seen)}"
        self._seen.append(f"{done} after {' '.join(self._awaited) or 'nothing'}")
        self._awaited = []
        return done


def test_a_chunk_waits_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    caller, computes, communicates = (_Stream(name, seen) for name in ("caller", "e", "c"))
    lanes = Lanes(torch.device("cpu"))
    lanes._streams = {False: computes, True: communicates}  # type: ignore[dict-item]
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)

    def phases() -> Iterator[Phase | OfChunk]:
        yield "attention"
        yield from (OfChunk("dispatch", chunk) for chunk in (0, 1))
        yield OfChunk("experts", 2)
        yield from (OfChunk("experts", chunk) for chunk in (0, 1))
        yield from (OfChunk("combine", chunk) for chunk in (0, 1))
        yield "combine"
        yield "attention"
        yield OfChunk("dispatch", 0)

    Walk(phases(), lanes).finish()
    assert seen == [
        "caller0 after nothing", "e1 after caller0", "c2 after e1", "c3 after e1", "e4 after e1", "e5 after c2",
        "e6 after c3", "c7 after e5", "c8 after e6", "c9 after e1 c7 c8 e4", "e10 after c9", "c11 after e10",
    ]  # fmt: skip
    assert caller._awaited == ["e10", "c11"]
