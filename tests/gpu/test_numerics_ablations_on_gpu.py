"""The ablations of the numerics study on a GPU: the casts of the CPU, products near the kernels', steps near FP8's."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from dsv3rt import ops, presets
from dsv3rt.ops.types import GroupLayout
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine, StepResult
from scripts.numerics_ablations import ABLATIONS, UNCAST, ablation, settings, without_casts
from tests.gpu.quant_cases import assert_same_bits
from tests.layers.fp8_cases import Weights, layout_of
from tests.train.train_helpers import config

pytestmark = pytest.mark.gpu

COUNTS = [5, 0, 131, 512]
BF16_ROUNDING = 1e-6  # SAME_PRODUCT of test_fp8_layers.py


def unpromoted(depth: int) -> float:
    """calc_diff of sums that stay in the tensor core. Each 32 addends it drops up to 2^-13 of the largest number that
    it adds, a product or the sum so far, here twice the result's size; all in one direction at worst."""
    return (2 * depth / 32 * 2**-13) ** 2 / 2


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("name", ["block_128x128", "per_tensor"])
def test_casts_are_those_of_the_cpu(name: str, pow2_scales: bool) -> None:
    layout, valid, num_rows = layout_of(COUNTS)
    on_gpu = GroupLayout(layout.counts_X.cuda(), layout.offsets.cuda())
    x = (torch.randn(num_rows, 384) * torch.rand(num_rows, 1).exp2()).bfloat16().masked_fill(~valid[:, None], torch.nan)
    tokens, rows_P = torch.randn(100, 384).bfloat16(), torch.randint(0, 100, (num_rows,), dtype=torch.int32)
    with ablation(name):
        want = [
            *ops.quantize_1x128(x, layout=layout, pow2_scales=pow2_scales, with_transpose=True),
            *ops.quantize_1x128(tokens, layout=layout, rows_P=rows_P, pow2_scales=pow2_scales, with_transpose=True),
            *ops.quantize_128x128(tokens, pow2_scales=pow2_scales, with_transpose=True),
        ]
        x, tokens, rows_P = x.cuda(), tokens.cuda(), rows_P.cuda()
        got = [
            *ops.quantize_1x128(x, layout=on_gpu, pow2_scales=pow2_scales, with_transpose=True),
            *ops.quantize_1x128(tokens, layout=on_gpu, rows_P=rows_P, pow2_scales=pow2_scales, with_transpose=True),
            *ops.quantize_128x128(tokens, pow2_scales=pow2_scales, with_transpose=True),
        ]
    for one, other in zip(got, want, strict=True):
        assert_same_bits(replace(one, data=one.data.cpu(), scale=_to_cpu(one.scale)), other)


def _to_cpu(scale: torch.Tensor) -> torch.Tensor:
    """With its strides."""
    return torch.empty_strided(scale.shape, scale.stride()).copy_(scale)


def test_products_without_promotion_are_near_the_kernels() -> None:
    """Of the same codes and scales: dense, by rows and by depth, new and added; bits differ, or promotion went on."""
    layout, valid, num_rows = layout_of(COUNTS, "cuda")
    x, dy = (
        torch.randn(num_rows, n, device="cuda").bfloat16().masked_fill(~valid[:, None], torch.nan) for n in (512, 272)
    )
    weight = torch.randn(len(COUNTS), 272, 512, device="cuda").bfloat16()
    with ablation("per_tensor"):
        q, q_t = ops.quantize_1x128(x, layout=layout, with_transpose=True)
        _, dy_t = ops.quantize_1x128(dy, layout=layout, with_transpose=True)
        w, w0 = ops.quantize_128x128(weight), ops.quantize_128x128(weight[0])
    so_far = torch.randn(len(COUNTS), 272, 512, device="cuda")

    def products() -> list[torch.Tensor]:
        by_rows = ops.m_grouped_fp8_gemm_nt(q, w, layout, out_dtype=torch.float32)
        return [
            by_rows[valid],
            ops.fp8_gemm_nt(q, w0, out_dtype=torch.float32),
            ops.fp8_gemm_nt(dy_t, q_t, out_dtype=torch.float32),
            ops.fp8_gemm_nt(dy_t, q_t, accumulate_into=so_far[0].clone()) - so_far[0],
            ops.k_grouped_fp8_gemm_nt(dy_t, q_t, layout),
            ops.k_grouped_fp8_gemm_nt(dy_t, q_t, layout, accumulate_into=so_far.clone()) - so_far,
        ]

    want = products()
    with ablation("no_promotion"):
        got = products()
        in_bf16 = ops.fp8_gemm_nt(q, w0)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert not torch.equal(one, other), index
        assert ops.calc_diff(one, other) < unpromoted(num_rows) + BF16_ROUNDING, index
    assert ops.calc_diff(in_bf16, got[1]) < unpromoted(512) + BF16_ROUNDING


@pytest.mark.parametrize("parts", [*((part,) for part in UNCAST.values()), tuple(UNCAST.values())], ids="+".join)
def test_experts_without_casts_are_those_of_the_cpu(parts: tuple[str, ...]) -> None:
    """As near as with all casts (SAME_CASTS of test_fp8_layers.py); padding NaN."""
    layout, valid, num_rows = layout_of(COUNTS)
    weights = Weights.draw(256, 128, len(COUNTS), torch.bfloat16)
    x, dy = (torch.randn(num_rows, 256).bfloat16().masked_fill(~valid[:, None], torch.nan) for _ in range(2))
    on_gpu, mask, _ = layout_of(COUNTS, "cuda")
    with without_casts(*parts):
        want = weights.run(x, dy, layout)
        got = weights.to("cuda").run(x.cuda(), dy.cuda(), on_gpu)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if index < 2:
            one, other = one[mask], other[valid]
        assert ops.calc_diff(one.cpu(), other) < 4e-5, index


def steps(folder: Path, name: str = "") -> list[StepResult]:
    torch.manual_seed(3)
    tokens = (torch.randint(1, 4, (8000,)).cumsum(0) % 64).numpy().astype("uint16")
    model = asdict(replace(presets.model("tiny"), num_layers=2, ffn_dim=256, num_experts=4, num_expert_groups=2))
    train = {"seq_len": 128, "batch_size": 8, "micro_batch_size": 8, "precision": "fp8", "device": "cuda"}
    train |= {key.removeprefix("train."): value for key, value in settings(name).items()}
    made = Engine(config(folder, model=model, train=train, optim={"lr": 3e-3}), Samples(tokens, 128, 0))
    one, state = made.step(RunState())
    return [one, made.step(state)[0]]


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_step_is_near_fp8(name: str, tmp_path: Path) -> None:
    """At initialisation a tensor's numbers lie within the powers of two over which E4M3 keeps as many bits, so either
    run's casts move a step as far as FP8's do from BF16, a hundredth at most (tests/train/test_fp8_training.py): two
    of these between them. That holds for the second loss, after an update, and for the first gradient norm, which a
    broken backward would miss."""
    fp8 = steps(tmp_path)
    with ablation(name):
        got = steps(tmp_path, name)
    assert got != fp8
    assert [step.skipped for step in got] == ["", ""]
    assert [step.loss for step in got] == pytest.approx([step.loss for step in fp8], rel=2e-2)
    assert got[0].grad_norm == pytest.approx(fp8[0].grad_norm, rel=2e-2)


@pytest.mark.parametrize("name", ["block_128x128", "per_tensor"])
def test_the_host_does_not_wait_for_casts(name: str) -> None:
    layout, _, num_rows = layout_of(COUNTS, "cuda")
    x, dy = torch.randn(num_rows, 512, device="cuda").bfloat16(), torch.randn(num_rows, 256, device="cuda").bfloat16()
    rows_P = torch.zeros(num_rows, dtype=torch.int32, device="cuda")

    def casts() -> None:
        q = ops.quantize_1x128(x, layout=layout, rows_P=rows_P)
        ops.swiglu_quantize_1x128(q, layout=layout)
        ops.swiglu_backward_quantize_1x128(q, dy, layout=layout, with_product=True)
        ops.quantize_128x128(x, with_transpose=True)

    with ablation(name):
        casts()
        torch.cuda.set_sync_debug_mode("error")
        try:
            casts()
        finally:
            torch.cuda.set_sync_debug_mode("default")
