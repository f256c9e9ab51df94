"""What cmake/promotion_bits.py makes of machine code that is made up here, and that the built kernels have its bits."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest

import loose_modules

FORWARD = b"ScaleBE0ELNS_10GemmOutputE0E"  # scales of 128x128, BF16 out
FFMA, FMUL = 0x223, 0x220
YIELDS, STAYS, REUSES_B = 0, 1 << 45, 2 << 58
WAITS = 5 << 41 | 7 << 48  # other control bits, which stay as they are


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loose_modules.load("cmake/promotion_bits.py")


def instruction(operation: int, factor: int, upper: int) -> bytes:
    return struct.pack("<2Q", operation | 0x7 << 12 | 20 << 16 | 30 << 24 | factor << 32, upper | WAITS | 20)


def test_one_in_four_yields_and_the_others_reuse_the_factor(tool: ModuleType) -> None:
    runs = (FFMA, 9, 5), (FMUL, 9, 2), (FFMA, 9, 1), (FFMA, 8, 2)
    before = b"".join(instruction(what, factor, 0xF << 58) * count for what, factor, count in runs)
    reuses = STAYS | REUSES_B
    first = [reuses, reuses, reuses, YIELDS, STAYS]  # what follows the fifth is no FFMA
    other_factor = [STAYS, reuses, STAYS]
    after = [instruction(FFMA, 9, bits) for bits in first] + [instruction(FMUL, 9, 0xF << 58)] * 2
    after += [instruction(FFMA, factor, bits) for factor, bits in zip((9, 8, 8), other_factor, strict=True)]
    assert tool.set_bits(before, 4) == b"".join(after)


def test_a_factor_that_is_written_over_is_read_again(tool: ModuleType) -> None:
    writes_its_factor, reads_it = instruction(FFMA, 20, 0), instruction(FFMA, 20, 0)
    assert tool.set_bits(writes_its_factor + reads_it, 4) == instruction(FFMA, 20, STAYS) * 2


def device_binary(section: bytes, code: bytes) -> bytes:
    """An ELF file for CUDA with two sections: names, and `section`."""
    names = b"\0.shstrtab\0" + section + b"\0"
    header = struct.pack("<4s14xH20xQ10x3H", b"\x7fELF", 190, 64 + len(names) + len(code), 64, 3, 1)
    at = 64 + len(names)
    sections = struct.pack("<2I4Q24x", 0, 0, 0, 0, 0, 0)
    sections += struct.pack("<2I4Q24x", 1, 3, 0, 0, 64, len(names))
    sections += struct.pack("<2I4Q24x", 11, 1, 0, 0, at, len(code))
    return header + names + code + sections


def test_only_gemm_kernels_change(tool: ModuleType) -> None:
    code = instruction(FFMA, 9, 0) * 8
    small = device_binary(b".text.sm90_fp8_gemm_kernel_GemmConfigILi128E", code)
    large = device_binary(b".text.sm90_fp8_gemm_kernel_GemmConfigILi256E", code)
    other = device_binary(b".text.mla_prefill_kernel", code)
    host = b"\x7fELF" + bytes(40)
    set_small, set_large = (file.replace(code, tool.set_bits(code, every)) for file, every in ((small, 4), (large, 8)))
    assert tool.patch(host + other + small + large) == host + other + set_small + set_large
    with pytest.raises(ValueError, match="no FFMA of a GEMM kernel found"):
        tool.patch(host + other)


def test_a_failed_compilation_is_passed_on(tool: ModuleType) -> None:
    assert tool.main([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_an_object_without_gemm_kernels_is_an_error_and_removed(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.o"
    made.write_bytes(b"compressed")
    assert tool.main([sys.executable, "-c", "pass", "-o", str(made)]) == 1
    assert not made.exists()
    assert "made.o: no FFMA of a GEMM kernel found" in capsys.readouterr().err


def test_built_forward_kernels_have_the_bits(tool: ModuleType) -> None:
    binding = importlib.util.find_spec("dsv3rt._C")
    if binding is None or binding.origin is None:
        pytest.skip("a package without kernels")
    file = Path(binding.origin).with_name("libdsv3rt_kernels.so").read_bytes()
    forward = {name: file[start:end] for name, start, end in tool.find_kernels(file) if FORWARD in name}
    assert forward
    for name, code in forward.items():
        assert code == tool.set_bits(code, tool.instructions_a_yield(name)), name
