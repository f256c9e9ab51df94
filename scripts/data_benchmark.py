"""Time tokenising and loading: `python scripts/data_benchmark.py [--samples N]`.

Tokenising is timed beside plain loops over the `tokenizers` library on the same JSON lines, with a byte-level BPE that
is trained here; the text is the standard library's sources. Loading draws samples in training order from shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tokenizers

from dsv3rt.config import DataConfig, MixturePhase
from dsv3rt.train.corpus import find_documents, load_corpus
from dsv3rt.train.data import Samples, SampleSource
from dsv3rt.train.mixture import Mixture
from dsv3rt.train.tokenizer import open_tokenizer

VOCAB_SIZE = 16384
BATCH = 8
TEXTS_AT_ONCE = 64
SHARD_MB = 2
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--copies", type=int, default=1, help="of the standard library, each with other words")
    parser.add_argument("--rounds", type=int, default=3, help="of tokenising")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"tokenizers {tokenizers.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        lines, tokenizer = prepare(Path(folder), options.copies)
        shards = time_tokenising(Path(folder), lines, tokenizer, options.rounds)
        time_loading(shards, tokenizer, options.samples, options.seq_len)


def prepare(folder: Path, copies: int) -> tuple[Path, Path]:
    """The text as JSON lines, and a tokenizer trained on it."""
    texts = [document.path.read_text(errors="replace") for document in find_documents(DataConfig())]
    lines = folder / "text.jsonl"
    with open(lines, "w", encoding="utf-8") as file:
        for copy in range(copies):  # a name is another word in each copy, so that caches of words help less
            file.writelines(json.dumps({"text": text.replace("_", f"_{copy}x")}) + "\n" for text in texts)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts[::4], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return lines, folder / "tokenizer.json"


def time_tokenising(folder: Path, lines: Path, tokenizer: Path, rounds: int) -> Path:
    """MB/s of JSON lines to token files on disk, for ours from the shell's start of the command; returns the shards.

    The best of several rounds, in each of which all take their turn: other work on the machine only ever costs time.
    """

    def dsv3rt(output: Path, workers: int) -> None:
        options = ["--tokenizer", tokenizer, "--workers", workers, "--shard-mb", SHARD_MB]
        command = [sys.executable, "-m", "dsv3rt", "tokenize", lines, "--output", output, *options]
        shutil.rmtree(output, ignore_errors=True)
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)

    cases: dict[str, Callable[[], None]] = {
        "plain loop, encode": lambda: plain(lines, tokenizer, folder / "a.bin", "encode"),
        "plain loop, encode_batch": lambda: plain(lines, tokenizer, folder / "b.bin", "encode_batch"),
        "plain loop, encode_batch_fast": lambda: plain(lines, tokenizer, folder / "c.bin", "encode_batch_fast"),
        "dsv3rt tokenize --workers 1": lambda: dsv3rt(folder / "one", 1),
        "dsv3rt tokenize --workers 2": lambda: dsv3rt(folder / "two", 2),
    }
    size = lines.stat().st_size / MB
    print(f"\ntokenising {size:.0f} MB of JSON lines, BPE of {VOCAB_SIZE} tokens; plain batches of {TEXTS_AT_ONCE}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    load = os.getloadavg()[0]
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        each = ", ".join(f"{size / one:.2f}" for one in times)
        print(f"  {name:32} {size / min(times):6.2f} MB/s  (rounds: {each})")
    print(f"  load average {load:.1f} before, {os.getloadavg()[0]:.1f} after", flush=True)
    for output in ("one", "two"):
        shards = np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted((folder / output).glob("*.bin"))])
        for loop in ("a.bin", "b.bin", "c.bin"):
            assert np.array_equal(shards, np.fromfile(folder / loop, dtype="<u2")), "the loops must agree"
    return folder / "two"


def plain(lines: Path, tokenizer: Path, output: Path, method: str) -> None:
    """What one writes without a library: one process, one file."""
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    eos = encoder.token_to_id("<|eos|>")
    encode = getattr(encoder, method)
    with open(output, "wb") as file:
        for texts in grouped(lines, TEXTS_AT_ONCE):
            for encoding in map(encode, texts) if method == "encode" else encode(texts):
                if encoding.ids:
                    file.write(np.array([*encoding.ids, eos], dtype="<u2").tobytes())


def grouped(lines: Path, count: int) -> Iterator[list[str]]:
    texts: list[str] = []
    with open(lines, encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            if len(texts) == count:
                yield texts
                texts = []
    if texts:
        yield texts


def time_loading(shards: Path, tokenizer: Path, samples: int, seq_len: int) -> None:
    """Tokens/s of batches in training order, and how the process grows meanwhile."""
    config = DataConfig(paths=(str(shards),), tokenizer=str(tokenizer))
    stream = load_corpus(config, open_tokenizer(str(tokenizer)), seq_len + 1).train
    drawn = Samples(stream, seq_len, seed=0)
    print(f"\nloading: {len(stream):,} tokens, {len(drawn):,} samples of {seq_len} an epoch, batches of {BATCH}")
    time_drawing(drawn, samples, seq_len)
    print("the same as a mixture of three sources")
    sources = [drawn, Samples(stream, seq_len, seed=1), Samples(stream, seq_len, seed=2)]
    time_drawing(Mixture(sources, [MixturePhase((0.7, 0.2, 0.1))], seed=0), samples // 10, seq_len)


def time_drawing(drawn: SampleSource, samples: int, seq_len: int) -> None:
    marks = sorted({min(samples, mark) for mark in (1000, samples // 100, samples // 10, samples // 2, samples)})
    position, load, started = 0, os.getloadavg()[0], time.perf_counter()
    for mark in marks:
        while position < mark:
            drawn.batch(position, BATCH)
            position += BATCH
        speed = position * seq_len / (time.perf_counter() - started)
        memory = ", ".join(f"{name} {kilobytes / 1024:.1f} MiB" for name, kilobytes in resident().items())
        print(f"  {position:>10,} samples  {speed / 1e6:6.2f} M tokens/s  {memory}", flush=True)
    print(f"  load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")


def resident() -> dict[str, int]:
    """This process's memory in KiB: its own, and pages of mapped files, which the system takes back when it must."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) for name, key in (("own", "RssAnon"), ("mapped files", "RssFile"))}


if __name__ == "__main__":
    main()
