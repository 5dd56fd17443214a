"""Model files by the names and hashes that the web UI tells them by; hashed on a thread of their own, while the model loads and
draws."""

import os
import threading
from pathlib import Path

from fastsd.checkpoints.file_bytes import file_sha256

DIGITS = 10


class ModelFile:
    """A file, a folder or a Hub id. Of its path the name alone goes into pictures."""

    def __init__(self, model: str | Path) -> None:
        self._path = path = Path(os.path.abspath(model))  # unresolved: the Hub's cache links to files called by hashes
        is_file = path.is_file()
        self.name = path.name if is_file or path.is_dir() else str(model)
        """With the file's suffix."""
        self.stem = path.stem if is_file else self.name
        self._found: str | None = None
        self._thread = threading.Thread(target=self._work, name="fastsd model hash", daemon=True) if is_file else None
        if self._thread:
            self._thread.start()

    def hash(self) -> str | None:
        """The first ten hex digits of the file's SHA-256, once they are known; None of a folder, and where the file could not be
        read again."""
        if self._thread:
            self._thread.join()
        return self._found

    def _work(self) -> None:
        try:
            self._found = file_sha256(self._path)[:DIGITS]
        except OSError:
            self._found = None
