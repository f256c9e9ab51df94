"""The auxiliary-loss-free router."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.ops.types import Routing


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight^T in FP32. Differentiable."""
    if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16:
        return cast(Tensor, _WideProduct.apply(x_TD, weight_ED))
    return functional.linear(x_TD.float(), weight_ED.float())


class _WideProduct(torch.autograd.Function):
    """BF16 operands, FP32 result, without FP32 copies of the former: their products are exact in FP32 anyway.

    The gradient of the result enters its products as the sum of two BF16 numbers, 16 bits of it, in one product each.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        high_TE = dy_TE.bfloat16()
        both_TX = torch.cat((high_TE, (dy_TE - high_TE).bfloat16()), dim=1)
        dx_TD = torch.mm(both_TX, torch.cat((weight_ED, weight_ED)))
        parts_XD = torch.mm(both_TX.t(), x_TD, out_dtype=torch.float32)
        return dx_TD, parts_XD.view(2, *weight_ED.shape).sum(dim=0).bfloat16()


class Router(nn.Module):
    """weight (E, D) in the model's dtype; e_score_correction_bias (E,) FP32, a buffer moved by `update_bias` alone.

    Logits are FP32 whatever the dtype of x and weight (DeepSeek-V3 report sec. 3.3: gating in high precision).
    """

    e_score_correction_bias: Tensor

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim, dtype=dtype, device=device))
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", bias_E)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """`model.to(bfloat16)` must not round the bias: a step of gamma = 0.001 would be lost in BF16."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = before.to(device=moved.device, dtype=torch.float32)
        return self

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = _logits(x_TD, self.weight)
        config = self.config
        return ops.route(
            logits_TE,
            self.e_score_correction_bias,
            top_k=config.top_k,
            num_groups=config.num_expert_groups,
            groups_kept=config.num_groups_kept,
            scale=config.route_scale,
            renormalize=config.renormalize_gates,
        )

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor, gamma: float) -> None:
        """Move the bias by gamma towards balance; counts_E the loads of the whole batch."""
        self.e_score_correction_bias.copy_(ops.update_bias(self.e_score_correction_bias, counts_E, gamma=gamma))
