"""A single file's hash, by which the web UI tells models apart: found on a thread of its own, while the model loads and draws."""

import threading
from pathlib import Path

from fastsd.checkpoints.file_bytes import file_sha256

DIGITS = 10


class ModelHash:
    """The first ten hex digits of a file's SHA-256."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: str | None = None
        self._thread = threading.Thread(target=self._work, name="fastsd model hash", daemon=True)
        self._thread.start()

    def get(self) -> str | None:
        """The digits, once they are known; None where the file could not be read again."""
        self._thread.join()
        return self._found

    def _work(self) -> None:
        try:
            self._found = file_sha256(self._path)[:DIGITS]
        except OSError:
            self._found = None
