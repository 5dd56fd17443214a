"""LoRAs and embeddings as the command line names them: by a path, or by a tag in the prompt."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd.errors import ParameterError, PromptError
from fastsd.prompt_tags import LoraTag, tag_name
from fastsd.wording import listed, quoted

if TYPE_CHECKING:
    from fastsd import Pipeline

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
HASHED = (*SUFFIXES, ".png")
"""An embedding may be within a picture."""

Weights = dict[str, float]
"""A LoRA's in each component."""


def weighted(given: str) -> tuple[str, Weights]:
    """PATH[:WEIGHT]; what is no number after the last colon belongs to the path."""
    path, _, number = given.rpartition(":")
    try:
        weight = float(number) if path else 1.0
    except ValueError:
        path, weight = given, 1.0
    return path or given, {"text_encoder": weight, "unet": weight}


def tagged(tags: Sequence[LoraTag], folders: Sequence[Path]) -> list[tuple[str, Weights]]:
    """The files that a prompt's tags name, in these folders and theirs.

    PromptError for a name that none has; ParameterError for a folder that is not there.
    """
    check_folders("--lora-dir", folders)
    if not tags:
        return []
    known = by_name(folders)
    for tag in tags:
        if tag.name not in known:
            where = f"known: {listed(known) or 'none'}" if folders else "say where with --lora-dir"
            raise PromptError(f"prompt: no LoRA is called {quoted(tag.name)}; {where}")
    return [(str(known[tag.name]), weights_of(tag)) for tag in tags]


def weights_of(tag: LoraTag) -> Weights:
    return {"text_encoder": tag.text_encoder, "unet": tag.unet}


def check_folders(option: str, folders: Iterable[Path]) -> None:
    """ParameterError for one that is not there."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise ParameterError(f"{option}: {quoted(str(folder))} is no folder")


def files_under(folders: Iterable[Path], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files with such suffixes, of either case, folder by folder; no links that lead nowhere, no pipes."""
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes and os.path.isfile(path)
    ]


def by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """The weight files under the folders by what tags call them; of several alike the first."""
    found: dict[str, Path] = {}
    for path in files_under(folders):
        found.setdefault(tag_name(path.stem, path.absolute().parent.name), path)
    return found


def load_adapters(
    pipe: "Pipeline",
    loras: Sequence[tuple[str, Weights]],
    embeddings: Mapping[Path, str | None],
    allow_pickle: bool,
) -> None:
    """embeddings: each file with its word, or None for its own."""
    for path, word in embeddings.items():
        pipe.load_textual_inversion(path, token=word, allow_pickle=allow_pickle)
    if loras:
        names = [pipe.load_lora_weights(path, allow_pickle=allow_pickle) for path, _ in loras]
        pipe.set_adapters(names, [weights for _, weights in loras])
