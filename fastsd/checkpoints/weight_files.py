"""Which files hold a component's weights: plain or variant, whole or sharded, safetensors or pickle.

`choose_all` works on names alone, so that it serves a folder on disk and a listing of the hub alike.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd.checkpoints.pickle_file import open_pickle
from fastsd.checkpoints.safetensors_file import MAX_TENSORS, SafetensorsFile, open_safetensors
from fastsd.checkpoints.strict_json import read_json
from fastsd.checkpoints.weights import WeightFile
from fastsd.errors import CheckpointError
from fastsd.wording import listed, quoted, shown

COMPONENTS = ("unet", "vae", "text_encoder")

Format = Literal["safetensors", "index", "pickle"]
_FORMATS: tuple[Format, ...] = ("safetensors", "index", "pickle")  # the best first

# What diffusers and transformers call the files of their models.
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_PICKLE_STEMS = _STEMS | {"text_encoder": "pytorch_model"}

_VARIANT = r"[A-Za-z0-9_-]+?"
_SHARD = r"-\d{5}-of-\d{5}"


@dataclass(frozen=True)
class Choice:
    """The file a component is read from; for a sharded one, its index."""

    name: str
    format: Format
    variant: str | None


def choose_all(listing: Mapping[str, Iterable[str]], variant: str | None, allow_pickle: bool) -> dict[str, Choice]:
    """The file to read of each component, by `choose`; `listing` has the names in each one's folder.

    As in diffusers, a component without the `variant` is read from its plain file, if another component has it.
    Raises CheckpointError if a component has nothing that fits, or none has the variant.
    """
    names = {component: list(listing.get(component, ())) for component in COMPONENTS}
    choices = {component: choose(component, names[component], variant, allow_pickle) for component in COMPONENTS}
    if variant is not None and all(choice.variant != variant for choice in choices.values()):
        there = {
            choice.variant or "plain" for component in COMPONENTS for choice in _known(component, names[component])
        }
        raise CheckpointError(f"no component holds the variant {quoted(variant)}; variants there: {listed(there)}")
    return choices


def choose(component: str, names: Iterable[str], variant: str | None, allow_pickle: bool) -> Choice:
    """The file among `names` (those in the component's folder) to read.

    A given `variant`, else the plain file; without one the plain file, else the only variant there is. One file is
    preferred to shards, and safetensors to a pickle, which is only taken if `allow_pickle`.
    Raises CheckpointError if nothing fits, naming what there is.
    """
    names = sorted(names)
    candidates = _known(component, names)
    if variant is not None:
        fitting = [choice for choice in candidates if choice.variant in (variant, None)]
    else:
        safe = [choice for choice in candidates if choice.format != "pickle"]
        fitting = _plain_or_only(component, safe) or _plain_or_only(component, candidates)

    def rank(choice: Choice) -> tuple[bool, bool, int]:
        refused = choice.format == "pickle" and not allow_pickle
        return refused, choice.variant != variant, _FORMATS.index(choice.format)

    chosen = min(fitting, key=rank, default=None)
    if chosen is None:
        found = {choice.variant or "plain" for choice in candidates}
        missing = f"neither the variant {quoted(variant)} nor plain weights" if variant else "no usable weights"
        there = f"variants there: {listed(found)}" if found else f"files there: {listed(names) or 'none'}"
        raise CheckpointError(f"{component}/ holds {missing}: expected {_STEMS[component]}.safetensors; {there}")
    if chosen.format == "pickle" and not allow_pickle:
        raise CheckpointError(
            f"{component}/{shown(chosen.name)} is a pickle, which can carry code: convert it to safetensors, or pass "
            "allow_pickle=True if you trust where it comes from"
        )
    return chosen


def _known(component: str, names: Iterable[str]) -> list[Choice]:
    return [choice for name in names if (choice := _classify(component, name)) is not None]


def _classify(component: str, name: str) -> Choice | None:
    stem, pickle_stem = re.escape(_STEMS[component]), re.escape(_PICKLE_STEMS[component])
    patterns: tuple[tuple[Format, str], ...] = (
        ("safetensors", rf"{stem}(?:\.({_VARIANT}))?\.safetensors"),
        ("index", rf"{stem}\.safetensors\.index(?:\.({_VARIANT}))?\.json"),
        ("index", rf"{stem}\.({_VARIANT})\.safetensors\.index\.json"),
        ("pickle", rf"{pickle_stem}(?:\.({_VARIANT}))?\.bin"),
    )
    for kind, pattern in patterns:
        match = re.fullmatch(pattern, name)
        if match and not re.search(_SHARD, name):
            return Choice(name, kind, match[1])
    return None


def _plain_or_only(component: str, candidates: list[Choice]) -> list[Choice]:
    """The plain ones; where there are none, those of the only variant."""
    variants = {choice.variant for choice in candidates}
    if len(variants) > 1 and None not in variants:
        names = listed({name for name in variants if name})
        raise CheckpointError(f"{component}/ holds several variants and no plain file: pass variant= one of {names}")
    return [choice for choice in candidates if choice.variant is None or None not in variants]


def remote_files(choice: Choice, component: str, names: Iterable[str]) -> list[str]:
    """The names to download for the chosen file, given all `names` in the component's folder on the hub."""
    if choice.format != "index":
        return [choice.name]
    stem, tail = re.escape(_STEMS[component]), re.escape(f".{choice.variant}") if choice.variant else ""
    shard = re.compile(rf"{stem}(?:{tail}{_SHARD}|{_SHARD}{tail})\.safetensors")  # both orders are in use
    return [choice.name, *sorted(name for name in names if shard.fullmatch(name))]


def choose_local(folder: Path, variant: str | None, allow_pickle: bool) -> dict[str, Choice]:
    """`choose_all` among the files on disk; also checks that an index's shards are there."""
    choices = choose_all({name: _names(folder / name) for name in COMPONENTS}, variant, allow_pickle)
    for component, choice in choices.items():
        if choice.format == "index":
            _read_index(folder / component, choice.name)
    return choices


def open_weights(folder: Path, component: str, variant: str | None, allow_pickle: bool) -> list[WeightFile]:
    """The chosen files among those in the component's own `folder`, their headers read and checked."""
    choice = choose(component, _names(folder), variant, allow_pickle)
    path, label = folder / choice.name, f"{shown(folder.name)}/{choice.name}"
    if choice.format == "pickle":
        return [open_pickle(path, label)]
    if choice.format == "safetensors":
        return [open_safetensors(path, label)]
    return list(_open_shards(folder, choice.name))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{shown(folder.name)}/: cannot be read: {error.strerror or error}") from error


def _open_shards(folder: Path, index_name: str) -> list[SafetensorsFile]:
    shards = []
    for shard, names in _read_index(folder, index_name).items():
        file = open_safetensors(folder / shard, f"{shown(folder.name)}/{shard}")
        if file.tensors.keys() != names:
            odd = file.tensors.keys() ^ names
            raise CheckpointError(
                f"{shown(folder.name)}/{shown(index_name)} and {shard} disagree on {len(odd)} tensors ({listed(odd)})"
            )
        shards.append(file)
    return shards


def _read_index(folder: Path, index_name: str) -> dict[str, set[str]]:
    """Tensor names by shard. Raises CheckpointError if a shard lies outside `folder` or is missing."""
    label = f"{shown(folder.name)}/{index_name}"
    weight_map = read_json(folder / index_name, label).get("weight_map")
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= MAX_TENSORS:
        raise CheckpointError(f"{label}: no weight_map of 1 to {MAX_TENSORS:,} tensors")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard, re.ASCII):
            raise CheckpointError(
                f"{label}: shard {shown(repr(shard))} is no plain file name; a path that leaves the folder is refused"
            )
        shards.setdefault(shard, set()).add(name)
    missing = {shard for shard in shards if not os.path.isfile(folder / shard)}
    if missing:
        raise CheckpointError(f"{label}: {len(missing)} of {len(shards)} shards missing ({listed(missing)})")
    return shards
