"""The doctor reports and never crashes: no torch, no GPU, no driver, no extension, wrong GPU, broken ops."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3rt import doctor
from dsv3rt.doctor import Finding

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30)
A100 = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", major=8, minor=0, total_memory=80 * 2**30)
BUILD_INFO = {
    "version": "0.1.0", "cuda": True, "cuda_version": "13.0", "arch": "sm_90a", "kernels": ["quantize_1x128"],
}  # fmt: skip


def fake_torch(*gpus: SimpleNamespace, cuda: str | None = "13.0") -> SimpleNamespace:
    calls = SimpleNamespace(
        is_available=lambda: bool(gpus),
        device_count=lambda: len(gpus),
        get_device_properties=lambda index: gpus[index],
        nccl=SimpleNamespace(version=lambda: (2, 28, 9)),
    )
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda), cuda=calls)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a machine: what imports give (an exception is raised) and what the driver says."""

    def build(modules: dict[str, Any], driver: tuple[int, int] | None = None) -> list[Finding]:
        modules = {"dsv3rt._C": ModuleNotFoundError("no _C", name="dsv3rt._C"), **modules}

        def load(name: str) -> Any:
            module = modules.get(name) or importlib.import_module(name)
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(doctor, "_load", load)
        monkeypatch.setattr(doctor, "driver_cuda_version", lambda: driver)
        monkeypatch.setattr(doctor, "_reference_ops", lambda: [Finding("reference ops", "agree")])
        return doctor.collect()

    return build


def extension(**changes: Any) -> SimpleNamespace:
    nccl = {"compiled": "2.32.3", "loaded": "2.29.7", "problem": "NCCL 2.29.7 is loaded"}
    return SimpleNamespace(build_info=lambda: {**BUILD_INFO, **changes}, ep_nccl_info=lambda: nccl)


def found(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_doctor_runs_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-2] == "CPU reference: ready"
    assert output.splitlines()[-1].startswith("CUDA kernels: ")


def test_doctor_without_extension_says_how_to_build_it(machine: Any) -> None:
    findings = machine({"torch": fake_torch(H100)}, driver=(13, 0))
    assert "make setup" in found(findings, "extension").advice
    assert doctor.cuda_verdict(findings) == "not built: this installation has no compiled kernels"
    assert doctor.cpu_verdict(findings) == "ready"


def test_doctor_tells_an_extension_that_does_not_load_from_a_missing_one(machine: Any) -> None:
    findings = machine({"dsv3rt._C": ImportError("undefined symbol: x")})
    assert "do not load (ImportError: undefined symbol: x)" in doctor.cuda_verdict(findings)


def test_doctor_without_gpu_keeps_the_cpu_path_ready(machine: Any) -> None:
    findings = machine({"torch": fake_torch(cuda=None), "dsv3rt._C": extension()})
    assert doctor.cpu_verdict(findings) == "ready"
    verdict = doctor.cuda_verdict(findings)
    assert verdict.startswith("built, not usable here: ")
    for reason in ("CPU build", "no NVIDIA driver", "no GPU"):
        assert reason in verdict


def test_doctor_on_a_hopper_gpu_is_ready(machine: Any) -> None:
    findings = machine({"torch": fake_torch(H100), "dsv3rt._C": extension()}, driver=(13, 0))
    assert doctor.cuda_verdict(findings) == "ready"
    assert found(findings, "kernels").value == "quantize_1x128"
    assert found(findings, "gpu 0").value == "NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB"
    assert found(findings, "nccl").value.startswith("2.28.9 in torch")


@pytest.mark.parametrize(("gpus", "ready"), [((A100,), False), ((A100, H100), True)])
def test_doctor_wants_one_hopper_gpu(machine: Any, gpus: tuple[SimpleNamespace, ...], ready: bool) -> None:
    findings = machine({"torch": fake_torch(*gpus), "dsv3rt._C": extension()}, driver=(13, 0))
    assert (doctor.cuda_verdict(findings) == "ready") is ready
    assert "9.0" in found(findings, "gpu 0").advice


def test_doctor_sees_a_driver_older_than_the_kernels(machine: Any) -> None:
    findings = machine({"torch": fake_torch(H100), "dsv3rt._C": extension()}, driver=(12, 8))
    assert "compiled with CUDA 13.0, the driver stops at 12.8" in doctor.cuda_verdict(findings)


def test_doctor_without_torch_fails_with_advice(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine({"torch": ModuleNotFoundError("No module named 'torch'", name="torch")})
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert "-> pip install torch" in output
    assert "CPU reference: not working: torch cannot be imported" in output


def test_doctor_reports_a_check_that_breaks(machine: Any) -> None:
    findings = machine({"dsv3rt._C": SimpleNamespace(build_info=lambda: {})})
    assert "the check of extension failed (KeyError: 'cuda')" in doctor.cuda_verdict(findings)


def test_doctor_reports_an_old_nccl(machine: Any) -> None:
    finding = found(machine({"dsv3rt._C": extension()}), "expert exchange")
    assert finding.value == "not usable: NCCL 2.29.7 is loaded"
    assert not finding.blocks


def test_doctor_reports_broken_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_load", lambda name: importlib.import_module("math" if name == "dsv3rt.ops" else name))
    (finding,) = doctor._reference_ops()
    assert finding.blocks == "cpu"
    assert "the reference ops fail (AttributeError" in finding.value


def test_doctor_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version_of", lambda name: None)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["torch>=2", 'ruff>=1; extra == "dev"'])
    assert found(doctor._packages(), "packages").value == "missing: torch"


def test_doctor_reads_the_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version: 12.3.0\n")
    assert doctor.driver_version(file) == "580.65.06"
    assert doctor.driver_version(tmp_path / "absent") is None
