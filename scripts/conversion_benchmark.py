"""Convert a large synthetic checkpoint and watch the memory: `python scripts/conversion_benchmark.py --folder DIR`.

The checkpoint has DeepSeek-V3's widths, few layers and few experts; its weights are random. It is written tensor by
tensor, converted BF16 -> FP8 -> BF16 -> FP8 with `dsv3rt convert`, each in a process of its own, and the two FP8
checkpoints are compared. DIR needs room for about three times --gb, and is left empty.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dsv3rt import presets
from dsv3rt.config import ModelConfig
from dsv3rt.hf.config_json import to_json
from dsv3rt.hf.layout import tensor_specs
from dsv3rt.hf.shards import Shard, plan_shards, write_index, write_json, write_shard

GB = 1e9
POLL_S = 0.02
FIELDS = ("VmHWM", "RssAnon", "RssFile")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where there is room")
    parser.add_argument("--gb", type=float, default=20.0, help="least size of the BF16 checkpoint (default: 20)")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run(Path(name), config_of(options.gb * GB), options.shard_gb)


def run(folder: Path, config: ModelConfig, shard_gb: float) -> None:
    started = time.perf_counter()
    make(folder / "bf16", config, int(shard_gb * GB))
    print(
        f"{config.num_layers} layers and {config.mtp_depth} of MTP, {config.num_experts} experts, files of at most "
        f"{shard_gb:g} GB: {size_of(folder / 'bf16') / GB:.1f} GB, made in {time.perf_counter() - started:.0f} s"
    )
    for source, target, fmt in (("bf16", "fp8", "fp8"), ("fp8", "back", "bf16"), ("back", "again", "fp8")):
        convert(folder / source, folder / target, fmt, shard_gb)
        if source != "fp8":
            remove(folder / source)
    names = sorted(file.name for file in (folder / "fp8").iterdir())
    same = filecmp.cmpfiles(folder / "fp8", folder / "again", names, shallow=False)
    assert same == (names, [], []), f"FP8 -> BF16 -> FP8 must keep every bit, got (same, other, absent): {same}"
    print(f"FP8 -> BF16 -> FP8: all {len(names)} files bitwise equal")


def config_of(num_bytes: float) -> ModelConfig:
    """DeepSeek-V3 with one dense and one MoE layer, and as many experts as make the size."""
    config = replace(presets.model("671b"), num_layers=2, num_dense_layers=1)
    for experts in range(8 * config.top_k, 257, config.num_expert_groups):
        config = replace(config, num_experts=experts)
        if sum(2 * torch.Size(spec.shape).numel() for spec in tensor_specs(config)) >= num_bytes:
            break
    return config


def make(folder: Path, config: ModelConfig, max_shard_bytes: int) -> None:
    """Write the checkpoint, one tensor in memory at a time."""
    folder.mkdir()
    shards = plan_shards("conversion_benchmark", tensor_specs(config), "bf16", max_shard_bytes)
    for shard in shards:
        write_shard(folder, shard, random_tensors(shard))
    write_index(folder, shards)
    write_json(folder / "config.json", to_json(config, "bf16"))


def random_tensors(shard: Shard) -> Iterator[tuple[str, Tensor]]:
    for spec, item in zip(shard.specs, shard.items, strict=True):
        torch.manual_seed(hash_of(spec.duplicate_of or spec.key))  # an MTP layer repeats the embedding and the head
        yield item.key, torch.randn(item.shape, dtype=item.dtype)


def hash_of(key: str) -> int:
    return int.from_bytes(key.encode(), "big") % (2**31 - 1)


def convert(source: Path, target: Path, fmt: str, shard_gb: float) -> None:
    """Run the command; print its time, and the highest memory that the system saw it have."""
    command = [sys.executable, "-m", "dsv3rt", "convert", source, target, "--format", fmt, "--max-shard-gb", shard_gb]
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = dict.fromkeys(FIELDS, 0)
    while process.poll() is None:
        peak = {name: max(peak[name], value) for name, value in memory(process.pid).items()}
        time.sleep(POLL_S)
    assert process.returncode == 0, f"convert ended with {process.returncode}"
    seconds = time.perf_counter() - started
    figures = ", ".join(f"{name} {peak[name] / GB:.2f} GB" for name in FIELDS)
    print(
        f"{source.name} -> {fmt}: {size_of(source) / GB:.1f} -> {size_of(target) / GB:.1f} GB in {seconds:.0f} s, "
        f"peak {figures}, load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def memory(pid: int) -> dict[str, int]:
    """Bytes. VmHWM: the highest total so far, as the kernel counts; RssAnon and RssFile: now, its own and mapped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended just now
        lines = []
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields.get(name, "0 kB").split()[0]) * 1024 for name in FIELDS}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
