"""hf.convert: equal to saving, bit-exact where it must be, bounded in memory, resumable, and on the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hf_cases as cases
import pytest
import torch
from safetensors.torch import save_file

import dsv3rt
from dsv3rt import cli
from dsv3rt.hf import conversion

SHARD = 60_000


@pytest.fixture
def model() -> dsv3rt.Transformer:
    return cases.random_model(seed=3)


@pytest.fixture
def bf16(model: dsv3rt.Transformer, tmp_path: Path) -> Path:
    dsv3rt.hf.save(model, tmp_path / "bf16", max_shard_bytes=SHARD)
    return tmp_path / "bf16"


@pytest.fixture
def fp8(model: dsv3rt.Transformer, tmp_path: Path) -> Path:
    dsv3rt.hf.save(model, tmp_path / "fp8", fmt="fp8", max_shard_bytes=SHARD)
    return tmp_path / "fp8"


def test_convert_to_fp8_equals_save(bf16: Path, fp8: Path, tmp_path: Path) -> None:
    dsv3rt.hf.convert(bf16, tmp_path / "out", fmt="fp8", max_shard_bytes=SHARD)
    assert cases.digests(tmp_path / "out") == cases.digests(fp8)
    assert not list(tmp_path.glob("*.partial"))


def test_convert_to_bf16_equals_load_and_save(fp8: Path, tmp_path: Path) -> None:
    dsv3rt.hf.convert(fp8, tmp_path / "out", fmt="bf16", max_shard_bytes=SHARD)
    dsv3rt.hf.save(dsv3rt.hf.load(fp8), tmp_path / "want", max_shard_bytes=SHARD)
    assert cases.digests(tmp_path / "out") == cases.digests(tmp_path / "want")


def test_convert_fp8_to_fp8_keeps_the_bits(fp8: Path, tmp_path: Path) -> None:
    """Scales that no quantiser of ours would choose, as those of another producer are, survive; a detour would not."""
    stored = cases.tensors_of(fp8)
    stored = {key: value * 1.37 if key.endswith("_scale_inv") else value for key, value in stored.items()}
    cases.edit_tensors(fp8, **stored)
    own = {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128], "note": "theirs"}
    cases.edit_json(fp8 / "config.json", quantization_config=own)
    dsv3rt.hf.convert(fp8, tmp_path / "out", fmt="fp8", max_shard_bytes=SHARD // 2)
    got = cases.tensors_of(tmp_path / "out")
    assert got.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(got[key].view(torch.uint8), value.view(torch.uint8)), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == own


def test_pow2_scales_are_those_of_save_and_survive(bf16: Path, model: dsv3rt.Transformer, tmp_path: Path) -> None:
    """Converting equals saving; FP8 -> BF16 -> FP8 and FP8 -> FP8 keep every bit; config.json says ue8m0."""
    dsv3rt.hf.save(model, tmp_path / "want", fmt="fp8", max_shard_bytes=SHARD, pow2_scales=True)
    steps = [(bf16, "a", "fp8", True), (tmp_path / "a", "b", "bf16", False), (tmp_path / "b", "c", "fp8", True),
             (tmp_path / "c", "d", "fp8", False), (tmp_path / "d", "e", "fp8", True)]  # fmt: skip
    for source, target, fmt, pow2 in steps:
        dsv3rt.hf.convert(source, tmp_path / target, fmt=fmt, max_shard_bytes=SHARD, pow2_scales=pow2)
        if fmt == "fp8":
            assert cases.digests(tmp_path / target) == cases.digests(tmp_path / "want"), target
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    scales = {key: value for key, value in cases.tensors_of(tmp_path / "a").items() if key.endswith("_scale_inv")}
    assert scales
    for key, scale in scales.items():
        assert torch.equal(torch.exp2(torch.log2(scale).round()), scale), key


def test_pow2_scales_requantise_other_fp8(fp8: Path, tmp_path: Path) -> None:
    """FP8 with other scales becomes what its BF16 values become."""
    for source, target, fmt in ((fp8, "direct", "fp8"), (fp8, "bf16", "bf16"), (tmp_path / "bf16", "detour", "fp8")):
        pow2 = fmt == "fp8"
        dsv3rt.hf.convert(source, tmp_path / target, fmt=fmt, max_shard_bytes=SHARD, pow2_scales=pow2)
    assert cases.digests(tmp_path / "direct") == cases.digests(tmp_path / "detour") != cases.digests(fp8)


def test_scales_in_e8m0_are_read(bf16: Path, tmp_path: Path) -> None:
    """Scales stored in one byte each stand for the same numbers, and become FP32."""
    dsv3rt.hf.convert(bf16, tmp_path / "a", fmt="fp8", pow2_scales=True)
    want = dsv3rt.hf.load(tmp_path / "a").state_dict()
    stored = cases.tensors_of(tmp_path / "a")
    narrow = {k: v.to(torch.float8_e8m0fnu) for k, v in stored.items() if k.endswith("_scale_inv")}
    cases.edit_tensors(tmp_path / "a", **narrow)
    assert cases.dtypes_of(tmp_path / "a")[next(iter(narrow))] == "F8_E8M0"
    assert all(torch.equal(value, want[name]) for name, value in dsv3rt.hf.load(tmp_path / "a").state_dict().items())
    dsv3rt.hf.convert(tmp_path / "a", tmp_path / "b", fmt="fp8")
    got = cases.tensors_of(tmp_path / "b")
    assert all(torch.equal(got[key], stored[key]) for key in narrow)


def test_convert_keeps_what_is_beside(bf16: Path, tmp_path: Path) -> None:
    (bf16 / "tokenizer.json").write_text("{}")
    (bf16 / "LICENSE-MODEL").write_text("yours")
    (bf16 / "pytorch_model.bin").write_text("no")
    cases.edit_json(bf16 / "config.json", bos_token_id=7, dtype="float32")
    dsv3rt.hf.convert(bf16, tmp_path / "out", fmt="fp8")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "LICENSE-MODEL", "model-00001-of-00001.safetensors",
                     "model.safetensors.index.json"}  # fmt: skip
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["bos_token_id"] == 7
    assert raw["torch_dtype"] == "bfloat16"
    assert "dtype" not in raw


KILLED = """
import os, signal, sys
from dsv3rt import hf
from dsv3rt.hf import shards
write, count = shards._write_tensor, 0
def dying(file, tensor):
    global count
    count += 1
    if count == int(sys.argv[3]):
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, tensor)
shards._write_tensor = dying
hf.convert(sys.argv[1], sys.argv[2], fmt="fp8", max_shard_bytes=60_000)
"""


def test_killed_convert_resumes(bf16: Path, fp8: Path, tmp_path: Path) -> None:
    """kill -9 in the midst of the third file: the two before it stay, the files at the end are the same."""
    per_file = {}
    for name in json.loads((fp8 / "model.safetensors.index.json").read_text())["weight_map"].values():
        per_file[name] = per_file.get(name, 0) + 1
    counts = [per_file[name] for name in sorted(per_file)]
    assert len(counts) > 3
    third = counts[0] + counts[1] + counts[2] // 2
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, bf16, out, str(third)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    finished = {file.name: file.stat().st_ino for file in partial.glob("*.safetensors")}
    assert len(finished) == 2
    assert len(list(partial.glob("*.part"))) == 1
    dsv3rt.hf.convert(bf16, out, fmt="fp8", max_shard_bytes=SHARD)
    assert cases.digests(out) == cases.digests(fp8)
    assert {name: (out / name).stat().st_ino for name in finished} == finished
    assert not partial.exists()


def interrupt(bf16: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop a conversion before its index is written; returns the partial folder."""
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            dsv3rt.hf.convert(bf16, out, fmt="fp8", max_shard_bytes=SHARD)
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_convert_redoes_damaged_files(
    damage: str, bf16: Path, fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = interrupt(bf16, tmp_path / "out", monkeypatch) / "model-00002-of-00006.safetensors"
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    dsv3rt.hf.convert(bf16, tmp_path / "out", fmt="fp8", max_shard_bytes=SHARD)
    assert cases.digests(tmp_path / "out") == cases.digests(fp8)


def test_convert_goes_on_when_only_the_name_is_missing(
    bf16: Path, fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    partial.mkdir()
    (partial / "convert-progress.json.part").write_text("{")  # killed while it began
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "finish", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            dsv3rt.hf.convert(bf16, out, fmt="fp8", max_shard_bytes=SHARD)
    dsv3rt.hf.convert(bf16, out, fmt="fp8", max_shard_bytes=SHARD)
    assert cases.digests(out) == cases.digests(fp8)


def test_convert_refuses_another_conversions_rest(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = interrupt(bf16, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match="unfinished conversion of another source or to another format; remove it"):
        dsv3rt.hf.convert(bf16, tmp_path / "out", fmt="bf16", max_shard_bytes=SHARD)
    first = next(bf16.glob("*.safetensors"))
    os.utime(first, (1, 1))
    with pytest.raises(ValueError, match="another source"):
        dsv3rt.hf.convert(bf16, tmp_path / "out", fmt="fp8", max_shard_bytes=SHARD)
    (partial / "convert-progress.json").unlink()
    with pytest.raises(ValueError, match="not an unfinished conversion"):
        dsv3rt.hf.convert(bf16, tmp_path / "out", fmt="fp8", max_shard_bytes=SHARD)


MEASURED = """
import sys
from pathlib import Path
import torch
from dsv3rt import hf
from dsv3rt.hf import checkpoint
torch.set_num_threads(1)
source, small, target, fmt, mapped = sys.argv[1:]
checkpoint._MAPPED_BYTES = int(mapped)
for warm in ("fp8", "bf16"):  # what the libraries load on first use
    hf.convert(small, f"{target}-{warm}", fmt=warm)
    small = f"{target}-{warm}"
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; getrusage's would be the parent's
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
hf.convert(source, target, fmt=fmt)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_convert_memory_is_bounded(bf16: Path, tmp_path: Path) -> None:
    """One large file: the peak, mapped pages of the source included, is far below its size, in both directions.

    16 MB may stay mapped instead of 256, so that a small file shows it; the allocator's slack is 10 to 20 MB.
    """
    mapped, limit = 16_000_000, 64_000_000
    config = replace(cases.SMALL, vocab_size=1024, dim=1024, expert_dim=512, num_experts=40, mtp_depth=1)
    model = dsv3rt.Transformer(config, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    dsv3rt.hf.save(model, tmp_path / "source")
    (file,) = (tmp_path / "source").glob("*.safetensors")
    assert file.stat().st_size > 4 * limit
    del model
    previous, small = tmp_path / "source", bf16
    for fmt in ("fp8", "bf16"):
        command = [sys.executable, "-c", MEASURED, previous, small, tmp_path / fmt / "out", fmt, str(mapped)]
        (tmp_path / fmt).mkdir(exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth = int(done.stdout)
        print(f"to {fmt}: {growth / 1e6:.1f} MB")
        assert 2_000_000 < growth < limit  # the embedding alone is 2 MB: a peak below that was not measured
        previous = tmp_path / fmt / "out"


def test_cli_converts(bf16: Path, fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "--format", "fp8", str(bf16), f"{tmp_path}/out", f"--max-shard-gb={SHARD / 1e9}"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: written as fp8\n"
    assert cases.digests(tmp_path / "out") == cases.digests(fp8)
    assert cli.main(["convert", "--format", "fp8", str(bf16), f"{tmp_path}/pow2", "--pow2-scales"]) == 0
    assert "ue8m0" in (tmp_path / "pow2" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such", "out", "--format", "fp8"], "no-such: no such folder"),
        (["a", "b"], "the following arguments are required: --format (see dsv3rt convert --help)"),
        (["a", "b", "--format", "fp4"], "argument --format: invalid choice: 'fp4'"),
        (["a", "b", "--format", "fp8", "--max-shard-gb", "0"], "--max-shard-gb: must be a positive number, got 0"),
        (["a", "b", "--format", "fp8", "--max-shard-gb=x"], "argument --max-shard-gb: invalid float value: 'x'"),
        (["a", "b", "--format=fp8", "--train.steps=1"], "unrecognized arguments: --train.steps=1"),
        (["a", "b", "--format=bf16", "--pow2-scales"],
         "hf.convert: pow2_scales must be False with fmt 'bf16', which has no scales"),
        (["a", "/", "--format=fp8"], "/: already exists; remove it or name another path"),
        (["a", "no/such/b", "--format=fp8"], "/no/such: no such folder"),
    ],
)  # fmt: skip
def test_cli_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("dsv3rt: error: ")
    assert message in lines[0]


def test_transformers_checkpoint_converts(tmp_path: Path) -> None:
    """FP32 as transformers saves it, with a derived buffer that some exports hold."""
    config = cases.without_mtp()
    reference = cases.hf_model(config)
    cases.randomise(reference, seed=4)
    reference.save_pretrained(tmp_path / "a")
    stored = cases.tensors_of(tmp_path / "a")
    save_file(stored | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
              tmp_path / "a" / "model.safetensors")  # fmt: skip
    dsv3rt.hf.convert(tmp_path / "a", tmp_path / "b", fmt="bf16")
    got = cases.tensors_of(tmp_path / "b")
    assert got.keys() == stored.keys()
    assert all(torch.equal(got[key].float(), value) for key, value in stored.items())
