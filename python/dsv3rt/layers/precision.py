"""Which modules multiply in FP8: the linears of attention and feed-forward, and the routed experts.

Embedding, head, router, norms, attention itself and the MTP blocks' `eh_proj` stay in the model's dtype (DeepSeek-V3
report sec. 3.3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from dsv3rt.layers.linear import Linear
from dsv3rt.layers.moe import Experts
from dsv3rt.layers.weights import Orientations, casts_of, require_copies
from dsv3rt.ops.types import TILE

Precision = Literal["bf16", "fp8"]

_LINEAR_UNIT = 16  # bytes of FP8 that the GEMM's copies are made of
_HOMES = (".self_attn.", ".mlp.")


def set_precision(
    model: nn.Module, precision: Precision, keep: Sequence[str] = (), orientations: Orientations = 2
) -> list[str]:
    """Let the linears and experts of `model` multiply in FP8, or all of them in the model's dtype.

    keep: patterns ("layers.0.*") of modules that stay in the model's dtype. orientations: of weights in FP8 that are
        kept, 2 or 1, to save a byte a number.

    Returns the names of the modules in FP8.

    Raises:
        ValueError: a module whose widths FP8 can't have; weights whose copies in the model's dtype were released.
    """
    require_copies("precision", model)
    chosen = []
    for name, module in model.named_modules():
        if not isinstance(module, Linear | Experts):
            continue
        module.is_fp8 = precision == "fp8" and can_be_fp8(name) and not _matches(name, keep)
        if module.is_fp8:
            _check(name, module)
            chosen.append(name)
    for cast in casts_of(model):
        cast.keep(orientations)
    return chosen


def can_be_fp8(name: str) -> bool:
    return any(home in f".{name}" for home in _HOMES)


def check_patterns(keep: Sequence[str], names: Iterable[str], where: str) -> None:
    """Every pattern stands for some module; `names` are those of the whole model's modules.

    Raises:
        ValueError: one doesn't; `where` says where it was given.
    """
    candidates = [name for name in names if can_be_fp8(name)]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(f"{where} must name modules that can be fp8 ({candidates[0]!r}, ...), got {pattern!r}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(name: str, module: Linear | Experts) -> None:
    if isinstance(module, Experts):
        hidden, dim = module.down_proj.shape[2], module.down_proj.shape[1]
        sizes, unit = {"expert_dim": hidden}, TILE
        _require_multiple(name, {"dim": dim}, _LINEAR_UNIT)
    else:
        rows, columns = module.weight.shape
        is_hidden = ".mlp." in name
        sizes, unit = {"output": rows, "input": columns}, _LINEAR_UNIT
        if is_hidden:  # of gate, up and down; SwiGLU's backward takes whole tiles
            _require_multiple(name, {"hidden": columns if name.endswith("down_proj") else rows}, TILE)
    _require_multiple(name, sizes, unit)


def _require_multiple(name: str, sizes: dict[str, int], unit: int) -> None:
    for what, size in sizes.items():
        if size % unit:
            raise ValueError(f"precision: {name} must have its {what} width divisible by {unit} for fp8, got {size}")
