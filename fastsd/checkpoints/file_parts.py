"""One file of many tensors: opened by what it holds, with the configs that `fastsd convert` wrote, and its parts.

header ─► names, shapes ─► names in diffusers' folders ─► a part, loaded as if it were a file of such a folder
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsd.checkpoints.file_bytes import LEGACY_PICKLE, opened
from fastsd.checkpoints.ldm_config import Json
from fastsd.checkpoints.pickle_file import PickleFile, open_pickle
from fastsd.checkpoints.safetensors_file import SafetensorsFile, TensorSpec, open_safetensors
from fastsd.checkpoints.strict_json import parse_object
from fastsd.checkpoints.weight_files import COMPONENTS
from fastsd.errors import CheckpointError
from fastsd.wording import listed, shown

CONFIG_KEY = "fastsd"
"""Where `fastsd convert` puts a model's configs in a safetensors file's metadata."""

CONFIGS = (*COMPONENTS, "scheduler")
VOCABULARY_FILES = ("vocab.json", "merges.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)

Pieces = dict[str, tuple[str, ...]]
"""Name in the file → diffusers' names for its equal parts, one below the other."""


@dataclass(frozen=True)
class Part:
    """The tensors of one component within a single file, under diffusers' names."""

    label: str
    tensors: dict[str, TensorSpec]
    file: SafetensorsFile | PickleFile
    pieces: Pieces

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors; q, k and v of OpenCLIP share memory. Peak: their bytes."""
        tensors = self.file.read_tensors(self.pieces)
        parts: dict[str, torch.Tensor] = {}
        for name, targets in self.pieces.items():
            tensor = tensors.pop(name)
            parts |= zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,), strict=True)
        return parts


def open_file(path: Path, allow_pickle: bool) -> SafetensorsFile | PickleFile:
    """A safetensors file or, if allowed, a pickle: by what it holds, whatever it is called. CheckpointError for another."""
    label = shown(path.name)
    with opened(path, label) as file:
        head = file.read(len(LEGACY_PICKLE))
    if not head.startswith(b"PK\x03\x04") and head != LEGACY_PICKLE:
        return open_safetensors(path, label)
    if not allow_pickle:
        raise CheckpointError(
            f"{label} is a pickle, which can carry code: convert it to safetensors, or pass allow_pickle=True if you trust "
            "where it comes from"
        )
    return open_pickle(path, label, training=True)


def stored_configs(file: SafetensorsFile | PickleFile) -> tuple[dict[str, Json], dict[str, str]]:
    """A whole model's configs and its tokenizer's files, as `fastsd convert` leaves them in the metadata; else empty."""
    text = file.metadata.get(CONFIG_KEY) if isinstance(file, SafetensorsFile) else None
    if not isinstance(text, str):
        return {}, {}
    label = f"{file.label}: metadata {CONFIG_KEY}"
    stored = parse_object(text.encode("utf-8", "surrogatepass"), label)
    configs = {name: stored.get(name) for name in CONFIGS}
    files = stored.get("tokenizer", {})
    if not all(isinstance(config, dict) for config in configs.values()) or not isinstance(files, dict):
        raise CheckpointError(f"{label}: must hold an object for each of {', '.join(CONFIGS)}; convert the model again")
    if not all(name in TOKENIZER_FILES and isinstance(content, str) for name, content in files.items()):
        raise CheckpointError(
            f"{label}: tokenizer must hold the text of {', '.join(TOKENIZER_FILES)}, or of some of them"
        )
    return configs, files  # type: ignore[return-value]


def averaged(file: SafetensorsFile | PickleFile, pieces: Pieces, ema_name: Callable[[str], str]) -> Pieces:
    """The same tensors, read from the moving average; ema_name: where that of a name lies. CheckpointError if one is missing."""
    found = {ema_name(name): targets for name, targets in pieces.items()}
    missing = found.keys() - file.tensors.keys()
    if missing:
        raise CheckpointError(
            f"{file.label}: use_ema: {len(missing)} of {len(found)} averaged tensors are not in the file "
            f"({listed(missing)}); open it with use_ema=False"
        )
    return found


def part_of(component: str, file: SafetensorsFile | PickleFile, pieces: Pieces) -> Part:
    """The tensors of a file that `pieces` names. CheckpointError if two of them claim one name."""
    tensors: dict[str, TensorSpec] = {}
    for name, targets in pieces.items():
        spec = file.tensors[name]
        if len(targets) > 1 and spec.shape and spec.shape[0] % len(targets) == 0:
            spec = TensorSpec(spec.dtype, (spec.shape[0] // len(targets), *spec.shape[1:]))
        for target in targets:
            if target in tensors:
                raise CheckpointError(f"{file.label}: tensor {shown(name)} is a duplicate of another ({target})")
            tensors[target] = spec  # an in_proj that cannot be cut in three keeps its shape, and is refused for it
    return Part(f"{file.label} ({component})", tensors, file, pieces)
