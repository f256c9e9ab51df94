"""Fill in the middle: nothing is lost, the share is right, and the choice depends on the name and the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from train_helpers import config, losses, write_corpus

from dsv3rt.config import DataConfig
from dsv3rt.train.corpus import load_corpus
from dsv3rt.train.fim import Encoder, document_key
from dsv3rt.train.tokenise import Job, tokenise
from dsv3rt.train.tokenizer import ByteTokenizer, open_tokenizer
from dsv3rt.train.trainer import Trainer

KEYS = [document_key(f"file{index}") for index in range(1000)]
TEXTS = [f"naïve text “{index}” with 漢字 and 🙂 of file {index}".encode() for index in range(1000)]


def restored(tokens: list[int]) -> tuple[bytes, bytes, bytes]:
    """Prefix, middle, suffix of a document of byte tokens."""
    assert tokens[0] == 258
    hole, end = tokens.index(259), tokens.index(260)
    return bytes(tokens[1:hole]), bytes(tokens[end + 1 :]), bytes(tokens[hole + 1 : end])


def test_parts_in_psm_order_make_up_the_document() -> None:
    encoded = Encoder(ByteTokenizer(fim=True), 1.0).encode(KEYS, TEXTS)
    lengths = []
    for tokens, text in zip(encoded, TEXTS, strict=True):
        parts = restored(tokens.tolist())
        assert b"".join(parts) == text
        for part in parts:
            part.decode()  # no character is cut
        lengths.append([len(part) / len(text) for part in parts])
    assert np.allclose(np.mean(lengths, axis=0), 1 / 3, atol=0.04)  # two uniform cuts


def test_rate_is_the_share_of_documents() -> None:
    encoded = Encoder(ByteTokenizer(fim=True), 0.1).encode(KEYS, TEXTS)
    chosen = [tokens[0] == 258 for tokens in encoded]
    assert 70 < sum(chosen) < 130
    assert all(bytes(t.tolist()) == text for t, text, c in zip(encoded, TEXTS, chosen, strict=True) if not c)


def test_choice_depends_on_key_and_seed_alone() -> None:
    tokenizer = ByteTokenizer(fim=True)
    whole = Encoder(tokenizer, 0.5, 7).encode(KEYS, TEXTS)
    alone = Encoder(tokenizer, 0.5, 7).encode(KEYS[500:501], TEXTS[500:501])[0]
    assert np.array_equal(whole[500], alone)
    other = Encoder(tokenizer, 0.5, 8).encode(KEYS, TEXTS)
    same = [np.array_equal(a, b) for a, b in zip(whole, other, strict=True)]
    assert 180 < sum(same) < 320  # both left alone: a quarter


def test_pinned() -> None:
    """The same cuts on every machine and in every version: shards that are there must still fit."""
    (tokens,) = Encoder(ByteTokenizer(fim=True), 1.0, 3).encode([document_key("a.txt")], [b"0123456789"])
    assert restored(tokens.tolist()) == (b"012345", b"678", b"9")


def test_bytes_that_are_no_text_and_tiny_documents() -> None:
    encoder = Encoder(ByteTokenizer(fim=True), 1.0)
    for document in (bytes([0x80] * 50), bytes(range(256))):
        for key in KEYS[:50]:
            assert b"".join(restored(encoder.encode([key], [document])[0].tolist())) == document
    assert [t.tolist() for t in encoder.encode(KEYS[:2], [b"", b"ab"])] == [[], [97, 98]]


def make_tokenizer(path: Path, *specials: str) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>", *specials])
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    "names",
    [
        ("<|fim_end|>", "<|fim_hole|>", "<|fim_begin|>"),
        ("<\uff5cfim\u2581end\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581begin\uff5c>"),
    ],
)
def test_tokenizer_file_gives_the_marks(tmp_path: Path, names: tuple[str, str, str]) -> None:
    tokenizer = open_tokenizer(make_tokenizer(tmp_path / "tokenizer.json", *names), fim=True)
    assert tokenizer.fim == (6, 5, 4)
    (tokens,) = Encoder(tokenizer, 1.0).encode(KEYS[:1], [b" a " * 30])
    assert (tokens[0], (tokens == 5).sum(), (tokens == 4).sum(), (tokens == 1).sum()) == (6, 1, 1, 30)


def test_tokenizer_file_without_marks_is_rejected(tmp_path: Path) -> None:
    name = make_tokenizer(tmp_path / "tokenizer.json", "<|fim_end|>")
    assert open_tokenizer(name).fim is None
    with pytest.raises(ValueError, match=r"data\.fim_rate: must be 0 with '.*', it has no tokens <\|fim_begin\|> "):
        open_tokenizer(name, fim=True)


def test_shards_hold_what_the_text_gives(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    tokenise(Job((str(text),), tmp_path / "shards", "bytes", fim_rate=0.5, fim_seed=1, shard_bytes=1000))
    tokenizer = open_tokenizer("bytes", fim=True)
    corpora = [
        load_corpus(DataConfig((str(path),), validation_fraction=0.3, fim_rate=0.5, fim_seed=1), tokenizer, 33)
        for path in (text, tmp_path / "shards")
    ]
    assert np.array_equal(corpora[0].train[:], corpora[1].train[:])
    assert 4 < (corpora[0].train[:] == 258).sum() < 18
    with pytest.raises(ValueError, match=r"data\.fim_seed must be 1, that of the shards in '.*', got 2"):
        load_corpus(DataConfig((str(tmp_path / "shards"),), fim_rate=0.5, fim_seed=2), tokenizer, 33)


def test_trains_with_fim_and_needs_room_for_the_marks(tmp_path: Path) -> None:
    fim = {"fim_rate": 0.5}
    with pytest.raises(
        ValueError, match=r"model\.vocab_size must be at least the 261 of data\.tokenizer 'bytes', got 260"
    ):
        Trainer(config(tmp_path, data=fim, model={"vocab_size": 260}))
    Trainer(config(tmp_path, data=fim, train={"steps": 2})).fit()
    assert losses(tmp_path)[-1][1] is not None
