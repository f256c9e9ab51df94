"""The ablations of scripts/numerics.py that change scales change those they say, and nothing outside their block."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fp8_training import MODEL, engine, run_steps
from torch import Tensor

from dsv3rt import ops
from dsv3rt.layers.weights import casts_of
from dsv3rt.ops.types import QuantTensor, round_up
from dsv3rt.train import config_file
from dsv3rt.train.metrics import read_rows
from scripts import numerics
from scripts.numerics_ablations import ABLATIONS, BF16_MODULES, UNCAST, ablation
from tests.layers.fp8_cases import layout_of
from tests.train.train_helpers import config

COARSE = ("block_128x128", "per_tensor")
SCALED = [name for name in ABLATIONS if name not in (*UNCAST, *BF16_MODULES)]  # test_numerics_uncast.py has the others
COUNTS = [5, 0, 131, 128]


def spread(*shape: int) -> Tensor:
    """Every row and every column of another magnitude, so that each tile has a scale of its own."""
    rows, columns = torch.rand(shape[-2], 1) * 8 - 4, torch.rand(1, shape[-1]) * 8 - 4
    return (torch.randn(shape) * 2**rows * 2**columns).bfloat16()


def regions(name: str, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Which elements share a scale."""
    step = 128 if name == "block_128x128" else 10**6
    starts = [(r, c) for r in range(0, shape[0], step) for c in range(0, shape[1], step)]
    return [(slice(r, min(r + step, shape[0])), slice(c, min(c + step, shape[1]))) for r, c in starts]


def expected(name: str, x: Tensor, *, pow2_scales: bool = False) -> tuple[Tensor, Tensor]:
    """What the codes stand for and the scale of each element, region by region, in FP64 but for what FP32 rounds."""
    x = x.float()
    values, scales = torch.zeros_like(x), torch.zeros_like(x)
    for region in regions(name, (x.shape[0], x.shape[1])):
        scale = torch.tensor(max(x[region].abs().max().item(), 2.0**-100), dtype=torch.float32) / torch.tensor(448.0)
        if pow2_scales:
            scale = torch.tensor(2.0 ** scale.double().log2().ceil().item())
        scales[region] = scale
        values[region] = (x[region] * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return values, scales


def scale_of_elements(q: QuantTensor) -> Tensor:
    return q.scale.repeat_interleave(128, dim=1)[:, : q.data.shape[1]]


def assert_stands_for(q: QuantTensor, values: Tensor, scales: Tensor) -> None:
    assert q.tile == (1, 128)
    assert q.scale.stride() == (1, round_up(q.data.shape[0], 4))
    torch.testing.assert_close(ops.dequantize(q), values, rtol=0, atol=0)
    torch.testing.assert_close(scale_of_elements(q), scales, rtol=0, atol=0)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(round_up(len(x), 128) - len(x), x.shape[1])])


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("name", COARSE)
def test_scales_are_those_of_the_region(name: str, rows: int, pow2_scales: bool) -> None:
    x = spread(rows, 272)
    with ablation(name):
        q, q_t = ops.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True)
        alone = ops.quantize_1x128(x, pow2_scales=pow2_scales)
    values, scales = expected(name, x, pow2_scales=pow2_scales)
    assert_stands_for(q, values, scales)
    assert_stands_for(alone, values, scales)
    values_t, scales_t = expected(name, padded(x), pow2_scales=pow2_scales)
    assert_stands_for(q_t, values_t.t(), scales_t.t())
    if rows == 300:
        assert len(scales.unique()) == {"block_128x128": 9, "per_tensor": 1}[name] or pow2_scales
        assert not torch.equal(q.scale, ops.quantize_1x128(x, pow2_scales=pow2_scales).scale)
    if pow2_scales:
        assert (scales.frexp().mantissa == 0.5).all()


@pytest.mark.parametrize("name", COARSE)
def test_padding_does_not_matter_to_grouped_scales(name: str) -> None:
    layout, valid, num_rows = layout_of(COUNTS)
    x = spread(num_rows, 256)
    poisoned = x.masked_fill(~valid[:, None], torch.nan)
    values, scales = expected(name, x.masked_fill(~valid[:, None], 0.0))
    with ablation(name):
        q, q_t = ops.quantize_1x128(poisoned, layout=layout, with_transpose=True)
    assert_stands_for(q, values, scales)
    assert_stands_for(q_t, values.t(), scales.t())


@pytest.mark.parametrize("name", COARSE)
def test_gathered_rows_are_scaled_as_rows_written_out(name: str) -> None:
    layout, valid, num_rows = layout_of(COUNTS)
    tokens = spread(100, 256)
    rows_P = torch.randint(0, 100, (num_rows,), dtype=torch.int32)
    anywhere = rows_P.where(valid, torch.tensor(10**6, dtype=torch.int32))
    with ablation(name):
        got = ops.quantize_1x128(tokens, layout=layout, rows_P=anywhere, with_transpose=True)
        want = ops.quantize_1x128(tokens[rows_P.long()], layout=layout, with_transpose=True)
    for one, other in zip(got, want, strict=True):
        assert_stands_for(one, ops.dequantize(other), scale_of_elements(other))


@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize("kept_in_fp8", [False, True])
def test_swiglu_is_scaled_by_regions(name: str, kept_in_fp8: bool) -> None:
    """The values by autograd in FP64, padding NaN. BF16 rounds what FP32 made of them, so a code may be the next one:
    a step of E4M3, 2^-3 of the number or, under 2^-6, 2^-9 of the scale; and a scale 2^-8 off."""
    layout, valid, num_rows = layout_of(COUNTS)
    mask = valid[:, None]
    gate_up, grad = torch.randn(num_rows, 256).bfloat16(), torch.randn(num_rows, 128).bfloat16()
    weight = torch.rand(num_rows)
    kept: Any = ops.quantize_1x128(gate_up) if kept_in_fp8 else gate_up.masked_fill(~mask, torch.nan)
    wide = (ops.dequantize(kept) if kept_in_fp8 else gate_up).double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    product = torch.nn.functional.silu(gate) * up * weight[:, None].double()
    product.backward(grad.double())
    assert wide.grad is not None
    poison = grad.masked_fill(~mask, torch.nan)
    with ablation(name):
        hidden = ops.swiglu_quantize_1x128(kept, weight_T=weight, layout=layout)
        found = ops.swiglu_backward_quantize_1x128(kept, poison, weight_T=weight, layout=layout, with_product=True)
    assert found.product_t is not None
    assert found.weight_T is not None
    product, both = (rows.detach().masked_fill(~mask, 0.0) for rows in (product, wide.grad))
    cases = [(hidden, product), (found.gate_up, both), (found.gate_up_t, both.t()), (found.product_t, product.t())]
    for q, want in cases:
        _, scales = expected(name, want)
        torch.testing.assert_close(scale_of_elements(q), scales, rtol=2**-8, atol=0)
        error = (ops.dequantize(q) - want).abs()
        assert (error <= 2**-3 * want.abs() + 2**-9 * scales).all()
    # An FP32 sum of 128 terms of some 8 roundings each, in any order.
    terms = grad.double() * product / weight[:, None].double()
    error = (found.weight_T - terms.sum(dim=1)).abs()
    assert (error <= (128 + 8) * 2**-24 * terms.abs().sum(dim=1)).all()


@pytest.mark.parametrize("name", COARSE)
def test_normed_rows_are_scaled_by_regions(name: str) -> None:
    x, weight = spread(300, 272), torch.rand(272).bfloat16()
    y = ops.rms_norm(x, weight, 1e-6)
    with ablation(name):
        normed = ops.rms_norm_quantize_1x128(x, weight, 1e-6, with_transpose=True)
    assert normed.q_t is not None
    assert_stands_for(normed.q, *expected(name, y))
    values_t, scales_t = expected(name, padded(y))
    assert_stands_for(normed.q_t, values_t.t(), scales_t.t())
    assert torch.equal(normed.rstd_T, ops.rms_norm_quantize_1x128(x, weight, 1e-6).rstd_T)


def test_every_cast_of_activations_is_replaced() -> None:
    """A cast that an ablation does not know of would keep its finer scales, and go unseen."""
    layers = Path(str(ops.__file__)).parents[1] / "layers"
    used = {name for file in layers.glob("*.py") for name in re.findall(r"ops\.(\w*quantize_1x128)", file.read_text())}
    before = dict(vars(ops))
    assert used
    with ablation("block_128x128"):
        assert [name for name in used if getattr(ops, name) is before[name]] == []


@pytest.mark.parametrize("experts", [(), (3,)])
def test_weights_have_one_scale_per_tensor(experts: tuple[int, ...]) -> None:
    w = spread(*experts, 272, 144)
    with ablation("per_tensor"):
        q, q_t = ops.quantize_128x128(w, with_transpose=True)
    values, scales = expected("per_tensor", w.reshape(-1, 144))
    assert torch.equal(ops.dequantize(q), values.view(w.shape))
    assert torch.equal(ops.dequantize(q_t), values.view(w.shape).mT)
    assert q.scale.unique().tolist() == scales.unique().tolist()
    assert (q.scale.shape, q_t.scale.shape) == ((*experts, 3, 2), (*experts, 2, 3))
    with ablation("block_128x128"):
        assert ops.quantize_128x128(w).scale.unique().numel() > 1


@pytest.mark.parametrize("name", COARSE)
def test_poison_stays_in_the_result(name: str) -> None:
    """So that the step's loss is not finite and the step is skipped."""
    x = spread(256, 256)
    x[3, 7] = torch.inf
    with ablation(name):
        q = ops.quantize_1x128(x)
    assert ops.dequantize(q)[:128, :128].isnan().all()


@pytest.mark.parametrize("name", SCALED)
def test_ops_are_restored(name: str) -> None:
    """SwiGLU's reference too, which the ablations borrow."""
    before, gate_up = dict(vars(ops)), spread(200, 256)
    want = ops.swiglu_quantize_1x128(gate_up)

    def fail() -> None:
        assert ops.quantize_1x128 is not before["quantize_1x128"]
        assert not torch.equal(ops.swiglu_quantize_1x128(gate_up).scale, want.scale)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), ablation(name):
        fail()
    assert vars(ops) == before
    assert torch.equal(ops.swiglu_quantize_1x128(gate_up).scale, want.scale)


def test_unknown_ablation_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^ablation: name must be one of .*, got 'fp4'$"), ablation("fp4"):
        pass


def test_each_ablation_trains_otherwise_than_fp8(tmp_path: Path) -> None:
    """At initialisation a tensor's numbers lie within a few powers of two of each other, and E4M3 keeps as many bits
    over the 15 that it spans: as near to FP8 as FP8 is to BF16 (test_fp8_training.py)."""
    runs = {"fp8": run_steps(engine(tmp_path), 5)}
    for name in SCALED:
        with ablation(name):
            runs[name] = run_steps(engine(tmp_path), 5)
        for got, want in zip(runs[name], runs["fp8"], strict=True):
            assert got.loss != want.loss
            assert got.loss == pytest.approx(want.loss, rel=1e-2)
    assert runs["block_128x128"] != runs["per_tensor"]
    assert runs["no_promotion"] == runs["per_tensor"]  # on a CPU


@pytest.mark.parametrize("name", [*SCALED, ""])
def test_ablations_hold_for_what_the_optimizer_casts(tmp_path: Path, name: str) -> None:
    with ablation(name) if name else nullcontext():
        made = engine(tmp_path, dtype="bfloat16")
        run_steps(made, 2)
    scales = [cast.of(*cast.weights)[0].scale.unique().numel() for cast in casts_of(made.model)]
    assert (max(scales) == 1) == (name in ("per_tensor", "no_promotion"))


def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["numerics.py", *arguments])
        numerics.main()

    return run


def test_an_ablation_is_a_run_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = command(monkeypatch)
    root = tmp_path / "root"
    (root / "configs").mkdir(parents=True)
    small = config(tmp_path, model=MODEL, train={"steps": 4, "dtype": "bfloat16"})
    (root / "configs" / "numerics.toml").write_text(config_file.to_toml(small))
    monkeypatch.setattr(numerics, "ROOT", root)
    kept = tmp_path / "kept"
    run("train", "fp8", "--runs", str(tmp_path), "--keep", str(kept))
    run("train", "per_tensor", "--runs", str(tmp_path / "whole"), "--keep", str(tmp_path / "whole"))
    for steps in ("2", "4"):
        run("train", "per_tensor", "--runs", str(tmp_path), "--keep", str(kept), "--steps", steps)
    losses = [[row["loss"] for row in read_rows(folder / "per_tensor.jsonl")] for folder in (kept, tmp_path / "whole")]
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    assert losses[0] != [row["loss"] for row in read_rows(kept / "fp8.jsonl")]
    assert 'precision = "fp8"' in (kept / "per_tensor.toml").read_text()
