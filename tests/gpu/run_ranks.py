"""Run a script as several ranks: one process a GPU, or all of them on one GPU through CUDA's multi-process service.

    python tests/gpu/run_ranks.py --ranks 8 --nccl path/to/libnccl.so.2 tests/gpu/check_ep.py --rounds 100

Ranks on one GPU are as real as any to NCCL and to the kernels, but for the speed of what lies between them. NCCL 2.30
allows them with NCCL_MULTI_RANK_GPU_ENABLE; its collectives must then be small enough to be resident together,
and so must our kernels: ranks x num_sms must not exceed the SMs. Without the service, where it cannot be started,
processes take turns on the GPU: right, but each handover takes milliseconds. So it is with a tool of compute-sanitizer:

    python tests/gpu/run_ranks.py --ranks 2 --sanitizer memcheck tests/gpu/check_ep.py --only rounds --rounds 10

With --nodes the ranks of one machine fall into nodes for NCCL's device API: ranks of different nodes do not reach each
other's memory, and a plugin (gin_loopback.cc, compiled with g++ when it is first needed) carries NCCL's one-sided puts
between them, with delays on request:

    python tests/gpu/run_ranks.py --ranks 8 --nodes 2 --delay-us 200 --nccl path/to/libnccl.so.2 tests/gpu/check_ep.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SHARED_GPU = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "1",  # blocks that wait leave no room on their multiprocessors for those of products
    "NCCL_MAX_NCHANNELS": "2",
    "NCCL_MAX_P2P_NCHANNELS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",  # the service has no more queues than that for eight
}


def num_gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


@contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """The variables under which processes find the service, which runs as long as the context does, or longer where it
    runs already."""
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield {}
        return
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        print("run_ranks: no nvidia-cuda-mps-control; the ranks take turns", flush=True)
        yield {}
        return
    with tempfile.TemporaryDirectory() as pipes, tempfile.TemporaryDirectory() as logs:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": logs}
        environment = {**os.environ, **variables}
        subprocess.run([control, "-d"], env=environment, check=True)
        try:
            yield variables
        finally:
            subprocess.run([control], input="quit\n", text=True, env=environment, check=False, timeout=60)


def loopback_plugin() -> Path:
    """Compiled anew where it is older than its source."""
    source, library = ROOT / "tests/gpu/gin_loopback.cc", ROOT / "build/gin_loopback.so"
    if library.exists() and library.stat().st_mtime >= source.stat().st_mtime:
        return library
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parents[1])]
    places = [(home, folder) for home in homes if home for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]
    found = [place for place in places if Path(*place, "libcudart_static.a").exists()]
    if not found:
        raise SystemExit("run_ranks: --nodes needs CUDA's libcudart_static.a, below CUDA_HOME or beside nvcc")
    home, folder = found[0]
    library.parent.mkdir(exist_ok=True)
    subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", str(source), "-o", str(library),
                    f"-I{home}/include", f"-L{home}/{folder}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"],
                   check=True)  # fmt: skip
    return library


def nodes_variables(args: argparse.Namespace) -> dict[str, str]:
    """Under which NCCL takes the ranks for several nodes."""
    if args.ranks % args.nodes:
        raise SystemExit(f"run_ranks: --ranks must be a multiple of --nodes, got {args.ranks} and {args.nodes}")
    return {
        "NCCL_LSA_TEAM_SIZE": str(args.ranks // args.nodes),
        "NCCL_RMA_PLUGIN": str(loopback_plugin()),
        "NCCL_RMA_PLUGIN_REF_COUNT": "1",  # never unloaded
        "GIN_LOOPBACK_DELAY_US": str(args.delay_us),
        "GIN_LOOPBACK_SEED": str(args.seed),
    }


def sanitized(tool: str, command: list[str]) -> list[str]:
    """The command under a tool that looks at our kernels alone, not at what NCCL asks the driver for in vain."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        raise SystemExit("run_ranks: --sanitizer needs compute-sanitizer of the CUDA toolkit, which is not here")
    return [sanitizer, "--tool", tool, "--kernel-regex", "kns=ep_", "--report-api-errors", "no",
            "--error-exitcode", "9", *command]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: list[str], rank: int, args: argparse.Namespace, common: dict[str, str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        **common,
        "RANK": str(rank),
        "WORLD_SIZE": str(args.ranks),
        "LOCAL_RANK": str(rank % args.gpus),
        "LOCAL_WORLD_SIZE": str(args.ranks // args.nodes),
    }
    if args.nccl is not None:
        environment["LD_PRELOAD"] = str(args.nccl.resolve())
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def forward() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"[{rank}] {line}", end="", flush=True)

    threading.Thread(target=forward, daemon=True).start()
    return process


def supervise(processes: list[subprocess.Popen[str]], timeout_s: float) -> int:
    """The first failure's code, 124 if the time runs out; nobody outlives it by more than ten seconds."""
    end, code = time.monotonic() + timeout_s, 0
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed and code == 0:
            code, end = failed[0], min(end, time.monotonic() + 10)
        if time.monotonic() > end:
            print("run_ranks: time is up, ending what still runs", flush=True)
            for process in processes:
                if process.poll() is None:
                    process.kill()
            code = code or 124
        time.sleep(0.05)
    time.sleep(0.2)  # for the last lines
    return code or next((process.returncode for process in processes if process.returncode), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="how many to use; 0: all that there are, up to the ranks")
    parser.add_argument("--nodes", type=int, default=1, help="into which the ranks fall, of one size")
    parser.add_argument("--delay-us", type=int, default=0, help="between nodes: a message waits up to that long")
    parser.add_argument("--seed", type=int, default=0, help="of the delays")
    parser.add_argument("--nccl", type=Path, help="a libnccl.so.2 to load before the one that torch brings")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the whole run")
    parser.add_argument("--sanitizer", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("script")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    args.gpus = args.gpus or min(args.ranks, num_gpus())
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_MODULE_LOADING": "EAGER",  # loading a kernel late can wait for one that spins
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if args.nodes > 1:
        common |= nodes_variables(args)
    command = [sys.executable, "-u", args.script, *args.rest]
    if args.sanitizer is not None:
        common["CUDA_MODULE_LOADING"] = "LAZY"  # else all of torch's kernels are instrumented
        command = sanitized(args.sanitizer, command)
    if args.ranks <= args.gpus:
        return supervise([start(command, rank, args, common) for rank in range(args.ranks)], args.timeout)
    with multi_process_service() if args.sanitizer is None else nullcontext({}) as service:
        shared = {**common, **SHARED_GPU, **service}
        return supervise([start(command, rank, args, shared) for rank in range(args.ranks)], args.timeout)


if __name__ == "__main__":
    sys.exit(main())
