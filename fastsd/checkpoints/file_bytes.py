"""Reading a weight file's bytes, and telling from them what the file really is."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from fastsd.errors import CheckpointError

LEGACY_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began before 1.6: a pickled magic number."""

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a pickle written by torch.save), not safetensors"),
    (b"\x80\x02", "a pickle, not safetensors"),
    (b"\x80\x03", "a pickle, not safetensors"),
    (b"\x80\x04", "a pickle, not safetensors"),
    (b"\x80\x05", "a pickle, not safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: run `git lfs pull`"),
    (b"GGUF", "a GGUF file, not safetensors"),
    (b"\x89HDF", "an HDF5 file, not safetensors"),
    (b"<!DOCTYPE", "a web page, not weights: download it again"),
    (b"<html", "a web page, not weights: download it again"),
)


def foreign_format(head: bytes) -> str | None:
    """What a file that is not safetensors is, by its first bytes; None if they say nothing."""
    return next((meaning for start, meaning in _SIGNATURES if head.startswith(start)), None)


@contextmanager
def opened(path: Path, label: str) -> Iterator[BufferedReader]:
    """`path` open for reading. CheckpointError if it is no regular file, or if opening or reading it fails."""
    if not os.path.isfile(path):  # also false for a named pipe, which would block for ever
        raise CheckpointError(f"{label} is missing")
    try:
        with path.open("rb") as file:
            yield file
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror or error}") from error


def read_capped(path: Path, label: str, limit: int) -> bytes:
    """The whole of a small file. CheckpointError if it is missing, unreadable or over `limit` bytes."""
    with opened(path, label) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{label}: larger than {limit // 2**20} MB, the most it may be")
    return data


def changed(label: str) -> CheckpointError:
    """The error for a file that is not the one checked a moment ago."""
    return CheckpointError(f"{label}: changed while it was being read; load it again when nothing writes to it")


def read_exactly(path: Path, label: str, size: int) -> bytes:
    """The whole file, which must still be `size` bytes long.

    Reads and never maps: a mapped file that is cut short kills the process, and one that is overwritten changes
    weights that are already loaded.
    """
    with opened(path, label) as file:
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise changed(label)
    return data


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
