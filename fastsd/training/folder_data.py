"""Pictures of one's own, with their captions beside them: `cat.png` and `cat.txt`, or a `metadata.jsonl`.

The text files are what kohya's trainer reads; the other, lines of {"file_name": …, "text": …}, is Hugging Face's ImageFolder.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastsd.checkpoints.file_bytes import file_sha256
from fastsd.errors import ImageError, ParameterError
from fastsd.images import to_rgb
from fastsd.training.data import Caption
from fastsd.wording import quoted

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


class PictureFolder:
    """Every picture of a folder, its short side scaled to `resolution` and its middle cut out square. A `Dataset`.

    A text file may hold several captions, a line each. Raises ParameterError where there are no pictures, or one has no caption.
    """

    def __init__(self, path: Path, resolution: int) -> None:
        if not path.is_dir():
            raise ParameterError(f"data.path: {quoted(str(path))} is no folder")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ParameterError(f"data.path: {quoted(str(path))} holds no pictures ({', '.join(SUFFIXES)})")
        listed = _listed(path / METADATA)
        self.files, self.resolution = files, resolution
        self.captions = [listed.get(file.name) or _beside(file) for file in files]
        self._fingerprint: str | None = None
        missing = [file.name for file, captions in zip(files, self.captions, strict=True) if not captions]
        if missing:
            raise ParameterError(
                f"data.path: {len(missing)} pictures have no caption, e.g. {quoted(missing[0])}; write "
                f"{Path(missing[0]).stem}.txt beside it, or a line in {METADATA}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> np.ndarray:
        file = self.files[index]
        try:
            with Image.open(file) as opened:
                picture = to_rgb(opened)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ImageError(f"{file.name}: cannot be read as a picture: {error}") from error
        size = (self.resolution, self.resolution)
        return np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))

    def fingerprint(self) -> str:
        """Of the files' names and bytes, and the captions."""
        if self._fingerprint is None:
            hashed = hashlib.sha256(json.dumps(self.captions).encode())
            for file in self.files:
                hashed.update(file.name.encode() + _digest(file))
            self._fingerprint = hashed.hexdigest()[:16]
        return self._fingerprint

    def caption(self, index: int, rng: np.random.Generator) -> Caption:
        captions = self.captions[index]
        return Caption(captions[rng.integers(len(captions))], {})


def _digest(file: Path) -> bytes:
    try:
        return bytes.fromhex(file_sha256(file))
    except OSError as error:
        raise ImageError(f"{file.name}: cannot be read: {error.strerror}") from error


def _beside(file: Path) -> list[str]:
    text = file.with_suffix(".txt")
    return [line.strip() for line in _lines(text) if line.strip()]


def _listed(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions.setdefault(str(entry["file_name"]), []).append(str(entry["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ParameterError(f'{METADATA}, line {number}: must be {{"file_name": …, "text": …}}') from error
    return captions


def _lines(path: Path) -> list[str]:
    """Of a text file; none if there is no such file. Not splitlines(): it also splits at what JSON allows in a string."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n") if path.is_file() else []
    except UnicodeDecodeError as error:
        raise ParameterError(f"data.path: {path.name} is not UTF-8 text; save it so") from error
