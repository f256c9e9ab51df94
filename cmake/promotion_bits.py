"""Compile a CUDA file of forward GEMMs, then set control bits of its FFMAs.

    python promotion_bits.py nvcc ... -o OBJECT ...    (as CMake's CUDA_COMPILER_LAUNCHER)

Promotion is runs of FFMAs that read the same scale (csrc/gemm/consumers.cuh). In a loop that also holds wgmma, ptxas
lets every other one yield to another warp, and one that yields can't leave the scale in the operand cache for the next:
more reads of registers compete with those of the tensor cores. Here one in 8 or 4 yields, and the others reuse the
scale, which no source brings about: 1.3 % of time in the mean of the forward shapes (docs/notes/gemm.md, sixth round).

These bits say when an instruction may be issued and where an operand is read from, not what it computes. Where they
lie: Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking (2018), section 2; sm_90 has that
format.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

KERNEL = b"sm90_fp8_gemm_kernel"
FFMA_OF_REGISTERS = 0x223
OPERATION = 0xFFF  # of the lower word; of the upper one:
DOES_NOT_YIELD = 1 << 45
REUSES = 0xF << 58
REUSES_B = 2 << 58

ELF = b"\x7fELF"
MACHINE_CUDA = 190


def instructions_a_yield(kernel: bytes) -> int:
    """As measured: 4 costs tiles of 256 rows 0.5 %, and 8 costs 4096x512x32768, one wave of 128x128, 2 %."""
    return 8 if b"GemmConfigILi256E" in kernel else 4


def second_factor(lower: int) -> int | None:
    """The register that an FFMA reads as operand B; None for other instructions."""
    return lower >> 32 & 0xFF if lower & OPERATION == FFMA_OF_REGISTERS else None


def target(lower: int) -> int:
    return lower >> 16 & 0xFF


def set_bits(code: bytes, every: int) -> bytes:
    """Machine code whose FFMAs yield once in `every` of a run, and else reuse the factor that the next one shares."""
    words = list(struct.unpack(f"<{len(code) // 8}Q", code))
    run = 0
    for i in range(0, len(words), 2):
        factor = second_factor(words[i])
        if factor is None:
            run = 0
            continue
        run += 1
        upper = words[i + 1] & ~(DOES_NOT_YIELD | REUSES)
        if run % every != 0:
            upper |= DOES_NOT_YIELD
            shared = i + 2 < len(words) and second_factor(words[i + 2]) == factor
            if shared and target(words[i]) != factor:
                upper |= REUSES_B
        words[i + 1] = upper
    return struct.pack(f"<{len(words)}Q", *words)


def find_kernels(file: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name of the section, start and end of each GEMM kernel's code in the device binaries inside `file`."""
    start = file.find(ELF)
    while start >= 0:
        if struct.unpack_from("<H", file, start + 18)[0] == MACHINE_CUDA:
            yield from kernels_of(file, start)
        start = file.find(ELF, start + 1)


def kernels_of(file: bytes, start: int) -> Iterator[tuple[bytes, int, int]]:
    (table,) = struct.unpack_from("<Q", file, start + 40)
    entry_bytes, entries, names = struct.unpack_from("<3H", file, start + 58)
    sections = [struct.unpack_from("<2I4Q", file, start + table + i * entry_bytes) for i in range(entries)]
    for name, _, _, _, offset, size in sections:
        at = start + sections[names][4] + name
        section = file[at : file.index(b"\0", at)]
        if section.startswith(b".text.") and KERNEL in section:
            yield section, start + offset, start + offset + size


def patch(file: bytes) -> bytes:
    """An object with the bits of all GEMM kernels set.

    Raises:
        ValueError: it holds no such kernel, or none with an FFMA: compressed, or of another encoding.
    """
    patched = bytearray(file)
    for section, start, end in find_kernels(file):
        patched[start:end] = set_bits(file[start:end], instructions_a_yield(section))
    if patched == file:
        raise ValueError("no FFMA of a GEMM kernel found: is its device code compressed?")
    return bytes(patched)


def main(command: Sequence[str]) -> int:
    status = subprocess.run(command, check=False).returncode
    if status != 0 or "-o" not in command:
        return status
    path = Path(command[command.index("-o") + 1])
    if path.suffix != ".o":
        return 0
    try:
        path.write_bytes(patch(path.read_bytes()))
    except ValueError as error:
        path.unlink()
        print(f"promotion_bits: {path}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
