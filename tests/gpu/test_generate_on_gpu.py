"""Generation on the kernels: steps from CUDA graphs give what the same steps give one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv3rt import Transformer, presets
from dsv3rt.infer import generate as module
from dsv3rt.infer.generate import GenerateOptions, generate
from dsv3rt.infer.runner import can_be_captured
from dsv3rt.layers.precision import set_precision

pytestmark = pytest.mark.gpu
PROMPTS = [[1, 2, 3], [7] * 60, [9, 8, 7] * 100, [5]]


def make(*, dense: bool) -> Transformer:
    """Heads as the kernels want them. Dense in BF16, or with experts in FP8 and an MTP block."""
    torch.manual_seed(0)
    tiny = replace(presets.model("tiny"), init_std=0.1)
    config = replace(tiny, num_dense_layers=3, mtp_depth=0) if dense else tiny
    model = Transformer(config, dtype=torch.bfloat16, device="cuda")
    if not dense:
        set_precision(model, "fp8")
    return model


@pytest.mark.parametrize("fp8_cache", [False, True])
@pytest.mark.parametrize(("dense", "num_drafts"), [(True, 0), (False, 0), (False, 2)])
def test_generate_by_graphs_is_generate_step_by_step(
    dense: bool, num_drafts: int, fp8_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(dense=dense)
    assert can_be_captured(model)
    for options in (GenerateOptions(20), GenerateOptions(20, temperature=1.0, top_p=0.9)):
        options = replace(options, num_drafts=num_drafts, fp8_cache=fp8_cache)
        got = generate(model, PROMPTS, options)
        with monkeypatch.context() as patch:
            patch.setattr(module, "can_be_captured", lambda model: False)
            assert generate(model, PROMPTS, options) == got
        assert [len(tokens) for tokens in got] == [20] * 4


def test_generate_runs_step_by_step_with_bf16_experts() -> None:
    torch.manual_seed(0)
    model = Transformer(presets.model("tiny"), dtype=torch.bfloat16, device="cuda")
    assert not can_be_captured(model)
    assert [len(tokens) for tokens in generate(model, PROMPTS, GenerateOptions(5, num_drafts=1))] == [5] * 4
