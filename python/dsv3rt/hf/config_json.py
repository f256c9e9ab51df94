"""config.json of a Hugging Face checkpoint to ModelConfig and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3rt.config import ModelConfig, YarnConfig

ARCHITECTURE = "DeepseekV3ForCausalLM"
QUANTIZATION: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# ModelConfig's name, config.json's name, type; with a default where files leave the key out or null.
_REQUIRED: tuple[tuple[str, str, type], ...] = (
    ("vocab_size", "vocab_size", int),
    ("dim", "hidden_size", int),
    ("num_layers", "num_hidden_layers", int),
    ("num_dense_layers", "first_k_dense_replace", int),
    ("num_heads", "num_attention_heads", int),
    ("kv_lora_rank", "kv_lora_rank", int),
    ("qk_nope_head_dim", "qk_nope_head_dim", int),
    ("qk_rope_head_dim", "qk_rope_head_dim", int),
    ("v_head_dim", "v_head_dim", int),
    ("ffn_dim", "intermediate_size", int),
    ("expert_dim", "moe_intermediate_size", int),
    ("num_experts", "n_routed_experts", int),
    ("top_k", "num_experts_per_tok", int),
    ("route_scale", "routed_scaling_factor", float),
    ("norm_eps", "rms_norm_eps", float),
    ("max_position", "max_position_embeddings", int),
)
_OPTIONAL: tuple[tuple[str, str, type, Any], ...] = (
    ("q_lora_rank", "q_lora_rank", int, None),
    ("num_shared_experts", "n_shared_experts", int, 0),
    ("num_expert_groups", "n_group", int, 1),
    ("num_groups_kept", "topk_group", int, 1),
    ("renormalize_gates", "norm_topk_prob", bool, True),
    ("init_std", "initializer_range", float, 0.02),
    ("mtp_depth", "num_nextn_predict_layers", int, 0),
)
_POW2_SCALES = "ue8m0"  # the value of quantization_config.scale_fmt in DeepSeek-V3.1's config.json
_YARN = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# What the model does and no key of ModelConfig says; absent or null means just this.
_FIXED: tuple[tuple[str, Any], ...] = (
    ("model_type", "deepseek_v3"),
    ("architectures", [ARCHITECTURE]),
    ("hidden_act", "silu"),
    ("scoring_func", "sigmoid"),
    ("topk_method", "noaux_tc"),
    ("moe_layer_freq", 1),
    ("attention_bias", False),
    ("tie_word_embeddings", False),
    ("rope_interleave", True),
)


def from_json(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration that config.json describes; `where` names the file in errors.

    Raises:
        ValueError: a key is missing or of another type, or asks for what the model does not do.
    """
    for key in ("model_type", "architectures"):
        if raw.get(key) is None:
            raise ValueError(f"{where}: key {key!r} is missing")
    for key, value in _FIXED:
        got = raw.get(key)
        if got is not None and got != value:
            raise ValueError(f"{where}: {key} must be {value!r}, got {got!r}")
    _check_quantization(raw.get("quantization_config"), where)
    fields: dict[str, Any] = {name: _number(raw, key, kind, where) for name, key, kind in _REQUIRED}
    for name, key, kind, default in _OPTIONAL:
        fields[name] = default if raw.get(key) is None else _number(raw, key, kind, where)
    kv_heads = raw.get("num_key_value_heads")
    if kv_heads not in (None, fields["num_heads"]):
        raise ValueError(f"{where}: num_key_value_heads must be num_attention_heads, got {kv_heads!r}")
    fields["rope_theta"], fields["yarn"] = _rope(raw, where)
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def has_pow2_scales(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json that `from_json` accepts says that FP8 scales are powers of two."""
    return (raw.get("quantization_config") or {}).get("scale_fmt") == _POW2_SCALES


def to_json(config: ModelConfig, fmt: str, pow2_scales: bool = False) -> dict[str, Any]:
    """config.json for a checkpoint in format "bf16" or "fp8"."""
    raw: dict[str, Any] = dict(_FIXED)
    raw |= {key: getattr(config, name) for name, key, _ in _REQUIRED}
    raw |= {key: getattr(config, name) for name, key, _, _ in _OPTIONAL}
    raw |= {"num_key_value_heads": config.num_heads, "rope_theta": config.rope_theta, "rope_scaling": None}
    if config.yarn is not None:
        raw["rope_scaling"] = {"type": "yarn", **{key: getattr(config.yarn, key) for key in _YARN}}
        raw["rope_scaling"]["original_max_position_embeddings"] = config.yarn.original_max_position
    return with_format(raw, fmt, pow2_scales)


def with_format(raw: Mapping[str, Any], fmt: str, pow2_scales: bool = False) -> dict[str, Any]:
    """The same config.json for a checkpoint in `fmt`; an FP8 one's own quantization_config stays, scales aside."""
    result = {key: value for key, value in raw.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    result["torch_dtype"] = "bfloat16"
    if fmt == "fp8":
        quantization = raw.get("quantization_config") or dict(QUANTIZATION)
        result["quantization_config"] = quantization | ({"scale_fmt": _POW2_SCALES} if pow2_scales else {})
    return dict(sorted(result.items()))


def _number(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = raw.get(key)
    if value is None:
        raise ValueError(f"{where}: key {key!r} is missing")
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {key} must be of type {kind.__name__}, got {value!r}")
    return kind(value)


def _check_quantization(quantization: Any, where: str) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise ValueError(f"{where}: quantization_config must be a table, got {quantization!r}")
    for key, value in QUANTIZATION.items():
        got = quantization.get(key, value if key in ("activation_scheme", "fmt") else None)
        if got != value:
            raise ValueError(f"{where}: quantization_config.{key} must be {value!r}, got {got!r}")
    scale_fmt = quantization.get("scale_fmt")
    if scale_fmt not in (None, _POW2_SCALES):
        raise ValueError(f"{where}: quantization_config.scale_fmt must be {_POW2_SCALES!r}, got {scale_fmt!r}")


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, YarnConfig | None]:
    """rope_theta and YaRN; from `rope_scaling` beside `rope_theta`, or from transformers 5's `rope_parameters`."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = raw.get(name) or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{where}: {name} must be a table, got {scaling!r}")
    at = f"{where}: {name}"
    source = scaling if "rope_theta" in scaling else raw
    theta = _number({"rope_theta": 10000.0, **source}, "rope_theta", float, where)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"{at}.type must be 'yarn' or 'default', got {kind!r}")
    known = {*_YARN, "original_max_position_embeddings", "rope_type", "type", "rope_theta"}
    for key, value in scaling.items():
        if key not in known and value is not None:
            raise ValueError(f"{at}.{key} is not supported, got {value!r}")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    given = defaults | {key: value for key, value in scaling.items() if value is not None}
    fields = {key: _number(given, key, float, at) for key in _YARN}
    original = _number(given, "original_max_position_embeddings", int, at)
    try:
        return theta, YarnConfig(original_max_position=original, **fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
