"""AdamW over FP32 master weights and FP32 gradient sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.config import OptimConfig
from dsv3rt.layers.weights import Cast, Copies, WeightCast, allocate
from dsv3rt.ops.types import AdamWHyper, AdamWSlot
from dsv3rt.parallel.zero import Gradients, Sum


@dataclass
class _Slot:
    """The optimizer state of one parameter's rows that this rank keeps. `master` views the parameter where that is
    FP32."""

    sum: Sum
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool

    @property
    def rows(self) -> Tensor:
        """Of the parameter itself. To write them changes no version (`AdamW._renew` tells of changes)."""
        return self.sum.parameter.data[self.sum.share.rows]

    @property
    def is_rounded(self) -> bool:
        return self.sum.parameter.dtype != torch.float32

    @property
    def is_whole(self) -> bool:
        """Whether this rank keeps all rows, and no other any."""
        return len(self.sum.share.ranks) == 1

    def tensors(self, cast: Cast | None = None) -> AdamWSlot:
        """cast: where the new numbers go instead of the parameter's rows."""
        assert self.sum.shard is not None
        param = self.rows if self.is_rounded and cast is None else None
        return AdamWSlot(self.master, self.sum.shard, self.exp_avg, self.exp_avg_sq, param, cast=cast)


def _round(slots: Iterable[_Slot]) -> None:
    """Masters into the rows of parameters that aren't FP32."""
    for slot in slots:
        if slot.is_rounded:
            slot.rows.copy_(slot.master)


class AdamW:
    """AdamW with decoupled weight decay on matrices only: norm weights and every other 1-D parameter do not decay.

    From construction on, every backward adds its gradients to FP32 sums (and leaves `parameter.grad` None) until `step`
    uses them up. Parameters without a gradient are left alone. Between the last backward and `step`, `reduce`.

    Weights that multiply in FP8 have no copy in the model's dtype but between `restore_weights` and `release_weights`,
    and, where ranks share them, for a while inside `step`, a bucket at a time; a rank that keeps a whole weight writes
    the cast itself. FP32 parameters are their own masters and stay.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        gradients: Gradients | None = None,
        casts: Iterable[WeightCast] = (),
    ) -> None:
        """gradients: of the same parameters, where more than one process trains them. casts: of what multiplies in FP8
        (`layers.weights.casts_of`)."""
        moment_dtype = torch.float32 if config.moment_dtype == "float32" else torch.bfloat16
        self._config = config
        self.gradients = Gradients.whole(parameters) if gradients is None else gradients
        self._slots: dict[str, _Slot] = {}
        for name, one in self.gradients.sums.items():
            rows = one.parameter.detach()[one.share.rows]
            self._slots[name] = _Slot(
                sum=one,
                master=rows if rows.dtype == torch.float32 else rows.float(),
                exp_avg=torch.zeros_like(rows, dtype=moment_dtype),
                exp_avg_sq=torch.zeros_like(rows, dtype=moment_dtype),
                decays=one.parameter.dim() >= 2,
            )
        rounded = {id(slot.sum.parameter) for slot in self._slots.values() if slot.is_rounded}
        self._copies = Copies(cast for cast in casts if rounded.issuperset(map(id, cast.weights)))
        self._copies.settle([slot.sum.parameter for slot in self._slots.values()], pending=set())

    def reduce(self, idle: frozenset[str] = frozenset()) -> None:
        """Bring the sums of all ranks together; `idle` parameters took no part in the step on any rank."""
        self.gradients.reduce(idle)

    def squares(self, names: Sequence[str], device: torch.device) -> Tensor:
        """(len(names),) FP64, to be added up over the ranks: the squared norms of the gradient shards held here."""
        shards = {name: slot.sum.shard for name, slot in self._slots.items() if slot.sum.shard is not None}
        nothing = torch.empty(0, device=device)
        return ops.grad_norms([shards.get(name, nothing) for name in names]).square()

    @staticmethod
    def norm(squares: Tensor) -> Tensor:
        """The global 2-norm, FP32, from the sum of all ranks' `squares`.

        All of it is FP64 and only the result is rounded, so it does not depend on how parameters are cut into shards.
        """
        return squares.sum().sqrt().float()

    def grad_norm(self) -> Tensor:
        """The 2-norm of the gradient sums, FP32, on their device; for one process."""
        self.reduce()
        return self.norm(self.squares(list(self._slots), next(iter(self._slots.values())).master.device))

    @torch.no_grad()
    def step(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """Update number `step` (from 1), gradients clipped to the configured norm; the sums are dropped."""
        scale = (self._config.clip_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)

        def update(slots: Sequence[_Slot], casts: Sequence[Cast | None]) -> None:
            for decays in (True, False):
                used = [slot.tensors(cast) for slot, cast in zip(slots, casts, strict=True) if slot.decays == decays]
                ops.adamw_step(used, hyper=self._hyper(lr, decays), step=step, grad_scale=scale)
            for slot in slots:
                slot.sum.shard = None

        def write(slots: list[_Slot]) -> None:
            _round([slot for slot in slots if slot.sum.shard is None])
            used = [slot for slot in slots if slot.sum.shard is not None]
            update(used, [None] * len(used))

        used = [slot for slot in self._slots.values() if slot.sum.shard is not None]
        casts = [self._copies.part(slot.sum.parameter) if slot.is_whole else None for slot in used]
        direct = {slot.sum.name: cast for slot, cast in zip(used, casts, strict=True) if cast is not None}
        written = [self._slots[name] for name in direct]
        update(written, list(direct.values()))
        self._tell([slot.sum.parameter for slot in written])
        self._copies.written([slot.sum.parameter for slot in written])
        self._renew([slot for slot in used if slot.sum.name not in direct], write)

    def drop_gradients(self) -> None:
        """Forget the gradient sums, as if there had been no backward."""
        self.gradients.drop()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round loaded masters into the parameters, and fetch those of other ranks; FP32 ones are their own masters."""
        self._renew(self._slots.values(), _round)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Give every weight its copy in the model's dtype again, until `release_weights` or an update; all ranks
        together."""
        for _ in self._write(self._slots.values(), _round):
            pass

    def release_weights(self) -> None:
        """Undo `restore_weights`."""
        self._copies.release()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by checkpoint name; the tensors themselves, so that loading into them restores it.

        `write_parameters` must follow. A master is saved under the name of its parameter, which is its rounding.
        """
        named: dict[str, Tensor] = {}
        for name, slot in self._slots.items():
            named[f"model.{name}"] = slot.master
            named[f"exp_avg.{name}"] = slot.exp_avg
            named[f"exp_avg_sq.{name}"] = slot.exp_avg_sq
        return named

    def masters(self) -> dict[str, Tensor]:
        """The FP32 rows that this rank keeps, by parameter name."""
        return {name: slot.master for name, slot in self._slots.items()}

    def _renew(self, slots: Iterable[_Slot], update: Callable[[list[_Slot]], None]) -> None:
        """New numbers for the parameters of these slots: casts follow, and copies of what is in FP8 go."""
        together = self._copies.together(slot.sum.parameter for slot in slots)
        pending = set(together)
        for written in self._write([s for s in self._slots.values() if id(s.sum.parameter) in together], update):
            parameters = [slot.sum.parameter for slot in written]
            self._tell(parameters)
            pending.difference_update(map(id, parameters))
            self._copies.settle(parameters, pending)

    def _write(self, slots: Iterable[_Slot], update: Callable[[list[_Slot]], None]) -> Iterator[list[_Slot]]:
        """Bring the parameters of these slots up to date, a bucket at a time: `update` writes the rows kept here, other
        ranks send theirs."""
        named = {slot.sum.name: slot for slot in slots}
        for bucket in self.gradients.buckets():
            here = [named[one.name] for one in bucket.sums if one.name in named]
            if not here:
                continue
            for slot in here:
                allocate(slot.sum.parameter)
            update(here)
            bucket.gather(named)
            yield here

    @staticmethod
    def _tell(parameters: list[nn.Parameter]) -> None:
        """Neither kernels nor `.data` tell torch of a change; casts of weights go by versions."""
        torch.autograd.graph.increment_version(parameters)

    def _hyper(self, lr: float, decays: bool) -> AdamWHyper:
        config = self._config
        return AdamWHyper(lr, config.beta1, config.beta2, config.eps, config.weight_decay if decays else 0.0)
