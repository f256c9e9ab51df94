"""`python -m benchmarks.report`: write docs/performance.md from benchmarks/results/<gpu>/<suite>.json.

`--check` writes nothing and fails if the page differs from what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

FIELDS = ("op", "shape", "metric", "value", "peer", "peer_value", "ratio", "commit")
UNITS = {"tflops": "TFLOPS", "gbps": "GB/s", "us": "µs", "mb": "MB"}
PEERS = {
    "cublas_block": "`torch._scaled_mm` with block scales (cuBLASLt)",
    "cublas_tensor": "`torch._scaled_mm` with one scale a tensor (cuBLASLt)",
    "scaled_grouped_mm": "`torch._scaled_grouped_mm`, one scale a row",
    "bf16_matmul": "`torch.matmul` in BF16",
    "cudnn": "cuDNN attention through torch",
    "copy": "the same run's device-to-device copy, read plus write",
    "copy_of_this_size": "a copy of as many bytes in the same run",
    "empty_kernel": "the launch of a kernel that does nothing",
    "torch_eager": "the same chain of torch ops",
    "torch_compile": "that chain under torch.compile",
    "torch_fused": "`torch.optim.AdamW(fused=True)` with FP32 moments, and a copy of its weights to BF16",
    "adamw_then_quantize": "our own update with a copy in BF16, then `quantize_128x128` of that",
    "mla_decode_bf16": "our own kernel over the BF16 cache of the same tokens",
    "op_by_op": "the same steps op by op, without a CUDA graph",
    "no_drafts": "the same without drafts",
    "alone": "the same products without an average beside them",
    "without_it": "the same step without this saving; everything else as in the recipe",
    "copy_to_next_gpu": "plain copies between the GPUs at the same time",
    "one_gpu_times_ranks": "the rate of one GPU times their number",
    "all_to_all_single": "`torch.distributed.all_to_all_single`",
    "transformers": "Hugging Face transformers in BF16, eager",
    "transformers_compile": "Hugging Face transformers in BF16 under `torch.compile`",
    "dsv3rt_bf16": "this package in BF16",
}

# What the header says of all suites and isn't so of these.
NOTES = {
    "layer": "Parts of a step as they follow each other, with warm caches: all steps of ours, then all of the peer's.",
    "memory": "Peaks of a step; where there are times, the host's, of steps in a row.",
    "generate": "The host's time between tokens, warm caches; drafts stand by lot, 85 in 100.",
}

HEADER = """\
# Performance

Written by `python -m benchmarks.report` from `benchmarks/results/`; do not edit. Every line is one measurement: ours
and a peer's, taken in turns in the same run, medians of device time with cold caches. A ratio above 1 means that ours
is better. Machines drift by several percent, so compare ratios, not lines of different runs. In parentheses: our
kernel alone, by the profiler.
"""


@dataclass(frozen=True)
class Suite:
    """One result file."""

    gpu: str
    name: str
    date: str
    machine: dict[str, Any]
    lines: list[dict[str, Any]]


def load(results: Path = RESULTS) -> list[Suite]:
    """All result files below a folder, in order.

    Raises:
        ValueError: an entry lacks one of the fields that make it evidence.
    """
    return [_load_file(file) for file in sorted(results.glob("*/*.json"))]


def _load_file(file: Path) -> Suite:
    content = json.loads(file.read_text(encoding="utf-8"))
    lines = []
    for entry in content["benchmarks"]:
        line = entry["extra_info"]
        missing = [name for name in FIELDS if name not in line]
        if missing:
            raise ValueError(f"{file.name}: {entry['name']} must have extra_info {', '.join(missing)}")
        lines.append(line)
    return Suite(file.parent.name, file.stem, content["datetime"][:10], content["machine_info"], lines)


def render(suites: list[Suite]) -> str:
    """The whole page."""
    parts = [HEADER]
    if not suites:
        parts.append("Nothing has been measured yet.\n")
    for gpu in dict.fromkeys(suite.gpu for suite in suites):
        parts.append(f"## {gpu.upper()}\n")
        parts += [_render_suite(suite) for suite in suites if suite.gpu == gpu]
    used = dict.fromkeys(line["peer"] for suite in suites for line in suite.lines)
    if used:
        parts.append("## Peers\n")
        parts.append("".join(f"- `{peer}`: {PEERS.get(peer, 'see the benchmark')}\n" for peer in used))
    return "\n".join(parts)


def _render_suite(suite: Suite) -> str:
    machine = suite.machine
    commits = ", ".join(dict.fromkeys(line["commit"] for line in suite.lines))
    where = [machine.get("device", suite.gpu), f"driver {machine.get('driver', 'unknown')}"]
    where += [f"torch {machine.get('torch', 'unknown')}", suite.date, f"commit {commits}"]
    rows = [_render_line(line) for line in suite.lines]
    return "\n".join([
        f"### {suite.name}\n",
        f"{', '.join(where)}. Command: `{machine.get('command', 'unknown')}`\n",
        *(f"{note}\n" for name, note in NOTES.items() if name == suite.name),
        "| op | shape | ours | peer | | ratio |",
        "|---|---|---:|---|---:|---:|",
        *rows,
        "",
        *_summaries(suite.lines),
        "",
    ])  # fmt: skip


def _render_line(line: dict[str, Any]) -> str:
    ours, theirs = (_render_value(line[key], line["metric"]) for key in ("value", "peer_value"))
    if "kernel_value" in line:
        ours += f" ({_render_value(line['kernel_value'], line['metric'])})"
    return f"| {line['op']} | {line['shape']} | {ours} | {line['peer']} | {theirs} | {line['ratio']:.2f} |"


def _render_value(value: float, metric: str) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {UNITS.get(metric, metric)}"


def _summaries(lines: list[dict[str, Any]]) -> list[str]:
    """For every op and peer with several shapes: the geometric mean of the ratios, and the worst one."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        ratios.setdefault((line["op"], line["peer"]), []).append(line["ratio"])
    return [
        f"- {op} over {peer}: geometric mean {geometric_mean(values):.2f}, lowest {min(values):.2f}, of {len(values)}"
        for (op, peer), values in ratios.items()
        if len(values) > 1
    ]


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(load(results)), encoding="utf-8")


def is_current(results: Path = RESULTS, page: Path = PAGE) -> bool:
    return page.exists() and page.read_text(encoding="utf-8") == render(load(results))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    if not parser.parse_args(argv).check:
        write()
        return 0
    if is_current():
        return 0
    print("docs/performance.md is out of date: run `python -m benchmarks.report`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
