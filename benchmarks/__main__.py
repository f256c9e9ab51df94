"""`python -m benchmarks [suite ...]`: measure on this GPU, keep the results, write docs/performance.md.

A suite is a file test_bench_<suite>.py; its results go to benchmarks/results/<gpu>/<suite>.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import provenance, report

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    suites = {file.stem.removeprefix("test_bench_"): file for file in sorted(HERE.glob("test_bench_*.py"))}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure on this GPU.")
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of: {', '.join(suites)} (default: all)")
    parser.add_argument("--commit", help="commit to write into the results (default: asked of git)")
    options = parser.parse_args(argv)
    unknown = [name for name in options.suites if name not in suites]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are: {', '.join(suites)}")
    if not torch.cuda.is_available():
        print("benchmarks: torch finds no CUDA GPU here, nothing was measured", file=sys.stderr)
        return 1
    folder = report.RESULTS / provenance.folder_of(torch.cuda.get_device_name())
    commit = options.commit or provenance.commit()
    failed = [name for name in options.suites or suites if not run(suites[name], folder / f"{name}.json", commit)]
    report.write()
    if failed:
        print(f"benchmarks: failed, their results are as before: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(file: Path, result: Path, commit: str) -> bool:
    """Run one suite; its result is replaced only if all of it passed."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / result.name
        options = ["-m", "gpu", "-p", "no:xdist", f"--benchmark-json={fresh}", f"--bench-commit={commit}"]
        command = [sys.executable, "-m", "pytest", str(file.relative_to(provenance.ROOT)), *options]
        passed = subprocess.run(command, cwd=provenance.ROOT, check=False).returncode == 0
        if passed:
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(fresh.read_text())
    return passed


if __name__ == "__main__":
    sys.exit(main())
