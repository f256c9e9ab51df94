"""`dsv3rt doctor`: what this machine has, what it lacks, and what to do about that.

Runs anywhere: no GPU, no driver, no extension and no torch are findings, not crashes.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

KERNEL_CAPABILITY = (9, 0)  # Hopper; the kernels use its instructions and run on nothing else
OPTIONAL_PACKAGES = {"transformers": "for the tests that compare with the Hugging Face model"}
NCCL_WHEELS = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
Blocked = Literal["", "cpu", "cuda"]  # the path that cannot work


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` says what to do; `blocks` names the path that cannot work for want of it."""

    name: str
    value: str
    advice: str = ""
    blocks: Blocked = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings and the verdict; 0 if the CPU reference works, else 1."""
    parser = argparse.ArgumentParser(prog="dsv3rt doctor", description="Show what this installation can do.")
    parser.parse_args(argv)
    findings = collect()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.value}")
        if finding.advice:
            print(f"{'':<{width}}  -> {finding.advice}")
    print(f"\nCPU reference: {cpu_verdict(findings)}\nCUDA kernels: {cuda_verdict(findings)}")
    return 1 if _blockers(findings, "cpu") else 0


def collect() -> list[Finding]:
    """Everything that was found, in the order it is printed. Never raises."""
    checks: list[tuple[str, Callable[[], list[Finding]], Blocked]] = [
        ("python", _python, ""),
        ("dsv3rt", _package, ""),
        ("torch", _torch, "cpu"),
        ("driver", _driver, "cuda"),
        ("gpu", _gpus, "cuda"),
        ("nvcc", _nvcc, ""),
        ("extension", _extension, "cuda"),
        ("nccl", _nccl, ""),
        ("packages", _packages, ""),
        ("reference ops", _reference_ops, "cpu"),
    ]
    return [finding for name, check, blocks in checks for finding in _guarded(name, check, blocks)]


def cpu_verdict(findings: list[Finding]) -> str:
    blockers = _blockers(findings, "cpu")
    return f"not working: {_reasons(blockers)}" if blockers else "ready"


def cuda_verdict(findings: list[Finding]) -> str:
    blockers = _blockers(findings, "cuda")
    unbuilt = [finding for finding in blockers if finding.name == "extension"]
    if unbuilt:
        return f"not built: {unbuilt[0].value}"
    if blockers:
        return f"built, not usable here: {_reasons(blockers)}"
    return "built, but the CPU reference must work first" if _blockers(findings, "cpu") else "ready"


def _blockers(findings: list[Finding], path: Blocked) -> list[Finding]:
    return [finding for finding in findings if finding.blocks == path]


def _reasons(blockers: list[Finding]) -> str:
    return "; ".join(finding.value for finding in blockers)


def _guarded(name: str, check: Callable[[], list[Finding]], blocks: Blocked) -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about drivers; the findings say it better
        try:
            return check()
        except Exception as error:  # a broken installation is what a doctor is called for
            value = f"the check of {name} failed ({_one_line(error)})"
            return [Finding(name, value, "report this, with the whole output", blocks)]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _load(name: str) -> Any:
    """Import a module; every import of a doctor's check goes through here."""
    return importlib.import_module(name)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> list[Finding]:
    return [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]


def _package() -> list[Finding]:
    version = _version_of("dsv3rt")
    if version is None:
        return [Finding("dsv3rt", "not installed", "run `make setup`, or `pip install .`")]
    return [Finding("dsv3rt", version)]


def _torch() -> list[Finding]:
    try:
        torch = _load("torch")
    except ImportError as error:
        return [Finding("torch", f"torch cannot be imported ({_one_line(error)})", "pip install torch", blocks="cpu")]
    cuda = torch.version.cuda
    if cuda is None:
        advice = "to use an NVIDIA GPU, install a CUDA build of torch (see pytorch.org)"
        return [Finding("torch", f"{torch.__version__}, a CPU build of torch", advice, blocks="cuda")]
    return [Finding("torch", f"{torch.__version__}, CUDA {cuda}")]


def _driver() -> list[Finding]:
    cuda = driver_cuda_version()
    if cuda is None:
        advice = "to use an NVIDIA GPU, install its driver; inside a container, start it with --gpus all"
        return [Finding("driver", "no NVIDIA driver", advice, blocks="cuda")]
    return [Finding("driver", f"{driver_version() or 'version unknown'}, up to CUDA {cuda[0]}.{cuda[1]}")]


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The driver's own version, such as "580.65.06"; None where it cannot be read."""
    if not path.exists():
        return None
    match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", path.read_text())
    return match[1] if match else None


def _gpus() -> list[Finding]:
    try:
        torch = _load("torch")
    except ImportError:
        return [Finding("gpu", "no GPU was looked for without torch", blocks="cuda")]
    if not torch.cuda.is_available():
        advice = "everything runs on the CPU reference; the kernels need a Hopper GPU (H100, H200, H800)"
        return [Finding("gpu", "no GPU that torch can use", advice, blocks="cuda")]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return _judged([_gpu(index, device) for index, device in enumerate(devices)])


def _gpu(index: int, device: Any) -> tuple[bool, Finding]:
    memory = device.total_memory / 2**30
    value = f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"
    return (device.major, device.minor) == KERNEL_CAPABILITY, Finding(f"gpu {index}", value)


def _judged(gpus: list[tuple[bool, Finding]]) -> list[Finding]:
    """One Hopper GPU is enough for the kernels to be usable; the others only get a remark."""
    advice = "the kernels need compute capability 9.0 (H100, H200, H800)"
    block: Blocked = "" if any(fits for fits, _ in gpus) else "cuda"
    return [found if fits else Finding(found.name, found.value, advice, block) for fits, found in gpus]


def _nvcc() -> list[Finding]:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        advice = "only building the kernels needs it: install the CUDA toolkit, 12.9 or 13"
        return [Finding("nvcc", "not on PATH", advice)]
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    release = re.search(r"release ([\d.]+)", output)
    return [Finding("nvcc", f"{release[1] if release else 'version unknown'}, {path}")]


def _extension() -> list[Finding]:
    rebuild = "with nvcc on PATH, run `DSV3RT_CUDA=ON make setup`"
    try:
        info = _load("dsv3rt._C").build_info()
    except ModuleNotFoundError as error:
        if error.name != "dsv3rt._C":
            raise
        return [Finding("extension", "this installation has no compiled kernels", rebuild, blocks="cuda")]
    except ImportError as error:
        return [Finding("extension", f"the kernels do not load ({_one_line(error)})", rebuild, blocks="cuda")]
    if not info["cuda"]:
        return [Finding("extension", "this installation was compiled without CUDA", rebuild, blocks="cuda")]
    built = f"{info['version']}, CUDA {info['cuda_version']}, {info['arch']}"
    findings = [Finding("extension", built), Finding("kernels", ", ".join(info["kernels"]) or "none")]
    return findings + _exchange() + _driver_too_old(str(info["cuda_version"]))


def _exchange() -> list[Finding]:
    """Whether the kernels of expert parallelism were built and find an NCCL that is new enough."""
    nccl = _load("dsv3rt._C").ep_nccl_info()
    if nccl["problem"]:
        value = f"not usable: {nccl['problem']}"
        return [Finding("expert exchange", value, "without it torch's all-to-all carries the rows")]
    return [Finding("expert exchange", f"built with NCCL {nccl['compiled']}, runs with {nccl['loaded']}")]


def _driver_too_old(toolkit: str) -> list[Finding]:
    """CUDA promises compatibility inside a major version: a driver of an older one cannot run the kernels."""
    driver = driver_cuda_version()
    if driver is None or driver[0] >= int(toolkit.split(".")[0]):
        return []
    value = f"kernels were compiled with CUDA {toolkit}, the driver stops at {driver[0]}.{driver[1]}"
    return [Finding("driver age", value, "update the driver, or build with an older toolkit", blocks="cuda")]


def _nccl() -> list[Finding]:
    wheels = [f"{name} {version}" for name in NCCL_WHEELS if (version := _version_of(name))]
    wheel = f"wheel {', '.join(wheels)}" if wheels else "no wheel installed"
    try:
        torch = _load("torch")
    except ImportError:
        return [Finding("nccl", wheel)]
    if torch.version.cuda is None:
        return [Finding("nccl", f"none in a CPU build of torch; {wheel}")]
    used = ".".join(str(part) for part in torch.cuda.nccl.version())
    return [Finding("nccl", f"{used} in torch; {wheel}")]


def _packages() -> list[Finding]:
    findings = [Finding("packages", "all that dsv3rt requires are installed")]
    missing = [name for name in _required_packages() if _version_of(name) is None]
    if missing:
        names = " ".join(missing)
        findings = [Finding("packages", f"missing: {names}", f"training needs them: pip install {names}")]
    for name, use in OPTIONAL_PACKAGES.items():
        version = _version_of(name)
        findings.append(Finding(name, version or "not installed", "" if version else f"{use}: pip install {name}"))
    return findings


def _required_packages() -> list[str]:
    try:
        requirements = importlib.metadata.requires("dsv3rt") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", item, maxsplit=1)[0] for item in requirements if "extra ==" not in item]


def _reference_ops() -> list[Finding]:
    """Quantise a few numbers and read them back, the shortest way through ops and its CPU reference."""
    try:
        torch, ops = _load("torch"), _load("dsv3rt.ops")
        x_TD = torch.linspace(-1, 1, 256).reshape(2, 128)
        error = (ops.dequantize(ops.quantize_1x128(x_TD)) - x_TD).abs().max().item()
    except Exception as failure:  # whatever it is, it is the finding
        return [
            Finding(
                "reference ops",
                f"the reference ops fail ({_one_line(failure)})",
                "reinstall: `make setup`",
                blocks="cpu",
            )
        ]
    if not error <= 16 / 448:  # half the widest gap between E4M3 numbers, at a scale of 1 / 448
        return [Finding("reference ops", f"quantize_1x128 is off by {error:g}", "report this", blocks="cpu")]
    return [Finding("reference ops", "quantize_1x128 and back agree")]


if __name__ == "__main__":
    sys.exit(main())
