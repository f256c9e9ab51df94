"""Weights that multiply in FP8: their casts, and their copies in the model's dtype, which are there only while somebody
needs them.

Where something else keeps the numbers, such as an optimizer's FP32 masters, the copy is released once the cast exists:
shape, dtype and the parameter itself stay, its memory goes. A released weight reads as NaN and can't be written;
whoever multiplies in the model's dtype asks `readable` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.ops.types import TILE, QuantTensor, ceil_div

Cast = tuple[QuantTensor, QuantTensor | None]  # w and, where it is kept, w^T
Orientations = Literal[1, 2]


def transposed(cast: Cast) -> QuantTensor:
    """w^T, as it is kept or made for the caller."""
    w, w_t = cast
    return ops.transpose_128x128(w) if w_t is None else w_t


def is_released(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() < weight.numel() * weight.element_size()


def readable(weight: nn.Parameter) -> nn.Parameter:
    """The weight itself.

    Raises:
        ValueError: its copy was released.
    """
    if is_released(weight):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} must be restored before it is read as "
            f"{str(weight.dtype).removeprefix('torch.')} (AdamW.restore_weights), got one that is kept in FP8 alone"
        )
    return weight


def release(weight: nn.Parameter) -> None:
    weight.data = weight.data.new_full((), torch.nan).expand(weight.shape)


def allocate(weight: nn.Parameter) -> None:
    """Memory for a released copy, without its numbers."""
    if is_released(weight):
        weight.data = weight.data.new_empty(weight.shape)


class WeightCast:
    """Weights on top of each other, cast in 128x128 blocks, again only after they have changed.

    Both orientations are kept, or w alone, a byte a number less; then w^T is made each time it is needed.

    What counts as a change is torch's version counter of a parameter, and another parameter in its place. Who writes
    weights behind torch's back (through `.data`, or a kernel) calls `torch.autograd.graph.increment_version`.
    """

    def __init__(self) -> None:
        self.weights: tuple[nn.Parameter, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._cast: Cast | None = None
        self._orientations: Orientations = 2

    @property
    def orientations(self) -> Orientations:
        return self._orientations

    def keep(self, orientations: Orientations) -> None:
        """From the next cast on, which another number brings about."""
        if orientations != self._orientations:
            self._orientations, self._cast = orientations, None

    def of(self, *weights: nn.Parameter) -> Cast:
        """(w, w^T or None): (F, D) and (D, F), with a leading X for experts; several weights are stacked along F.

        Raises:
            ValueError: they have changed since the cast, and the copy of one was released.
        """
        same = len(weights) == len(self.weights) and all(a is b for a, b in zip(weights, self.weights, strict=True))
        if not same:
            self.weights, self._cast = weights, None
        if self._cast is None or self._versions != _versions(weights):
            self.renew()
        assert self._cast is not None
        return self._cast

    @torch.no_grad()
    def renew(self) -> None:
        """Cast the weights as they are now."""
        weights: list[Tensor] = [readable(weight) for weight in self.weights]
        self._cast = None  # the old cast's memory is free for the new one
        stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
        if self._orientations == 2:
            self._cast = ops.quantize_128x128(stacked, with_transpose=True)
        else:
            self._cast = ops.quantize_128x128(stacked), None
        self.written()

    def part(self, weight: nn.Parameter) -> Cast | None:
        """What of the last cast is `weight`'s, to be written in place (`written` must follow); None where several
        weights share a block."""
        assert self._cast is not None
        if len(self.weights) == 1:
            return self._cast
        firsts = [0, *accumulate(one.shape[0] for one in self.weights)]
        if any(first % TILE for first in firsts[:-1]):
            return None
        index = next(i for i, one in enumerate(self.weights) if one is weight)
        rows = slice(firsts[index], firsts[index + 1])
        blocks = slice(rows.start // TILE, ceil_div(rows.stop, TILE))
        w, w_t = self._cast
        part = QuantTensor(w.data[rows], w.scale[blocks], w.tile)
        return part, None if w_t is None else QuantTensor(w_t.data[:, rows], w_t.scale[:, blocks], w_t.tile)

    def written(self) -> None:
        """The cast is that of the weights as they are now."""
        self._versions = _versions(self.weights)


Stack = tuple[WeightCast, tuple[nn.Parameter, ...]]


@runtime_checkable
class MultipliesInFp8(Protocol):
    """A module that says which casts it multiplies with, and of which weights: none where it doesn't in FP8."""

    def fp8_weights(self) -> Sequence[Stack]: ...


def casts_of(model: nn.Module) -> list[WeightCast]:
    """Those that the modules of `model` multiply with, bound to their weights, of which each is in one cast alone."""
    found: list[WeightCast] = []
    taken: set[int] = set()
    for module in model.modules():  # parents, who stack weights of their children, come before these
        for cast, weights in module.fp8_weights() if isinstance(module, MultipliesInFp8) else ():
            if taken.isdisjoint(map(id, weights)):
                taken.update(map(id, weights))
                cast.weights = weights
                found.append(cast)
    return found


def release_copies(model: nn.Module) -> None:
    """Cast all weights that `model` multiplies with in FP8 and release their copies.

    Their numbers are lost but for the casts, unless the caller keeps them.
    """
    for cast in casts_of(model):
        cast.of(*cast.weights)
        for weight in cast.weights:
            release(weight)


def require_copies(op: str, model: nn.Module) -> None:
    """Every weight of `model` can be read in its dtype.

    Raises:
        ValueError: one can't.
    """
    for name, parameter in model.named_parameters():
        if is_released(parameter):
            raise ValueError(f"{op}: model must hold its weights (AdamW.restore_weights), got {name} in FP8 alone")


def weight_bytes(model: nn.Module) -> int:
    """What the weights of `model` take once the copies of those in FP8 are released; the model may be on "meta"."""
    casts = casts_of(model)
    in_fp8 = {id(weight) for cast in casts for weight in cast.weights}
    others = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in in_fp8)
    return others + sum(map(_cast_bytes, casts))


def _cast_bytes(cast: WeightCast) -> int:
    *leading, _, columns = cast.weights[0].shape
    rows = sum(weight.shape[-2] for weight in cast.weights)
    tiles = ceil_div(rows, TILE) * ceil_div(columns, TILE)
    return cast.orientations * torch.Size(leading).numel() * (rows * columns + 4 * tiles)


class Copies:
    """Copies of weights in the model's dtype, as an optimizer makes them for a while from numbers that it keeps."""

    def __init__(self, casts: Iterable[WeightCast]) -> None:
        self._cast_of = {id(weight): cast for cast in casts for weight in cast.weights}

    def together(self, weights: Iterable[nn.Parameter]) -> set[int]:
        """The ids of these weights and of those that are cast with them."""
        found: set[int] = set()
        for weight in weights:
            cast = self._cast_of.get(id(weight))
            found.update((id(weight),) if cast is None else map(id, cast.weights))
        return found

    def settle(self, weights: Iterable[nn.Parameter], pending: set[int]) -> None:
        """Cast these again, which have new numbers, and release their copies; with others that are still `pending`
        later, when those settle."""
        for cast in self._casts(weights):
            if pending.isdisjoint(map(id, cast.weights)):
                cast.renew()
                self._release(cast)

    def part(self, weight: nn.Parameter) -> Cast | None:
        """Where an optimizer may write the new cast of a weight by itself, if there is such a place; `written` must
        follow."""
        cast = self._cast_of.get(id(weight))
        return None if cast is None else cast.part(weight)

    def written(self, weights: Iterable[nn.Parameter]) -> None:
        """The casts of these are up to date, their copies, if there are any, not."""
        for cast in self._casts(weights):
            cast.written()
            self._release(cast)

    def release(self) -> None:
        for weight_id, cast in self._cast_of.items():
            if weight_id == id(cast.weights[0]):
                self._release(cast)

    def _casts(self, weights: Iterable[nn.Parameter]) -> list[WeightCast]:
        found = (self._cast_of.get(id(weight)) for weight in weights)
        return list({id(cast): cast for cast in found if cast is not None}.values())

    @staticmethod
    def _release(cast: WeightCast) -> None:
        for weight in cast.weights:
            if not is_released(weight):
                release(weight)


def _versions(weights: Sequence[nn.Parameter]) -> tuple[int, ...]:
    return tuple(weight._version for weight in weights)
