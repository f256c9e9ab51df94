"""AdamW over FP32 master weights and FP32 gradient sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.config import OptimConfig
from dsv3rt.ops.types import AdamWHyper


@dataclass
class _Slot:
    """One parameter's optimizer state. `master` is the parameter itself where that is FP32."""

    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool
    grad: Tensor | None = None

    def take_grad(self, parameter: Tensor) -> None:
        """Move the gradient that backward has just finished into the FP32 sum, and free it."""
        assert parameter.grad is not None
        if self.grad is None:
            self.grad = parameter.grad.float()
        else:
            self.grad.add_(parameter.grad)
        parameter.grad = None


class AdamW:
    """AdamW with decoupled weight decay on matrices only: norm weights and every other 1-D parameter do not decay.

    From construction on, every backward adds its gradients to FP32 sums (and leaves `parameter.grad` None) until `step`
    uses them up. Parameters without a gradient are left alone.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        moment_dtype = torch.float32 if config.moment_dtype == "float32" else torch.bfloat16
        self._config = config
        self._slots: dict[str, _Slot] = {}
        for name, parameter in parameters:
            value = parameter.detach()
            slot = _Slot(
                parameter=parameter,
                master=value if value.dtype == torch.float32 else value.float(),
                exp_avg=torch.zeros_like(value, dtype=moment_dtype),
                exp_avg_sq=torch.zeros_like(value, dtype=moment_dtype),
                decays=parameter.dim() >= 2,
            )
            parameter.register_post_accumulate_grad_hook(slot.take_grad)
            self._slots[name] = slot

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the gradient sums, FP32, on their device."""
        grads = [slot.grad for slot in self._slots.values() if slot.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def step(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """Update number `step` (from 1), gradients clipped to the configured norm; the sums are dropped."""
        scale = (self._config.clip_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for slot in self._slots.values():
            if slot.grad is None:
                continue
            ops.adamw_step(
                slot.master,
                slot.grad,
                slot.exp_avg,
                slot.exp_avg_sq,
                hyper=self._hyper(lr, slot.decays),
                step=step,
                grad_scale=scale,
                param=None if slot.parameter.dtype == torch.float32 else slot.parameter,
            )
            slot.grad = None

    def drop_gradients(self) -> None:
        """Forget the gradient sums, as if there had been no backward."""
        for slot in self._slots.values():
            slot.grad = None

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round loaded masters into the parameters; FP32 parameters are their own masters."""
        for slot in self._slots.values():
            if slot.parameter.dtype != torch.float32:
                slot.parameter.copy_(slot.master)

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

    def _hyper(self, lr: float, decays: bool) -> AdamWHyper:
        config = self._config
        return AdamWHyper(lr, config.beta1, config.beta2, config.eps, config.weight_decay if decays else 0.0)
