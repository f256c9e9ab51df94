"""A checkpoint folder, read tensor by tensor and checked against the layout before anything is loaded."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3rt.config import ModelConfig
from dsv3rt.hf.codec import are_pow2
from dsv3rt.hf.config_json import from_json, has_pow2_scales
from dsv3rt.hf.layout import TensorSpec, mtp_prefixes, tensor_specs

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FP8 = "F8_E4M3"
WIDE = ("BF16", "F16", "F32")
SCALES = ("F32", "F8_E8M0")
_MAPPED_BYTES = 1 << 28  # read from one mapping before it is made anew: pages that were read stay resident until then
_ITEM_BYTES = (("F32", 4), ("BF16", 2), ("F16", 2))  # one byte for all others
_DERIVED = "rotary_emb.inv_freq"  # some exports hold it; it follows from config.json


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what its file's header says of it."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * dict(_ITEM_BYTES).get(self.dtype, 1)


class Checkpoint:
    """An open checkpoint: `raw` is its config.json, `config` the ModelConfig, `specs` the tensors that are there.

    The headers of all files are read and checked at once, the tensors when asked for. One file is mapped at a time, and
    no more than 256 MiB of it, or one larger tensor, is resident but for the tensors that the caller holds.
    pow2_scales: config.json says that all scales are powers of two ("ue8m0").

    Raises:
        ValueError: what is missing, unexpected, of another shape or type, unsupported, or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder")
        self.raw = _read_json(self.path / CONFIG)
        self._open_file = ""
        self._handle: Any = None
        self._bytes_read = 0
        config = from_json(self.raw, str(self.path / CONFIG))
        self.pow2_scales = has_pow2_scales(self.raw)
        self.entries = self._read_headers()
        self.config = self._without_absent_mtp(config)
        self.specs = self._checked()

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in sorted({entry.file for entry in self.entries.values()})]

    def tensor(self, key: str) -> Tensor:
        """A tensor as it is stored, mapped from its file."""
        entry = self.entries[key]
        if self._bytes_read + entry.num_bytes > _MAPPED_BYTES:
            self.close()
        handle = self._open(entry.file)
        self._bytes_read += entry.num_bytes
        tensor: Tensor = handle.get_tensor(key)
        return tensor

    def scale(self, spec: TensorSpec) -> Tensor | None:
        """The scales of an FP8 tensor in FP32, None of any other."""
        if self.entries[spec.key].dtype != FP8:
            return None
        scale = self.tensor(spec.scale_key).float()
        if self.pow2_scales and not are_pow2(scale):
            file = self.path / self.entries[spec.scale_key].file
            raise ValueError(f"{file}: {spec.scale_key} must hold powers of two (scale_fmt 'ue8m0'), got other values")
        return scale

    def close(self) -> None:
        self._open_file, self._handle, self._bytes_read = "", None, 0

    def _open(self, name: str) -> Any:
        if name != self._open_file:
            self.close()
            self._handle, self._open_file = _open_shard(self.path / name), name
        return self._handle

    def _read_headers(self) -> dict[str, Entry]:
        index = self.path / INDEX
        weight_map = None
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{index}: weight_map must map keys to files, got {str(weight_map)[:60]!r}")
        elif not (self.path / SINGLE).exists():
            raise ValueError(f"{self.path}: holds neither {INDEX} nor {SINGLE}")
        entries: dict[str, Entry] = {}
        for name in sorted({SINGLE} if weight_map is None else set(weight_map.values())):
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path / name}: missing, though {INDEX} names it")
            handle = self._open(name)
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(_DERIVED):
                    continue
                if weight_map is not None and weight_map.get(key) != name:
                    raise ValueError(f"{self.path / name}: holds {key}, which {INDEX} does not place there")
                part = handle.get_slice(key)
                entries[key] = Entry(name, part.get_dtype(), tuple(part.get_shape()))
        for key, name in (weight_map or {}).items():
            if key not in entries and not key.endswith(_DERIVED):
                raise ValueError(f"{self.path / name}: lacks {key}, though {INDEX} places it there")
        self.close()
        return entries

    def _without_absent_mtp(self, config: ModelConfig) -> ModelConfig:
        """transformers announces MTP layers in config.json that it neither loads nor saves."""
        prefixes = mtp_prefixes(config)
        if not prefixes or any(key.startswith(prefixes) for key in self.entries):
            return config
        warnings.warn(
            f"{self.path / CONFIG}: num_nextn_predict_layers is {config.mtp_depth}, but there is no key that starts "
            f"with {prefixes[0]}: read without MTP",
            stacklevel=4,
        )
        return replace(config, mtp_depth=0)

    def _checked(self) -> list[TensorSpec]:
        """The specs of what is there; every key must be known, every known key there, as its spec says."""
        specs = list(tensor_specs(self.config))
        missing = [spec.key for spec in specs if spec.key not in self.entries and not spec.duplicate_of]
        if missing:
            raise ValueError(f"{self.path}: key {missing[0]} is missing{_and_more(missing)}")
        specs = [spec for spec in specs if spec.key in self.entries]
        expected = {spec.key for spec in specs}
        for spec in specs:
            self._check(spec)
            if self.entries[spec.key].dtype == FP8:
                expected.add(spec.scale_key)
        unexpected = [key for key in self.entries if key not in expected]
        if unexpected:
            entry = self.entries[unexpected[0]]
            raise ValueError(f"{self.path / entry.file}: unexpected key {unexpected[0]}{_and_more(unexpected)}")
        return specs

    def _check(self, spec: TensorSpec) -> None:
        dtype = self.entries[spec.key].dtype
        allowed = (*WIDE, FP8) if spec.role == "linear" else WIDE
        self._require(spec.key, "dtype", " or ".join(allowed), dtype, dtype in allowed)
        self._require_shape(spec.key, spec.shape)
        if dtype == FP8:
            if spec.scale_key not in self.entries:
                raise ValueError(f"{self.path}: key {spec.scale_key} is missing, though {spec.key} is {FP8}")
            scale_dtype = self.entries[spec.scale_key].dtype
            self._require(spec.scale_key, "dtype", " or ".join(SCALES), scale_dtype, scale_dtype in SCALES)
            self._require_shape(spec.scale_key, spec.scale_shape)

    def _require_shape(self, key: str, shape: tuple[int, ...]) -> None:
        self._require(key, "shape", str(shape), str(self.entries[key].shape), self.entries[key].shape == shape)

    def _require(self, key: str, what: str, allowed: str, got: str, fits: bool) -> None:
        if not fits:
            file = self.path / self.entries[key].file
            raise ValueError(f"{file}: {key} must have {what} {allowed}, got {got}")


def check_duplicate(checkpoint: Checkpoint, spec: TensorSpec) -> None:
    """An MTP layer's copy of the embedding or head must be the shared one, for the model holds one of them."""
    copy, shared = checkpoint.tensor(spec.key), checkpoint.tensor(spec.duplicate_of)
    if not torch.equal(copy, shared):
        file = checkpoint.path / checkpoint.entries[spec.key].file
        raise ValueError(f"{file}: {spec.key} must equal {spec.duplicate_of}, got other values")


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file, cut short or damaged ({error})") from None
