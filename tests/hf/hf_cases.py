"""What the tests of `dsv3rt.hf` share: small random models, transformers' counterpart of them, and files."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3rt import ModelConfig, Transformer
from dsv3rt.config import YarnConfig

SMALL = ModelConfig(
    vocab_size=40, dim=136, num_layers=2, num_dense_layers=1, num_heads=2, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, ffn_dim=150, expert_dim=20, num_experts=4, top_k=2,
    num_expert_groups=2, num_groups_kept=2, max_position=64, init_std=0.08, mtp_depth=1,
)  # fmt: skip


def random_config(seed: int) -> ModelConfig:
    """A small configuration without MTP, every choice of shape and routing drawn."""
    draw = random.Random(seed)
    groups = draw.choice((1, 2, 4))
    experts = groups * draw.choice((2, 3))
    kept = draw.randint(1, groups)
    layers = draw.randint(1, 3)
    yarn = YarnConfig(factor=draw.choice((2.0, 40.0)), original_max_position=16, mscale=1.0,
                      mscale_all_dim=draw.choice((1.0, 0.7)))  # fmt: skip
    return ModelConfig(
        vocab_size=draw.randint(20, 150), dim=draw.choice((48, 128, 140)), num_layers=layers,
        num_dense_layers=draw.randint(0, layers), num_heads=draw.randint(1, 4),
        q_lora_rank=draw.choice((None, 24, 130)), kv_lora_rank=draw.choice((16, 132)),
        qk_nope_head_dim=draw.choice((8, 12)), qk_rope_head_dim=draw.choice((4, 8)), v_head_dim=draw.choice((6, 12)),
        ffn_dim=draw.randint(20, 150), expert_dim=4 * draw.randint(3, 35), num_experts=experts,
        num_shared_experts=draw.randint(1, 2), top_k=draw.randint(1, min(kept * experts // groups, 3)),
        num_expert_groups=groups, num_groups_kept=kept, renormalize_gates=draw.random() < 0.7,
        route_scale=draw.uniform(1.0, 2.5), rope_theta=draw.choice((1e4, 5e4)), max_position=64,
        yarn=draw.choice((None, yarn)), mtp_depth=0, init_std=0.08,
    )  # fmt: skip


def hf_model(config: ModelConfig) -> DeepseekV3ForCausalLM:
    """transformers' model of the same shape, made without any help of `dsv3rt.hf`."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        yarn = config.yarn
        rope |= {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
                 "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
                 "original_max_position_embeddings": yarn.original_max_position}  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
        moe_intermediate_size=config.expert_dim, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_heads,
        n_shared_experts=config.num_shared_experts, n_routed_experts=config.num_experts,
        routed_scaling_factor=config.route_scale, kv_lora_rank=config.kv_lora_rank, q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim, qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim, n_group=config.num_expert_groups, topk_group=config.num_groups_kept,
        num_experts_per_tok=config.top_k, first_k_dense_replace=config.num_dense_layers,
        norm_topk_prob=config.renormalize_gates, max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps, rope_parameters=rope, rope_interleave=True, num_mtp_layers=0,
        initializer_range=config.init_std, attn_implementation="eager",
    )).eval()  # fmt: skip


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every tensor random, norms and router biases away from their neutral values, all of them BF16 numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(0.0, 0.3, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=0.08, generator=generator)
        tensor.copy_(tensor.to(torch.bfloat16))


def random_model(config: ModelConfig = SMALL, seed: int = 0) -> Transformer:
    model = Transformer(config)
    randomise(model, seed)
    return model


def tokens_for(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """FP32 rounding alone.

    A sum of up to 150 products errs by sqrt(150) * 2^-24 = 7e-7 of itself; about 10 of them a layer add up like a
    random walk, sqrt(10 * 3 layers) * 7e-7 = 4e-6. A wrong tensor shows as more than 1e-2.
    """
    assert want.std() > 0.1
    assert ((got - want).norm() / want.norm()).item() < 1e-5


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, through safetensors alone."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dtypes_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {key: handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118
    return found


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors (None removes one) and write them as a single file."""
    tensors = tensors_of(folder) | changes
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    kept = {key: value.clone() for key, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def without_mtp(config: ModelConfig = SMALL) -> ModelConfig:
    return replace(config, mtp_depth=0)
