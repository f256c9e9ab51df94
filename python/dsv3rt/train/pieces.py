"""Tensors of which a rank holds some rows, as torch.distributed.checkpoint saves and loads them.

A checkpoint knows whole tensors by name and the rows in each file; so any rank of any other layout finds its own rows.
(DTensor would describe them too, but not rows that are dealt out first by expert and then by data-parallel rank,
without relying on torch's private placements.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Piece:
    """Which rows of a tensor a rank holds: from `first_row` of one of this `shape`. Of several ranks that hold the
    same rows one saves them."""

    shape: tuple[int, ...]
    first_row: int = 0
    is_saved_here: bool = True


class _Pieces:
    """Tensors by name, and where they lie."""

    def __init__(self, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> None:
        self._tensors = tensors
        self._pieces = pieces

    def piece(self, name: str) -> Piece:
        return self._pieces.get(name) or Piece(tuple(self._tensors[name].shape))

    def chunk(self, name: str) -> ChunkStorageMetadata:
        sizes = self._tensors[name].shape
        offsets = Size((self.piece(name).first_row, *(0 for _ in sizes[1:]))) if len(sizes) else Size(())
        return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


class SavePlanner(DefaultSavePlanner):
    """Plans to save this rank's pieces."""

    def __init__(self, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors
        self._pieces = _Pieces(tensors, pieces)

    def create_local_plan(self) -> SavePlan:
        saved = [
            name
            for name, tensor in self._tensors.items()
            if self._pieces.piece(name).is_saved_here and tensor.numel() > 0
        ]
        self.plan = SavePlan([self._item(name) for name in saved])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._tensors[index.fqn]

    def _item(self, name: str) -> WriteItem:
        chunk = self._pieces.chunk(name)
        properties = TensorProperties.create_from_tensor(self._tensors[name])
        data = TensorWriteData(chunk=chunk, properties=properties, size=Size(self._pieces.piece(name).shape))
        return WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


class LoadPlanner(DefaultLoadPlanner):
    """Plans to fill this rank's tensors in place from whichever pieces the checkpoint has."""

    def __init__(self, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors
        self._pieces = _Pieces(tensors, pieces)

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, tensor in self._tensors.items():
            saved = self.metadata.state_dict_metadata.get(name) if self.metadata is not None else None
            shape = self._pieces.piece(name).shape
            if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != shape:
                found = "nothing" if saved is None else tuple(getattr(saved, "size", ()))
                raise ValueError(f"{name} of shape {shape} is wanted, the checkpoint has {found}")
            if tensor.numel() > 0:
                items += create_read_items_for_chunk_list(name, saved, [self._pieces.chunk(name)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._tensors[index.fqn]
