"""Every way in which a checkpoint can be wrong is one line that names the file or key, what is allowed, what came."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hf_cases as cases
import pytest
import torch

import dsv3rt
from dsv3rt.hf import saving

KEY = "model.layers.1.mlp.experts.3.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
FIRST = "model-00001-of-00007.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dsv3rt.hf.save(cases.random_model(), tmp_path / "a", fmt="fp8", max_shard_bytes=50_000)
    assert (tmp_path / "a" / FIRST).exists()
    return tmp_path / "a"


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: cases.edit_json(folder / "config.json", **changes)


def tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: cases.edit_tensors(folder, **changes)


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / INDEX).read_text())
        change(raw["weight_map"])
        (folder / INDEX).write_text(json.dumps(raw))

    return edit


def cut(folder: Path, keep: Callable[[int], int]) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: keep(len(content))])


CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    ("config not JSON", lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON: "),
    ("config a list", lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    ("missing config key", config(hidden_size=None), "config.json: key 'hidden_size' is missing"),
    ("missing architecture", config(architectures=None), "config.json: key 'architectures' is missing"),
    ("config type", config(hidden_size="big"), "config.json: hidden_size must be of type int, got 'big'"),
    ("config range", config(hidden_size=-1), "config.json: model.dim must be positive, got -1"),
    ("architecture", config(architectures=["LlamaForCausalLM"]),
     "config.json: architectures must be ['DeepseekV3ForCausalLM'], got ['LlamaForCausalLM']"),
    ("model type", config(model_type="llama"), "config.json: model_type must be 'deepseek_v3', got 'llama'"),
    ("scoring", config(scoring_func="softmax"), "config.json: scoring_func must be 'sigmoid', got 'softmax'"),
    ("tied", config(tie_word_embeddings=True), "tie_word_embeddings must be False, got True"),
    ("kv heads", config(num_key_value_heads=1), "num_key_value_heads must be num_attention_heads, got 1"),
    ("rope type", config(rope_scaling={"type": "linear", "factor": 2.0}),
     "config.json: rope_scaling.type must be 'yarn' or 'default', got 'linear'"),
    ("yarn key", config(rope_scaling={"type": "yarn", "truncate": False}),
     "config.json: rope_scaling.truncate is not supported, got False"),
    ("yarn missing", config(rope_scaling={"type": "yarn"}), "config.json: rope_scaling: key 'factor' is missing"),
    ("yarn range", config(rope_scaling={"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4}),
     "config.json: model.yarn.factor must be at least 1, got 0.5"),
    ("quantisation", config(quantization_config={"quant_method": "awq"}),
     "quantization_config.quant_method must be 'fp8', got 'awq'"),
    ("block size", config(quantization_config={"quant_method": "fp8", "weight_block_size": [1, 128]}),
     "quantization_config.weight_block_size must be [128, 128], got [1, 128]"),
    ("fp8 format", config(quantization_config={"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}),
     "quantization_config.fmt must be 'e4m3', got 'e5m2'"),
    ("scale format", config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128],
                                                 "scale_fmt": "e4m3"}),
     "quantization_config.scale_fmt must be 'ue8m0', got 'e4m3'"),
    ("no files", lambda folder: (folder / INDEX).unlink(), f"holds neither {INDEX} nor model.safetensors"),
    ("bad index", lambda folder: (folder / INDEX).write_text('{"weight_map": 3}'), "must map keys to files, got '3'"),
    ("missing shard", lambda folder: (folder / FIRST).unlink(), f"{FIRST}: missing, though {INDEX} names it"),
    ("cut data", lambda folder: cut(folder, lambda size: size - 1), f"{FIRST}: not a whole safetensors file, cut "),
    ("cut header", lambda folder: cut(folder, lambda _: 100), f"{FIRST}: not a whole safetensors file, cut short"),
    ("empty file", lambda folder: cut(folder, lambda _: 0), f"{FIRST}: not a whole safetensors file, cut short"),
    ("index lacks a key", index(lambda names: names.pop(NORM)), f"holds {NORM}, which {INDEX} does not place there"),
    ("index invents a key", index(lambda names: names.update(x=FIRST)), f"{FIRST}: lacks x, though {INDEX} places it"),
    ("missing key", tensors(**{NORM: None}), f"a: key {NORM} is missing"),
    ("missing keys", tensors(**{NORM: None, "model.norm.weight": None}), f"key {NORM} is missing (and 1 more)"),
    ("missing scale", tensors(**{f"{KEY}_scale_inv": None}),
     f"key {KEY}_scale_inv is missing, though {KEY} is F8_E4M3"),
    ("unexpected key", tensors(extra=torch.ones(1)), "model.safetensors: unexpected key extra"),
    ("scale of no FP8", tensors(**{f"{NORM}_scale_inv": torch.ones(2)}), f"unexpected key {NORM}_scale_inv"),
    ("shape", tensors(**{NORM: torch.ones(3)}), f"model.safetensors: {NORM} must have shape (136,), got (3,)"),
    ("scale shape", tensors(**{f"{KEY}_scale_inv": torch.ones(1, 1)}),
     f"model.safetensors: {KEY}_scale_inv must have shape (2, 1), got (1, 1)"),
    ("scale dtype", tensors(**{f"{KEY}_scale_inv": torch.ones(2, 1, dtype=torch.bfloat16)}),
     f"{KEY}_scale_inv must have dtype F32 or F8_E8M0, got BF16"),
    ("dtype", tensors(**{NORM: torch.ones(136, dtype=torch.int32)}),
     f"{NORM} must have dtype BF16 or F16 or F32, got I32"),
    ("weight dtype", tensors(**{KEY: torch.zeros(136, 20, dtype=torch.int8)}),
     f"{KEY} must have dtype BF16 or F16 or F32 or F8_E4M3, got I8"),
    ("head in FP8", tensors(**{"lm_head.weight": torch.zeros(40, 136).to(torch.float8_e4m3fn)}),
     "lm_head.weight must have dtype BF16 or F16 or F32, got F8_E4M3"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_checkpoint_is_one_line(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    dsv3rt.hf.load(folder)
    damage(folder)
    for use in (
        lambda: dsv3rt.hf.load(folder),
        lambda: dsv3rt.hf.convert(folder, folder.parent / "out", fmt="bf16", progress=False),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is the point, below)
            use()
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert str(folder) in str(caught.value)
    assert not list(folder.parent.glob("out*"))


@pytest.mark.parametrize(
    ("copy", "shared"), [("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight")]
)
def test_differing_duplicate(copy: str, shared: str, folder: Path) -> None:
    key = f"model.layers.2.{copy}.weight"
    stored = cases.tensors_of(folder)[key]
    stored[7, 3] += 1
    cases.edit_tensors(folder, **{key: stored})
    with pytest.raises(ValueError, match=f"model.safetensors: {key} must equal {shared}, got other values"):
        dsv3rt.hf.load(folder)


def test_scales_against_their_format(folder: Path) -> None:
    """Found when the scales are read: a header does not tell."""
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    cases.edit_json(folder / "config.json", quantization_config={**raw, "scale_fmt": "ue8m0"})
    with pytest.raises(ValueError, match=r"weight_scale_inv must hold powers of two \(scale_fmt 'ue8m0'\), got other"):
        dsv3rt.hf.load(folder)


def test_bad_arguments(folder: Path) -> None:
    model, target = cases.random_model(), folder.parent / "b"
    with pytest.raises(ValueError, match=r"hf.save: fmt must be 'bf16' or 'fp8', got 'fp4'"):
        dsv3rt.hf.save(model, target, fmt="fp4")
    with pytest.raises(ValueError, match=r"hf.convert: fmt must be 'bf16' or 'fp8', got 'fp4'"):
        dsv3rt.hf.convert(folder, target, fmt="fp4")
    with pytest.raises(ValueError, match=r"hf.save: max_shard_bytes must be positive, got 0"):
        dsv3rt.hf.save(model, target, max_shard_bytes=0)
    for act in (lambda: dsv3rt.hf.save(model, folder), lambda: dsv3rt.hf.convert(folder, folder, fmt="bf16")):
        with pytest.raises(ValueError, match="a: already exists; remove it or name another path"):
            act()
    with pytest.raises(ValueError, match="no-such: no such folder"):
        dsv3rt.hf.save(model, folder.parent / "no-such" / "b")
    with pytest.raises(ValueError, match="no-such: no such folder"):
        dsv3rt.hf.load(folder.parent / "no-such")
    assert {path.name for path in folder.parent.iterdir()} == {"a"}


def test_interrupted_save_leaves_no_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder.parent / "b"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            dsv3rt.hf.save(cases.random_model(), target)
    assert not target.exists()
    dsv3rt.hf.save(cases.random_model(), target)
    assert {path.name for path in folder.parent.iterdir()} == {"a", "b"}
