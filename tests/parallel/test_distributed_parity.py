"""Four processes train as one does: every schedule, pipeline, data and expert parallelism, MTP on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fleet import Sections, other_lengths, torchrun, train

from dsv3rt.config import ParallelConfig

SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipev", "dualpipe")
ALL = ["norm", "mla_up", "swiglu", "experts"]


def layout(pp: int, dp: int, ep: int = 1, schedule: str = "1f1b") -> dict[str, Any]:
    return {"pp": pp, "dp": dp, "ep": ep, "schedule": schedule, "bucket_mb": 0.02}


LAYOUTS = {
    **{f"pp4-{kind}": layout(4, 1, 1, kind) for kind in SCHEDULES},
    **{f"pp2-dp2-ep2-{kind}": layout(2, 2, 2, kind) for kind in SCHEDULES},
    "dp4": layout(1, 4),
    "dp4-ep4": layout(1, 4, 4),
    "pp2-dp2": layout(2, 2),
}
JOBS: dict[str, Sections] = {
    **{name: {"parallel": parallel} for name, parallel in LAYOUTS.items()},
    "pp2-dp2-ep2-computed-again": {"parallel": layout(2, 2, 2, "dualpipev"), "train": {"recompute": ALL}},
    "dp4-ep2-chunks3": {"parallel": {**layout(1, 4, 2), "expert_chunks": 3}},
    "pp2-dp2-ep2-zb1p-chunks2": {"parallel": {**layout(2, 2, 2, "zb1p"), "expert_chunks": 2}},
    "pp2-dp2-ep2-dualpipev-chunks3-computed-again": {
        "parallel": {**layout(2, 2, 2, "dualpipev"), "expert_chunks": 3},
        "train": {"recompute": ALL},
    },
}
# The same numbers to the bit as the layout that each begins with.
SAME: dict[str, Sections] = {
    "pp2-dp2-ep2-dualpipe/one-small-parcel": {
        "parallel": {**layout(2, 2, 2, "dualpipe"), "bucket_mb": 0.001, "buckets_in_flight": 1},
    },
    "pp2-dp2-ep2-zb1p/one-put-off": {"parallel": {**layout(2, 2, 2, "zb1p"), "put_off": 1}},
    "dp4-ep4/room": {"parallel": {**layout(1, 4, 4), "expert_capacity": 4.0}},
}  # fmt: skip
# Where nothing is summed in another order, bit for bit. Without MTP, as the embedding's two uses are then on two ranks.
# None clips: the gradient norm is put together from pieces, and its last bit differs in some steps (in pp4, too).
EXACT: dict[str, Sections] = {
    **{
        f"exact-pp4-{kind}": {
            "parallel": layout(4, 1, 1, kind), "train": {"mtp_weight": 0.0}, "optim": {"clip_grad_norm": 1e9},
        }
        for kind in SCHEDULES[:4]
    },
    "exact-dp4": {
        "parallel": layout(1, 4), "train": {"batch_size": 4}, "optim": {"clip_grad_norm": 1e9},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all jobs, from one start of four processes; under "one" what one process gets."""
    folder = tmp_path_factory.mktemp("fleet")
    jobs, out = folder / "jobs.json", folder / "out.json"
    jobs.write_text(json.dumps({**JOBS, **EXACT, **SAME}))
    workers = torchrun(4, str(Path(__file__).with_name("fleet.py")), str(jobs), str(out))
    try:
        one = {name: train({**job, "parallel": {}}) for name, job in {"one": {}, **EXACT}.items()}
        output, _ = workers.communicate(timeout=500)
    finally:
        workers.kill()
    assert workers.returncode == 0, output
    return {**json.loads(out.read_text()), "one": one}


@pytest.mark.parametrize("name", JOBS)
def test_losses_equal_one_process(results: dict[str, Any], name: str) -> None:
    """Within 1e-6 over 20 steps: FP32 rounds to 6e-8, and 20 steps leave sums in another order little time to grow
    apart. Every micro-batch of the first step goes to the same experts: later, a token may sit on the edge."""
    want, got = results["one"]["one"], results[name]
    assert len(got["steps"]) == len(want["steps"]) == 20
    for step, (ours, one) in enumerate(zip(got["steps"], want["steps"], strict=True)):
        assert ours[:3] == pytest.approx(one[:3], rel=1e-6), step
    assert got["val_loss"] == pytest.approx(want["val_loss"], rel=1e-6)
    assert got["steps"][0][3] == pytest.approx(want["steps"][0][3], rel=1e-6)
    assert got["steps"][0][4] == want["steps"][0][4]
    assert got["choices"][0] == want["choices"][0]


@pytest.mark.parametrize("name", EXACT)
def test_losses_are_bitwise_where_sums_have_one_order(results: dict[str, Any], name: str) -> None:
    want, got = results["one"][name], results[name]
    assert [row[0] for row in got["steps"]] == [row[0] for row in want["steps"]]
    assert [row[4] for row in got["steps"]] == [row[4] for row in want["steps"]]
    assert got["val_loss"] == want["val_loss"]


@pytest.mark.parametrize("name", SAME)
def test_parcels_and_room_change_no_bit(results: dict[str, Any], name: str) -> None:
    other = results[name.split("/")[0]]
    assert results[name]["steps"] == other["steps"]
    assert results[name]["val_loss"] == other["val_loss"]


def test_jobs_differ_where_they_should(results: dict[str, Any]) -> None:
    """The comparison can fail: another batch or no MTP gives other losses."""
    one = results["one"]
    assert abs(one["exact-dp4"]["val_loss"] / one["one"]["val_loss"] - 1) > 1e-4
    assert abs(one["exact-pp4-1f1b"]["val_loss"] / one["one"]["val_loss"] - 1) > 1e-5


def test_gradients_set_out_during_the_backward(results: dict[str, Any]) -> None:
    """All buckets but those with a parameter that this rank does not use, in every layout that reduces any."""
    early = {name: results[name]["early"] for name in LAYOUTS}
    assert all(early[name] >= 2 for name in ("dp4", "dp4-ep4", "pp2-dp2", "pp2-dp2-ep2-dualpipe", "pp4-dualpipe"))
    assert results["dp4-ep2-chunks3"]["early"] >= 2
    assert results["one"]["one"]["early"] == 0


def test_micro_batches_may_differ_in_length(results: dict[str, Any]) -> None:
    """Main and MTP losses to the bit: each comes from one rank."""
    alone = other_lengths(ParallelConfig())
    assert [row[:2] for row in results["lengths"]] == [row[:2] for row in alone]
    assert len({row[0] for row in alone}) == 8


@pytest.mark.parametrize("block", ["1", "4"])
def test_experts_get_rows_as_if_all_tokens_were_here(results: dict[str, Any], block: str) -> None:
    """To the bit and in the same places, with and without padding."""
    for rank, found in enumerate(results["exchange"][block]):
        assert all(found.values()), (rank, found)


def test_more_rows_than_room_stop_every_rank(results: dict[str, Any]) -> None:
    """4 ranks x 64 rows for one expert; twice an even load of 64, and a row of padding for each of 2 experts."""
    assert results["overflow"] == ["expert exchange: rank 0 found 256 rows for 130: raise capacity"] * 4


def test_a_failure_is_everyones(results: dict[str, Any]) -> None:
    heard = [told for told, _, _ in results["failure"]]
    peer = "PeerError: rank 2: something of rank 2"
    assert heard == [peer, peer, "ValueError: something of rank 2", peer]
    assert all(after == ["of rank 0", [3, 1]] for _, *after in results["failure"])
