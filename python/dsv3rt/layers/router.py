"""The auxiliary-loss-free router."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.ops.types import Routing


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
        logits_TE = functional.linear(x_TD.float(), self.weight.float())
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
