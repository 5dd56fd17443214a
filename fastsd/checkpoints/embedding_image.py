"""A textual inversion within a PNG, as the web UI shares one: JSON in base64, in a text chunk."""

import base64
import binascii
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from fastsd.checkpoints.strict_json import parse_object
from fastsd.errors import CheckpointError

KEY = "sd-ti-embedding"
_TENSOR = "TORCHTENSOR"
_MAX_PIXELS = 4096 * 4096


def read_embedding_image(path: Path, label: str) -> dict[str, Any]:
    """What the web UI's `.pt` of the same embedding holds. The picture is decoded only to find a chunk that lies behind it.

    Raises CheckpointError if the file is damaged, is larger than 16.8 million pixels, or has no such chunk. (The web UI hides a
    second copy in the pixels, for pictures that lost their text; that one is not read.)
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            text = image.info.get(KEY)
            if text is None and width * height <= _MAX_PIXELS and isinstance(image, PngImageFile):
                text = image.text.get(KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{label}: cannot be read as a PNG; it is damaged, or something else") from error
    if width * height > _MAX_PIXELS:
        raise CheckpointError(f"{label}: {width}x{height} pixels; more than {_MAX_PIXELS} are no embedding's")
    if not isinstance(text, str):
        raise CheckpointError(f"{label}: a picture that holds no embedding (no text chunk {KEY})")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{label}: {KEY} is no base64; the file is damaged") from error
    state = parse_object(data, f"{label}: {KEY}")
    params = state.get("string_to_param")
    if isinstance(params, dict):
        state["string_to_param"] = {key: _tensor(value, label) for key, value in params.items()}
    return state


def _tensor(value: Any, label: str) -> torch.Tensor:
    rows = value.get(_TENSOR) if isinstance(value, dict) else None
    try:
        return torch.tensor(rows, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{label}: {KEY} holds no rows of numbers") from error
