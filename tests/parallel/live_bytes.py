"""What is really held: the bytes of all memory that a piece of code has allocated and somebody still refers to."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes the memory of every tensor that an operation returns, inside autograd's own functions too."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, str]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), f"{func} {tuple(tensor.shape)} {tensor.dtype}")
        self.peak = max(self.peak, self.total())
        return result

    def alive(self) -> list[tuple[int, str]]:
        """Bytes, and which operation made them, largest first."""
        found = []
        for reference, operation in self._seen.values():
            if not reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                found.append((0 if storage is None else storage.nbytes(), operation))
        return sorted(found, reverse=True)

    def total(self) -> int:
        return sum(size for size, _ in self.alive())
