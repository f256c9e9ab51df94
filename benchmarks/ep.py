"""The expert exchange between ranks against the same run's copy and against a chain around `all_to_all_single`.

    python tests/gpu/run_ranks.py --ranks 8 --nccl path/to/libnccl.so.2 benchmarks/ep.py

Needs several ranks, so it is no pytest suite. Times are the slowest rank's medians. Ranks on one GPU share its memory,
so what they read and write is held against that memory's copy, and says nothing of NVLink. Of ranks with a GPU each
what crosses between GPUs is held against plain copies from each GPU to the next, all at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import provenance
from benchmarks.timing import Case, Peer, figures
from dsv3rt import ops
from dsv3rt.ops.types import QuantTensor, Routing
from tests.gpu.ep_ranks import captured

REPS = 20
ONE_GPU, A_GPU_EACH = "one GPU", "a GPU each"


class Bench:
    """One rank's tensors, and the ranks' common clock."""

    def __init__(self, args: argparse.Namespace, low_latency: bool = False) -> None:
        """Ranks must have met."""
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        self.args = args
        torch.manual_seed(self.rank)
        self.x_TD = torch.randn(args.tokens, args.columns, dtype=torch.bfloat16, device=self.device)
        scores_TE = torch.rand(args.tokens, args.experts, device=self.device)
        self.idx_TK = scores_TE.argsort(dim=1)[:, : args.top_k].contiguous()
        self.weight_TK = torch.rand(args.tokens, args.top_k, device=self.device)
        self.routing = Routing(self.idx_TK, self.weight_TK, scores_TE, torch.empty(0))
        mean = args.tokens * args.top_k
        self.capacity = (mean + mean // 8) // 128 * 128 + args.experts // self.size * 128
        limits = ops.EpLimits(
            args.tokens,
            args.top_k,
            args.columns,
            num_sms=args.num_sms,
            timeout_s=20.0,
            low_latency=low_latency,
            max_rows=0 if low_latency else self.capacity,
        )
        self.group = ops.EpGroup(dist.group.WORLD, args.experts, limits=limits, device=self.device)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def seconds(self, run: Callable[[], object]) -> float:
        """The slowest rank's median."""
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        dist.barrier()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPS)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor(median(start.elapsed_time(end) for start, end in events) * 1e-3)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def copy_gbps(self) -> float:
        """Read plus write, by rank 0 while the others wait."""
        rate = torch.zeros(1)
        if self.rank == 0:
            source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            for _ in range(3):
                target.copy_(source)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPS):
                target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            rate[0] = 2 * 2**30 * REPS / (start.elapsed_time(end) * 1e-3) / 1e9
        dist.broadcast(rate, 0)
        return float(rate)

    def link_gbps(self) -> float:
        """What a rank sends while it receives as much: plain copies by all ranks at once, each to the next one's
        GPU."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source, device=torch.device("cuda", (self.rank + 1) % self.size))
        return 2**30 / self.seconds(lambda: target.copy_(source)) / 1e9

    def dispatch_with_weights(self) -> tuple[Tensor, Tensor, ops.EpRoute]:
        return ops.ep_dispatch_with_weights(self.x_TD, self.routing, self.group, capacity=self.capacity)

    def dispatch(self, x: Tensor | QuantTensor) -> tuple[Any, ops.EpRoute]:
        return ops.ep_dispatch(x, self.routing, self.group, capacity=self.capacity)


class Chain:
    """The same exchange by torch: sort, all-to-all, sort, and the way back. Its sizes are read on the host."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.group = dist.new_group(backend="nccl")
        self.num_local = bench.args.experts // bench.size

    def dispatch(self) -> tuple[Tensor, tuple[Any, ...]]:
        bench = self.bench
        order = bench.idx_TK.flatten().argsort(stable=True)
        rows = bench.x_TD[order // bench.args.top_k]
        counts_E = torch.bincount(bench.idx_TK.flatten(), minlength=bench.args.experts)
        arriving = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving, counts_E, group=self.group)
        sent = counts_E.view(bench.size, -1).sum(1).tolist()
        received = arriving.view(bench.size, -1).sum(1).tolist()
        arrived = self._exchange(rows, sent, received)
        experts = torch.arange(self.num_local, device=rows.device).repeat(bench.size)
        by_expert = experts.repeat_interleave(arriving, output_size=sum(received)).argsort(stable=True)
        return arrived[by_expert], (order, by_expert, sent, received)

    def combine(self, rows: Tensor, way: tuple[Any, ...]) -> Tensor:
        order, by_expert, sent, received = way
        leaving = torch.empty_like(rows)
        leaving[by_expert] = rows
        back = self._exchange(leaving, received, sent)
        slots = torch.empty_like(back)
        slots[order] = back
        tokens = slots.view(*self.bench.idx_TK.shape, -1)
        return torch.einsum("tkd,tk->td", tokens, self.bench.weight_TK.to(tokens.dtype))

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(arrived, rows, received, sent, group=self.group)
        return arrived


def in_room(bench: Bench) -> tuple[Tensor, ops.EpRoute]:
    """Rows that lie where they are fetched, as the last product of the experts leaves them."""
    rows_PD, _, route = bench.dispatch_with_weights()
    room_PD = ops.ep_room(route, bench.group)
    assert room_PD is not None
    return room_PD.copy_(rows_PD), route


def shape_of(bench: Bench, link: str) -> str:
    args = bench.args
    ranks = f"{bench.size} ranks ({link})"
    return f"{ranks}, {args.tokens}x{args.columns}, top {args.top_k} of {args.experts}, {args.num_sms} SMs a rank"


def measure(bench: Bench, link: str) -> list[tuple[dict[str, Any], float]]:
    args, shape = bench.args, shape_of(bench, link)
    tokens = bench.size * args.tokens
    choices = tokens * args.top_k
    quantised = ops.quantize_1x128(bench.x_TD)
    rows_PD, route = bench.dispatch(bench.x_TD)
    fetched_PD, fetched = in_room(bench)
    one_gpu = link == ONE_GPU
    copy = bench.copy_gbps() if one_gpu else bench.link_gbps()
    here = bench.idx_TK // (args.experts // bench.size) == bench.rank
    crossing = torch.tensor(float((~here).sum()))  # choices of experts elsewhere, the most of a rank
    dist.all_reduce(crossing, dist.ReduceOp.MAX)

    def against_copy(op: str, row_bytes: int, written: int, run: Callable[[], object]) -> tuple[dict[str, Any], float]:
        """written: rows that are, beside every choice's that is read."""
        seconds = bench.seconds(run)
        moved = row_bytes * (1.0 * (choices + written) if one_gpu else float(crossing))
        peer = Peer("copy" if one_gpu else "copy_to_next_gpu", lambda: None, work=copy * 1e9 * seconds)
        line = figures(Case(op, shape, "gbps", moved), seconds, peer, seconds)
        row_gbps = choices * row_bytes / bench.size / seconds / 1e9
        line |= {"rank_gbps": round(row_gbps, 3), "us": round(seconds * 1e6, 1), "num_sms": args.num_sms}
        bench.say(json.dumps(line))
        return line, seconds

    wide, narrow = 2 * args.columns, args.columns + args.columns // 32
    lines = [
        against_copy("ep_dispatch of bfloat16", wide, choices, lambda: bench.dispatch(bench.x_TD)),
        against_copy("ep_dispatch_with_weights", wide, choices, bench.dispatch_with_weights),
        against_copy("ep_dispatch of float8", narrow, choices, lambda: bench.dispatch(quantised)),
        against_copy("ep_combine of pushed rows", wide, choices,
                     lambda: ops.ep_combine(rows_PD, route, bench.group, weight_TK=bench.weight_TK)),
        against_copy("ep_combine of fetched rows", wide, tokens,
                     lambda: ops.ep_combine(fetched_PD, fetched, bench.group)),
    ]  # fmt: skip
    chain = Chain(bench)

    def ours() -> Tensor:
        rows, way = bench.dispatch(bench.x_TD)
        return ops.ep_combine(rows, way, bench.group, weight_TK=bench.weight_TK)

    theirs_s = bench.seconds(lambda: chain.combine(*chain.dispatch()))
    ours_s = bench.seconds(ours)
    peer = Peer("all_to_all_single", lambda: None)
    line = figures(Case("ep_dispatch + ep_combine", shape, "us"), ours_s, peer, theirs_s)
    bench.say(json.dumps(line))
    return [*lines, ({**line, "num_sms": args.num_sms}, ours_s)]


def measure_latency(bench: Bench, link: str) -> list[tuple[dict[str, Any], float]]:
    """The form for decoding, its halves one after the other, as CUDA graphs; beside the chain, which none can hold."""
    shape = shape_of(bench, link)

    def dispatch() -> tuple[QuantTensor, ops.EpRoute]:
        return ops.ep_receive(ops.ep_send(bench.x_TD, bench.routing, bench.group))

    arrived, route = dispatch()
    rows = torch.zeros(arrived.data.shape, dtype=torch.bfloat16, device=bench.device).normal_()

    def combine() -> Tensor:
        return ops.ep_collect(ops.ep_send_back(rows, route, bench.group), weight_TK=bench.weight_TK)

    combine()
    chain = Chain(bench)
    sent, way = chain.dispatch()
    lines = []
    for op, ours, theirs in (
        ("ep_send + ep_receive", dispatch, chain.dispatch),
        ("ep_send_back + ep_collect", combine, lambda: chain.combine(sent, way)),
    ):
        theirs_s, ours_s = bench.seconds(theirs), bench.seconds(captured(ours)[0].replay)
        line = figures(Case(op, shape, "us"), ours_s, Peer("all_to_all_single", lambda: None), theirs_s)
        bench.say(json.dumps(line))
        lines.append(({**line, "num_sms": bench.args.num_sms}, ours_s))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 4096, "columns": 7168, "experts": 256, "top-k": 8, "num-sms": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--latency-tokens", type=int, default=128, help="of a rank in the low-latency form")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/ep.json")
    parser.add_argument("--commit", default=None)
    args = parser.parse_args()
    began = time.time()
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    bench = Bench(args)
    link = ONE_GPU if torch.cuda.device_count() < bench.size else A_GPU_EACH
    lines = measure(bench, link)
    latency = Bench(argparse.Namespace(**{**vars(args), "tokens": args.latency_tokens}), low_latency=True)
    lines += measure_latency(latency, link)
    for one in (bench, latency):
        assert one.group.kernels is not None
        one.group.kernels.check()
    if bench.rank == 0:
        folder = provenance.folder_of(torch.cuda.get_device_name())
        out = args.out or provenance.ROOT / "benchmarks/results" / folder / "ep.json"
        command = "run_ranks.py benchmarks/ep.py " + " ".join(sys.argv[1:])
        provenance.write_lines(out, "ep.py", command, args.commit or provenance.commit(), lines, REPS)
        bench.say(f"{time.time() - began:.0f} s, written to {out}")
    dist.barrier()
    bench.group.destroy()
    os._exit(0)  # taking down NCCL of several ranks on one GPU is not what is measured


if __name__ == "__main__":
    main()
