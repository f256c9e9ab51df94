"""Text to token numbers: raw bytes, or any Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# What ends a document in the tokenizers one meets; DeepSeek-V3's first, which is written with full-width bars.
_EOS_NAMES = (
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eos_token|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>",
    "<|eos|>", "<eos>", "</s>", "[EOS]", "[SEP]",
)  # fmt: skip


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer. `vocab_size` is one above the highest token number."""

    vocab_size: int
    eos: int

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Tokens 0..255 are the bytes themselves; 256 begins and 257 ends a document."""

    vocab_size = 258
    bos = 256
    eos = 257

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(document, dtype=np.uint8).astype(np.int64) for document in documents]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        if not path.is_file():
            raise ValueError(f"data.tokenizer: must be 'bytes' or the path of a tokenizer.json, no such file: '{path}'")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a file it can't read
            raise ValueError(f"data.tokenizer: '{path}' is not a tokenizer.json: {error}") from None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        eos = next((vocabulary[name] for name in _EOS_NAMES if name in vocabulary), None)
        if eos is None:
            raise ValueError(f"data.tokenizer: '{path}' has no end-of-document token, none of {', '.join(_EOS_NAMES)}")
        self.eos = eos

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]:
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "bytes" or the path of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name))
