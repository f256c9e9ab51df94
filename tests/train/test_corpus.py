"""Files to tokens: what is read, what is held out, how documents are joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from train_helpers import write_corpus

from dsv3rt.config import DataConfig
from dsv3rt.train.corpus import find_documents, is_validation, load_corpus
from dsv3rt.train.tokenizer import ByteTokenizer, open_tokenizer


def data_config(*paths: Path | str, fraction: float = 0.3, tokenizer: str = "bytes") -> DataConfig:
    return DataConfig(paths=tuple(map(str, paths)), validation_fraction=fraction, tokenizer=tokenizer)


def test_documents_end_with_eos_and_stay_whole(tmp_path: Path) -> None:
    corpus = load_corpus(data_config(write_corpus(tmp_path / "text")), ByteTokenizer(), min_tokens=33)
    for stream, held_out in ((corpus.train, False), (corpus.validation, True)):
        assert stream[-1] == 257
        documents = bytes(np.where(stream == 257, 0, stream).astype(np.uint8)).split(b"\0")[:-1]
        names = [f"file{int(d.split(b'file ')[1].split(b':')[0]):02}.txt" for d in documents]
        assert names == sorted(names)
        assert all((tmp_path / "text" / n).read_bytes() == d for n, d in zip(names, documents, strict=True))
        assert all(is_validation(name, 0.3) == held_out for name in names)


def test_split_depends_on_the_relative_path_alone(tmp_path: Path) -> None:
    """Pinned: the same files on every machine."""
    held = [name for index in range(20) if is_validation(name := f"a/file{index}.py", 0.2)]
    assert held == ["a/file1.py", "a/file6.py", "a/file9.py", "a/file17.py", "a/file18.py"]
    one, two = (load_corpus(data_config(write_corpus(tmp_path / n / "text")), ByteTokenizer(), 33) for n in "ab")
    assert np.array_equal(one.validation, two.validation)


def test_fraction_is_respected() -> None:
    assert 400 < sum(is_validation(f"file{index}", 0.05) for index in range(10_000)) < 600


def test_single_file_holds_out_its_end(tmp_path: Path) -> None:
    path = tmp_path / "all.log"  # a file named outright needs no known suffix
    path.write_bytes(bytes(range(256)) * 8)
    corpus = load_corpus(data_config(path, fraction=0.25), ByteTokenizer(), min_tokens=33)
    assert len(corpus.validation) == round(2049 * 0.25)
    assert np.concatenate([corpus.train, corpus.validation]).tolist() == [*list(range(256)) * 8, 257]


def test_python_stdlib_is_sources_without_tests() -> None:
    documents = find_documents(data_config("python-stdlib"))
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any(part in {"test", "tests", "site-packages"} for name in names for part in name.split("/"))


def test_python_package_is_its_sources() -> None:
    names = [document.name for document in find_documents(data_config("python-package:json", "python-package:pytest"))]
    assert {"decoder.py", "__init__.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)


@pytest.mark.parametrize("name", ["no_such_package", "argparse", "os.path", "", "../x"])
def test_python_package_must_be_an_installed_one(name: str) -> None:
    with pytest.raises(ValueError, match=r"^data.paths: no Python package of that name is installed: 'python-package:"):
        find_documents(data_config(f"python-package:{name}"))


def test_each_file_once_hidden_and_foreign_ones_never(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    for name in ("a.txt", "b/c.md", ".git/d.txt", "e.bin", "b/__pycache__/f.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    documents = find_documents(data_config(folder, folder / "b", folder / "a.txt"))
    assert [document.name for document in documents] == ["a.txt", "b/c.md"]


def test_fingerprint_follows_the_training_tokens(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text")
    first = load_corpus(data_config(folder), ByteTokenizer(), 33).fingerprint
    again = load_corpus(data_config(folder), ByteTokenizer(), 33).fingerprint
    name = next(f"file{i:02}.txt" for i in range(30) if not is_validation(f"file{i:02}.txt", 0.3))
    (folder / name).write_text("something else")
    assert first == again != load_corpus(data_config(folder), ByteTokenizer(), 33).fingerprint


def test_bytes_take_anything_and_decode_replaces() -> None:
    tokenizer = ByteTokenizer()
    (tokens,) = tokenizer.encode([b"caf\xe9\xff"])
    assert tokens.tolist() == [99, 97, 102, 233, 255]
    assert tokenizer.decode([256, 99, 97, 233, 257]) == "ca\ufffd"


def make_tokenizer(path: Path, *specials: str) -> Path:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "\ufffd": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(path))
    return path


def test_tokenizer_file(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(make_tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>")))
    assert (tokenizer.vocab_size, tokenizer.eos) == (5, 4)
    assert [t.tolist() for t in tokenizer.encode([b"a b zzz", b"b \xff a"])] == [[1, 2, 0], [2, 3, 1]]
    assert tokenizer.decode([1, 2]) == "a b"


def test_tokenizer_file_without_eos_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer: .* no end-of-document token"):
        open_tokenizer(str(make_tokenizer(tmp_path / "tokenizer.json")))
