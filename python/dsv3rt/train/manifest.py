"""SHA-256 of every file of a checkpoint, in a list that `sha256sum -c` reads and that vouches for itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    """List every file below `folder`; the last file to be written there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    body = "".join(lines).encode()
    (folder / NAME).write_bytes(body + _seal(body))


def damage(folder: Path) -> str | None:
    """The first file that is not what was written, and how ("state.json: its SHA-256 differs"); None if all are."""
    try:
        text = (folder / NAME).read_bytes()
    except OSError as error:
        return f"{NAME}: {error.strerror}"
    body = text[: text.rfind(b"#")]
    if not body or text != body + _seal(body):
        return f"{NAME}: not as it was written"
    for line in body.decode().splitlines():
        digest, name = line.split("  ", 1)
        try:
            if _digest(folder / name) != digest:
                return f"{name}: its SHA-256 differs"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(body: bytes) -> bytes:
    return f"# {hashlib.sha256(body).hexdigest()}\n".encode()
