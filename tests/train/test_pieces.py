"""Checkpoints of pieces: saved as some rows here and some there, loaded as any others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dsv3rt.train import checkpoint
from dsv3rt.train.average import Average
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.pieces import Piece, SavePlanner

WHOLE = torch.arange(35.0).view(7, 5)


def save(root: Path, tensors: dict[str, Tensor]) -> Path:
    return checkpoint.save(root, RunState(step=1), tensors, "", 0)


@pytest.mark.parametrize("rows", [range(7), range(3), range(2, 6), range(6, 7), range(7, 7)])
def test_any_rows_of_a_whole_tensor(tmp_path: Path, rows: range) -> None:
    folder = save(tmp_path, {"w": WHOLE})
    mine = torch.full((len(rows), 5), -1.0)
    checkpoint.load(folder, {"w": mine}, {"w": Piece((7, 5), rows.start)})
    assert torch.equal(mine, WHOLE[rows.start : rows.stop])


def test_pieces_of_two_ranks_make_a_whole(tmp_path: Path) -> None:
    """Two ranks' plans, put together as the coordinator does; the piece that both hold is saved once."""
    parts = [{"w": WHOLE[:4], "b": torch.ones(3)}, {"w": WHOLE[4:], "b": torch.ones(3)}]
    places = [{"w": Piece((7, 5), 0)}, {"w": Piece((7, 5), 4), "b": Piece((3,), 0, is_saved_here=False)}]
    planners = [SavePlanner(*one) for one in zip(parts, places, strict=True)]
    plans = []
    for rank, planner in enumerate(planners):
        planner.set_up_planner(parts[rank], is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    merged, metadata = planners[0].create_global_plan(plans)
    assert [len(plan.items) for plan in merged] == [2, 1]
    assert metadata.state_dict_metadata["w"].size == torch.Size([7, 5])
    assert [chunk.offsets[0] for chunk in metadata.state_dict_metadata["w"].chunks] == [0, 4]
    assert isinstance(metadata.state_dict_metadata["b"], dcp.TensorStorageMetadata)


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, {"w": WHOLE})
    with pytest.raises(ValueError, match=r"w of shape \(8, 5\) is wanted, the checkpoint has \(7, 5\)"):
        checkpoint.load(folder, {"w": torch.zeros(4, 5)}, {"w": Piece((8, 5), 4)})
    with pytest.raises(ValueError, match=r"v of shape \(2,\) is wanted, the checkpoint has nothing"):
        checkpoint.load(folder, {"v": torch.zeros(2)})


def test_average_follows_the_weights() -> None:
    master = torch.tensor([1.0, 2.0])
    average = Average({"w": master}, decay=0.75)
    for number in (1, 2):
        average.wait()
        master += 4.0
        average.update(number)
    # 1 -> (3 * 1 + 5) / 4 = 2 -> (3 * 2 + 9) / 4
    assert torch.equal(average.tensors()["w"], torch.tensor([3.75, 4.75]))
    assert average.tensors()["w"] is average.tensors()["w"]


@pytest.mark.parametrize("every", [1, 3, 20])
def test_average_goes_through_every_piece(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven pieces in turn, each once in `every` updates."""
    monkeypatch.setattr("dsv3rt.train.average.PIECE", 4)
    masters = {"a": torch.randn(3, 5), "none": torch.empty(0, 2), "one": torch.randn(()), "b": torch.randn(8)}
    average = Average(masters, decay=0.5, every=every)
    before = {name: value.clone() for name, value in average.tensors().items()}
    for master in masters.values():
        master += 1.0
    moved, unmoved = [], sum(master.numel() for master in masters.values())
    for number in range(1, every + 1):
        average.update(number)
        still = sum(int(value.eq(before[name]).sum()) for name, value in average.tensors().items())
        moved.append(unmoved - still)
        unmoved = still
    assert unmoved == 0
    assert max(moved) <= 4 * -(-7 // every)
    left = 0.5**every
    for name, value in average.tensors().items():
        assert value.shape == masters[name].shape
        # Two products and a sum, each rounded, on either side.
        torch.testing.assert_close(value, left * before[name] + (1 - left) * masters[name], rtol=2**-22, atol=2**-22)
