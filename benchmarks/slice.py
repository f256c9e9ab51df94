"""`python -m benchmarks.slice [case ...]`: print the slice's lines as they are measured; `--profile` prints kernels.

`python -m benchmarks slice` measures the same and keeps the results (test_bench_slice.py).
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.slice_models import Slice, Subject, free, ours, peak_bytes, transformers
from benchmarks.timing import Case, Peer, figures, sample_both, sample_cuda
from dsv3rt.layers.precision import set_precision
from dsv3rt.layers.weights import release_copies
from dsv3rt.model.block import Block
from dsv3rt.model.transformer import Transformer

PEAK_TFLOPS = 989.4  # BF16, dense, of an H100 SXM: what MFU is quoted against

CASES = {
    "base": Slice(),
    "graph": Slice(as_graph=True),
    "low_memory": Slice(orientations=1),
    "latents": Slice(bf16="latents"),
    "attention": Slice(bf16="attention"),
    "four_layers": Slice(layers=4),
    "optimizer": Slice(with_optimizer=True),
    "16k": Slice(tokens=16384),
    "one_rank": Slice(experts=256, one_rank=True),
}

Makers = dict[str, Callable[[Slice], Subject]]
PEERS: Makers = {
    "transformers": lambda shape: transformers(shape, compiled=False),
    "transformers_compile": lambda shape: transformers(shape, compiled=True),
    "dsv3rt_bf16": lambda shape: ours(shape, "bf16"),
}


def peers_of(shape: Slice) -> list[str]:
    """transformers can't hold a share of the experts."""
    return ["dsv3rt_bf16"] if shape.one_rank else ["transformers", "transformers_compile"]


def measure(shape: Slice, peer_name: str, reps: int = 12) -> tuple[dict[str, Any], list[float]]:
    """One line of evidence and our samples, in seconds; both models are on the device and run in turns."""
    subject = ours(shape, "fp8")
    peer = PEERS[peer_name](shape)
    case = Case(f"slice in FP8, {shape.what}", str(shape), "us")
    samples, peer_samples = sample_both(subject.step, peer.step, reps=reps)
    seconds, peer_seconds = median(samples), median(peer_samples)
    line: dict[str, Any] = figures(case, seconds, Peer(peer_name, peer.step), peer_seconds)
    peaks = peak_bytes(subject), peak_bytes(peer)
    line |= {
        "tokens_per_s": round(shape.tokens / seconds),
        "peer_tokens_per_s": round(shape.tokens / peer_seconds),
        "tflops": round(shape.flops / seconds / 1e12, 1),
        "mfu_of_bf16": round(shape.flops / seconds / 1e12 / PEAK_TFLOPS, 4),
        "peak_gb": round(peaks[0] / 1e9, 2),
        "peer_peak_gb": round(peaks[1] / 1e9, 2),
        "held_gb": round(subject.held_bytes / 1e9, 2),
        "peer_held_gb": round(peer.held_bytes / 1e9, 2),
    }
    return line, samples


def print_line(line: dict[str, Any]) -> None:
    print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)


class Layer:
    """Forward and backward of one MoE block, with what stands around it left out."""

    def __init__(self, shape: Slice) -> None:
        model = Transformer(shape.config, dtype=torch.bfloat16, device="cuda")
        set_precision(model, "fp8", orientations=shape.orientations)
        release_copies(model)
        block = model.layers[0]
        assert isinstance(block, Block)
        self._block = block
        self._sequences = model.sequences(shape.batch()[0])
        self._x_TD = torch.randn(shape.tokens, shape.config.dim, device="cuda", dtype=torch.bfloat16)
        self._dy_TD = torch.randn_like(self._x_TD)

    def step(self) -> Tensor:
        x_TD = self._x_TD.detach().requires_grad_()
        y_TD, _ = self._block(x_TD, self._sequences)
        y_TD.backward(self._dy_TD)
        for parameter in self._block.parameters():
            parameter.grad = None
            if (kept := getattr(parameter, "main_grad", None)) is not None:
                kept.grad = None
        assert x_TD.grad is not None
        return x_TD.grad


def profile(shape: Slice, reps: int = 5, least: float = 0.005) -> None:
    """The kernels of one layer's forward and backward that take `least` of their time, the rest in one line, and where
    the host waited."""
    layer = Layer(shape)
    for _ in range(3):
        layer.step()
    seconds = median(sample_cuda(layer.step, reps=10))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(reps):
            layer.step()
        torch.cuda.synchronize()
    times: dict[str, tuple[float, int]] = {}
    for event in recorded.events():
        if event.device_time > 0:
            total, count = times.get(event.name, (0.0, 0))
            times[event.name] = (total + event.device_time, count + 1)
    busy = sum(total for total, _ in times.values())
    print(f"one MoE layer, {shape}: {seconds * 1e3:.3f} ms; kernels {busy / reps / 1e3:.3f} ms")
    print(f"{'us':>9} {'share':>6} {'calls':>6}  kernel")
    rest = {name: one for name, one in times.items() if one[0] < least * busy}
    shown = sorted((one for one in times.items() if one[0] not in rest), key=lambda one: -one[1][0])
    shown.append((f"{len(rest)} others", (sum(one[0] for one in rest.values()), sum(one[1] for one in rest.values()))))
    for name, (total, count) in shown:
        print(f"{total / reps:9.1f} {total / busy:6.1%} {count / reps:6.1f}  {name[:100]}")
    print_waits(layer)


def print_waits(layer: Layer) -> None:
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.step()
    torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{warning.filename}:{warning.lineno}" for warning in caught})
    print(f"waits of the host in a step: {len(caught)}")
    for place in places:
        print(f"  {place}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slice")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--peers", help=f"of: {', '.join(PEERS)}; separated by commas (default: what fits the case)")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one layer instead")
    options = parser.parse_args(argv)
    failed = False
    for name in options.cases or list(CASES):
        shape = CASES[name]
        jobs = ["profile"] if options.profile else options.peers.split(",") if options.peers else peers_of(shape)
        for job in jobs:
            try:
                if options.profile:
                    profile(shape)
                else:
                    print_line(measure(shape, job)[0])
            except Exception:  # one case that fails leaves the others their turn
                failed = True
                print(f"slice: {name} against {job} failed", flush=True)
                traceback.print_exc()
            free()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
