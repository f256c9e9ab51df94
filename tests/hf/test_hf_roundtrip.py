"""hf.load and hf.save against transformers, and against each other."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import hf_cases as cases
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

import dsv3rt
from dsv3rt import ModelConfig, ops, presets
from dsv3rt.hf import codec, config_json, layout

SEEDS = range(10)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_load_matches_transformers(seed: int, sharded: bool, tmp_path: Path) -> None:
    config = cases.random_config(seed + 100 * sharded)
    reference = cases.hf_model(config)
    cases.randomise(reference, seed)
    stored = deepcopy(reference).to(torch.bfloat16) if sharded else reference  # all weights are BF16 numbers
    stored.save_pretrained(tmp_path / "a", max_shard_size="40KB" if sharded else "1GB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == sharded
    model = dsv3rt.hf.load(tmp_path / "a", dtype=torch.float32)
    assert model.config == config
    tokens = cases.tokens_for(config)
    with torch.no_grad():
        cases.assert_close(model(tokens).logits_BTV, reference(tokens).logits)


@pytest.mark.parametrize("seed", range(20))
def test_transformers_loads_what_save_writes(seed: int, tmp_path: Path) -> None:
    config = cases.random_config(200 + seed)
    model = cases.random_model(config, seed)
    dsv3rt.hf.save(model, tmp_path / "a", max_shard_bytes=100_000)
    reference, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "a", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = cases.tokens_for(config)
    with torch.no_grad():
        cases.assert_close(reference(tokens).logits, model(tokens).logits_BTV)


def test_yarn_without_mscale_matches_transformers(tmp_path: Path) -> None:
    dsv3rt.hf.save(cases.random_model(cases.without_mtp()), tmp_path / "a")
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    cases.edit_json(tmp_path / "a" / "config.json", rope_scaling=yarn)
    model = dsv3rt.hf.load(tmp_path / "a", dtype=torch.float32)
    assert model.config.yarn is not None
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32, attn_implementation="eager")
    tokens = cases.tokens_for(model.config)
    with torch.no_grad():
        cases.assert_close(model(tokens).logits_BTV, reference(tokens).logits)


@pytest.mark.parametrize("seed", range(20))
def test_fp8_load_matches_transformers(seed: int, tmp_path: Path) -> None:
    """transformers gets the weights dequantised here, element by element of the scales.

    Its own dequantisation divides a weight evenly among its scales, so it refuses kv_a_proj_with_mqa of the
    release, 576 rows in blocks of 128, and is no reference for odd shapes.
    """
    config = cases.random_config(seed)
    dsv3rt.hf.save(cases.random_model(config, seed), tmp_path / "a", fmt="fp8", pow2_scales=seed % 2 == 1)
    stored = cases.tensors_of(tmp_path / "a")
    state = {}
    for key, value in stored.items():
        if key.endswith("_scale_inv"):
            continue
        state[key] = value.float()
        if value.dtype == torch.float8_e4m3fn:
            scale = stored[f"{key}_scale_inv"]
            for row in range(value.shape[0]):
                for block in range(scale.shape[1]):
                    state[key][row, 128 * block : 128 * block + 128] *= scale[row // 128, block]
    (tmp_path / "b").mkdir()
    plain = config_json.to_json(config, "bf16")
    (tmp_path / "b" / "config.json").write_text(json.dumps(plain))
    cases.edit_tensors(tmp_path / "b", **state)
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
    model = dsv3rt.hf.load(tmp_path / "a", dtype=torch.float32)
    tokens = cases.tokens_for(config)
    with torch.no_grad():
        cases.assert_close(model(tokens).logits_BTV, reference(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_export_is_stable(dtype: torch.dtype, tmp_path: Path) -> None:
    """Export, import, export: the same bits, whatever dtype the model had in between, and from FP32 weights too."""
    model = cases.random_model(seed=5)
    model.load_state_dict({name: value * 1.2345 for name, value in model.state_dict().items()})
    dsv3rt.hf.save(model, tmp_path / "a", fmt="fp8", max_shard_bytes=60_000)
    dsv3rt.hf.save(dsv3rt.hf.load(tmp_path / "a", dtype=dtype), tmp_path / "b", fmt="fp8", max_shard_bytes=60_000)
    assert cases.digests(tmp_path / "a") == cases.digests(tmp_path / "b")
    assert len(cases.digests(tmp_path / "a")) > 4


def test_weights_stay_fp8(tmp_path: Path) -> None:
    """Bit for bit what the file holds, ready for the FP8 GEMM; all else as stored."""
    dsv3rt.hf.save(cases.random_model(seed=5), tmp_path / "a", fmt="fp8", max_shard_bytes=60_000)
    stored = cases.tensors_of(tmp_path / "a")
    found = dict(dsv3rt.hf.weights(tmp_path / "a"))
    assert found.keys() == {key for key in stored if not key.endswith("_scale_inv")}
    quantised = {key: value for key, value in found.items() if isinstance(value, ops.QuantTensor)}
    assert len(quantised) > 20
    for key, value in found.items():
        if isinstance(value, ops.QuantTensor):
            assert torch.equal(value.data.view(torch.uint8), stored[key].view(torch.uint8))
            assert torch.equal(value.scale, stored[f"{key}_scale_inv"])
        else:
            assert torch.equal(value, stored[key])
    w = quantised["model.layers.0.self_attn.kv_b_proj.weight"]
    x = ops.quantize_1x128(torch.randn(16, w.data.shape[1]))
    want = ops.dequantize(x, torch.float64) @ ops.dequantize(w, torch.float64).T
    # FP32 sums of 16 products err by a few units of 2^-24 of the products' sizes, which are like the result's.
    assert torch.allclose(ops.fp8_gemm_nt(x, w, out_dtype=torch.float32).double(), want, rtol=1e-4, atol=1e-5)


def test_fp8_is_close_to_bf16(tmp_path: Path) -> None:
    """E4M3 has 3 mantissa bits: no element of a block errs by more than 2^-4 of itself, or half of the block's least
    step, amax / 448 * 2^-10 (and BF16's 2^-9 on top)."""
    model = cases.random_model(seed=6)
    dsv3rt.hf.save(model, tmp_path / "a", fmt="fp8")
    state = model.state_dict()
    for name, got in dsv3rt.hf.load(tmp_path / "a").state_dict().items():
        want = state[name]
        error = (got.float() - want).abs()
        assert (error <= want.abs() * (2**-4 + 2**-8) + want.abs().max() / 448 * 2**-10).all(), name
        if name.endswith(("q_a_proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            assert error.max() > 0
        if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight", "eh_proj.weight")):
            assert error.max() == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_mtp_roundtrips(fmt: str, depth: int, tmp_path: Path) -> None:
    config = replace(cases.SMALL, mtp_depth=depth)
    model = cases.random_model(config, seed=7)
    dsv3rt.hf.save(model, tmp_path / "a", fmt=fmt)
    loaded = dsv3rt.hf.load(tmp_path / "a", dtype=torch.float32)
    assert loaded.config == config
    stored = cases.tensors_of(tmp_path / "a")
    for layer in range(2, 2 + depth):
        for copy, shared in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            assert torch.equal(stored[f"model.layers.{layer}.{copy}.weight"], stored[f"{shared}.weight"])
    if fmt == "bf16":
        tokens = cases.tokens_for(config)
        with torch.no_grad():
            for got, want in zip(loaded(tokens).mtp_logits, model(tokens).mtp_logits, strict=True):
                assert torch.equal(got, want)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    cases.edit_tensors(tmp_path / "a", **{"model.layers.2.shared_head.head.weight": None})
    again = dsv3rt.hf.load(tmp_path / "a", dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in again.state_dict().items())


def test_announced_mtp_that_is_absent_is_said(tmp_path: Path) -> None:
    dsv3rt.hf.save(cases.random_model(cases.without_mtp()), tmp_path / "a")
    cases.edit_json(tmp_path / "a" / "config.json", num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match="no key that starts with model.layers.2.: read without MTP"):
        assert dsv3rt.hf.load(tmp_path / "a").config.mtp_depth == 0


def test_router_bias_stays_fp32(tmp_path: Path) -> None:
    model = cases.random_model()
    bias = model.moe_layers[0].gate.e_score_correction_bias
    bias.fill_(0.123456789)
    dsv3rt.hf.save(model.to(torch.bfloat16), tmp_path / "a")
    loaded = dsv3rt.hf.load(tmp_path / "a").moe_layers[0].gate.e_score_correction_bias
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, torch.full_like(loaded, 0.123456789))


def test_dtypes_are_those_of_the_release(tmp_path: Path) -> None:
    model = cases.random_model()
    dsv3rt.hf.save(model, tmp_path / "bf16")
    dsv3rt.hf.save(model, tmp_path / "fp8", fmt="fp8", max_shard_bytes=60_000)
    for key, dtype in cases.dtypes_of(tmp_path / "bf16").items():
        assert dtype == ("F32" if key.endswith("e_score_correction_bias") else "BF16"), key
    high = ("norm.weight", "gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight")
    for key, dtype in cases.dtypes_of(tmp_path / "fp8").items():
        is_fp32 = key.endswith(("e_score_correction_bias", "_scale_inv"))
        assert dtype == ("F32" if is_fp32 else "BF16" if key.endswith(high) else "F8_E4M3"), key
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert raw["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip


def test_index_and_shards(tmp_path: Path) -> None:
    dsv3rt.hf.save(cases.random_model(), tmp_path / "a", fmt="fp8", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    stored = cases.tensors_of(tmp_path / "a")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    for name in names:
        keys = [key for key, file in index["weight_map"].items() if file == name]
        assert sum(stored[key].nbytes for key in keys) <= 60_000 or keys == ["model.layers.2.eh_proj.weight"]


@pytest.mark.parametrize("elements", [1, 300, 40_000])
def test_pieces_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantising and dequantising by groups of 128 rows is the same as doing it at once."""
    spec = layout.TensorSpec("w", (391, 150), "linear")
    weight = torch.randn(spec.shape, dtype=torch.bfloat16)
    want = ops.quantize_128x128(weight)
    monkeypatch.setattr(codec, "_PIECE_ELEMENTS", elements)
    (_, data), (_, scale) = codec.encode(spec, weight, None, "fp8")
    assert torch.equal(data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(scale, want.scale)
    ((_, plain),) = codec.encode(spec, data, scale, "bf16")
    assert torch.equal(plain, ops.dequantize(want, torch.bfloat16))


def test_tensors_are_aligned(tmp_path: Path) -> None:
    """To their element size, in a file that begins with a multiple of 8, as readers that map the file need it."""
    config = replace(cases.SMALL, dim=135, ffn_dim=151, expert_dim=21)  # odd numbers of FP8 bytes
    dsv3rt.hf.save(cases.random_model(config), tmp_path / "a", fmt="fp8")
    content = (tmp_path / "a" / "model-00001-of-00001.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    assert any(entry["data_offsets"][1] % 2 for entry in header.values())
    for key, entry in header.items():
        assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2, "F8_E4M3": 1}[entry["dtype"]] == 0, key


def test_671b_has_the_tensors_of_the_release() -> None:
    """91,991 tensors; sums of sizes in docs of the release: 671B main and 11.5B + shared MTP parameters."""
    specs = list(layout.tensor_specs(presets.model("671b")))
    scales = [spec for spec in specs if spec.role == "linear"]
    assert len(specs) + len(scales) == 91_991
    shapes = {spec.key: spec for spec in specs}
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].scale_shape == (5, 56)
    assert shapes["model.layers.61.eh_proj.weight"].shape == (7168, 14336)
    assert shapes["model.layers.0.self_attn.o_proj.weight"].shape == (7168, 16384)


@pytest.mark.parametrize("seed", range(8))
def test_config_roundtrips(seed: int) -> None:
    config = replace(cases.random_config(seed), mtp_depth=seed % 3)
    for fmt in ("bf16", "fp8"):
        raw = json.loads(json.dumps(config_json.to_json(config, fmt)))
        assert config_json.from_json(raw, "config.json") == config


def test_config_of_the_release() -> None:
    raw = config_json.to_json(ModelConfig(), "fp8") | {
        "max_position_embeddings": 163840, "ep_size": 1, "initializer_range": 0.02,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    }  # fmt: skip
    config = config_json.from_json(raw, "config.json")
    assert config.yarn is not None
    assert config.softmax_scale == pytest.approx(192**-0.5 * 1.8739, rel=1e-4)
    assert replace(config, yarn=None, max_position=4096, init_std=0.006) == ModelConfig()
