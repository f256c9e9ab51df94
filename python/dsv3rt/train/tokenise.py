"""Text to token shards, in parallel: `dsv3rt tokenize`. The format is in `dsv3rt.train.shards`."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dsv3rt.config import DataConfig
from dsv3rt.train import readers
from dsv3rt.train.corpus import Document, find_documents
from dsv3rt.train.fim import document_key, open_encoder
from dsv3rt.train.readers import Chunk
from dsv3rt.train.run_dir import write_atomically
from dsv3rt.train.shards import FORMAT, MANIFEST, PROGRESS, ShardFolder
from dsv3rt.train.tokenizer import Tokenizer, open_tokenizer

SHARD_BYTES = 64 * 2**20  # of input
_AT_ONCE_BYTES = 4 * 2**20  # of documents encoded together


@dataclass(frozen=True)
class Job:
    """What to tokenise and how. `shard_bytes` of input make a shard, the unit of work and of resuming."""

    inputs: tuple[str, ...]
    output: Path
    tokenizer: str
    text_key: str = "text"
    fim_rate: float = 0.0
    fim_seed: int = 0
    newline_split_rate: float = 0.0
    newline_split_seed: int = 0
    shard_bytes: int = SHARD_BYTES


def tokenise(job: Job, workers: int = 1) -> dict[str, Any]:
    """Write the shards and then the manifest, which is returned; shards that an earlier call finished are kept.

    The files depend on the inputs and the job alone, not on `workers` or on how often the work was interrupted.

    Raises:
        ValueError: an input can't be read, or the folder holds shards of other inputs; one line.
    """
    if workers < 1 or job.shard_bytes < 1:
        raise ValueError(f"tokenize: --workers and --shard-mb must be positive, got {workers} and {job.shard_bytes}")
    config = _data_config(job)
    tokenizer = open_tokenizer(job.tokenizer, fim=job.fim_rate > 0)
    open_encoder(tokenizer, config)  # what is wrong with it is said before anything is written
    documents = _find(config)
    shards = readers.divide(documents, job.shard_bytes)
    header = _header(job, tokenizer, documents)
    job.output.mkdir(parents=True, exist_ok=True)
    with _locked(job.output):
        if (job.output / MANIFEST).exists():
            return _finished(job.output, header)
        (job.output / PROGRESS).mkdir(exist_ok=True)
        keys = [_shard_key(header, chunks) for chunks in shards]
        records = _write_shards(job, shards, keys, workers)
        manifest = {**header, **_totals(records), "shards": [r["shard"] for r in records if r["shard"]["tokens"]]}
        if not manifest["tokens"]:
            raise ValueError("tokenize: no text in the inputs")
        _remove_strangers(job.output, manifest)
        write_atomically(job.output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(job.output / PROGRESS)
    return manifest


def _data_config(job: Job) -> DataConfig:
    suffixes = (*DataConfig().suffixes, *readers.SUFFIXES)
    return DataConfig(
        paths=job.inputs,
        suffixes=suffixes,
        tokenizer=job.tokenizer,
        fim_rate=job.fim_rate,
        fim_seed=job.fim_seed,
        newline_split_rate=job.newline_split_rate,
        newline_split_seed=job.newline_split_seed,
    )


def _find(config: DataConfig) -> list[Document]:
    try:
        return find_documents(config)
    except ValueError as error:
        raise ValueError(str(error).replace("data.paths:", "tokenize:").replace(" (data.suffixes)", "")) from None


def _header(job: Job, tokenizer: Tokenizer, documents: Sequence[Document]) -> dict[str, Any]:
    """The manifest without what the shards add to it."""
    identity = {"identity": tokenizer.identity, "vocab_size": tokenizer.vocab_size, "eos": tokenizer.eos}
    return {
        "format": FORMAT,
        "tokenizer": {"name": job.tokenizer, **identity},
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "text_key": job.text_key,
        "fim": {"rate": job.fim_rate, "seed": job.fim_seed},
        "newline_split": {"rate": job.newline_split_rate, "seed": job.newline_split_seed},
        "shard_bytes": job.shard_bytes,
        "inputs": [{"name": document.name, "bytes": document.path.stat().st_size} for document in documents],
    }


def _finished(output: Path, header: dict[str, Any]) -> dict[str, Any]:
    manifest = ShardFolder.open(output).manifest
    different = [key for key in header if json.loads(json.dumps(header[key])) != manifest.get(key)]
    if different:
        raise ValueError(
            f"{output}: holds shards made with other {', '.join(different)}; remove them or choose another --output"
        )
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    return manifest


def _shard_key(header: dict[str, Any], chunks: Sequence[Chunk]) -> str:
    """Changes when the shard's content may: an unfinished job goes on only with shards of the same key."""
    how = {name: value for name, value in header.items() if name != "inputs"}
    times = [os.stat(chunk.path).st_mtime_ns for chunk in chunks]
    text = json.dumps([how, [dataclasses.astuple(chunk) for chunk in chunks], times], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()


def _write_shards(job: Job, shards: Sequence[list[Chunk]], keys: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """The record of every shard, in order; those that are not there yet are written."""
    records = [_kept(job.output, index, key) for index, key in enumerate(keys)]
    sizes = [sum(chunk.size for chunk in chunks) for chunks in shards]
    missing = [index for index, record in enumerate(records) if record is None]
    done = sum(size for size, record in zip(sizes, records, strict=True) if record)
    tasks = [(index, keys[index], shards[index]) for index in missing]
    quiet = not sys.stderr.isatty()
    with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=quiet) as bar:
        for index, record in _results(job, tasks, workers):
            records[index] = record
            bar.update(sizes[index])
    return [record for record in records if record is not None]


Task = tuple[int, str, list[Chunk]]


def _results(job: Job, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(shard, record) as they are finished."""
    if workers == 1 or len(tasks) < 2:
        tokenizer = open_tokenizer(job.tokenizer, fim=job.fim_rate > 0)
        for task in tasks:
            yield task[0], _write_shard(job, tokenizer, task)
        return
    # Forked from a server without threads: the library behind tokenizer.json has some that a fork does not carry over.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_start_worker)
    try:
        futures = {pool.submit(_work, job, task): task[0] for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise ValueError("tokenize: a worker process was killed (out of memory?); the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, end when it does, however it does, and keep to one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, task: Task) -> dict[str, Any]:
    return _write_shard(job, open_tokenizer(job.tokenizer, fim=job.fim_rate > 0), task)


def _write_shard(job: Job, tokenizer: Tokenizer, task: Task) -> dict[str, Any]:
    index, key, chunks = task
    encoder = open_encoder(tokenizer, _data_config(job))
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    parts: list[NDArray[np.integer]] = []
    keys: list[int] = []
    for names, documents in _batches(chunks, job.text_key):
        batch = [document_key(name) for name in names]
        for number, tokens in zip(batch, encoder.encode(batch, documents), strict=True):
            if len(tokens):
                parts.append(np.append(tokens, tokenizer.eos).astype(dtype))
                keys.append(number)
    columns = {
        "bin": np.concatenate(parts) if parts else np.empty(0, dtype=dtype),
        "idx": np.cumsum([len(part) for part in parts], dtype="<i8"),
        "key": np.array(keys, dtype="<u8"),
    }
    name = f"shard-{index:05d}"
    digests = {suffix: _write(job.output / f"{name}.{suffix}", column) for suffix, column in columns.items()}
    shard = {"name": name, "documents": len(keys), "tokens": len(columns["bin"]), "sha256": digests}
    record = {"key": key, "shard": shard}
    write_atomically(_record(job.output, index), json.dumps(record))
    return record


def _batches(chunks: Sequence[Chunk], text_key: str) -> Iterator[tuple[list[str], list[bytes]]]:
    names: list[str] = []
    documents: list[bytes] = []
    size = 0
    for chunk in chunks:
        for name, document in readers.read(chunk, text_key):
            names.append(name)
            documents.append(document)
            size += len(document)
            if size >= _AT_ONCE_BYTES:
                yield names, documents
                names, documents, size = [], [], 0
    yield names, documents


def _write(path: Path, column: NDArray[np.integer]) -> str:
    """Write aside, rename; the SHA-256 of the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    data = np.ascontiguousarray(column).data
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return hashlib.sha256(data).hexdigest()


def _record(output: Path, index: int) -> Path:
    return output / PROGRESS / f"{index:05d}.json"


def _kept(output: Path, index: int, key: str) -> dict[str, Any] | None:
    """The record of a shard that an earlier call finished, of the same input."""
    path = _record(output, index)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    shard = record["shard"]
    whole = all((output / f"{shard['name']}.{suffix}").is_file() for suffix in shard["sha256"])
    return record if whole and record["key"] == key else None


def _totals(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(record["shard"][name] for record in records) for name in ("documents", "tokens")}


def _remove_strangers(output: Path, manifest: dict[str, Any]) -> None:
    """What interrupted calls left: files written aside, shards of other inputs, shards without a document."""
    names = {shard["name"] for shard in manifest["shards"]}
    for path in [*output.glob("shard-*"), *output.glob(".shard-*.tmp")]:
        if path.stem not in names or path.name.startswith("."):
            path.unlink()


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{output}: another process is writing shards there") from None
        yield
