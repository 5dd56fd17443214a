"""Which files hold a component's weights: plain or variant, whole or sharded, safetensors or pickle.

`choose` works on names alone, so that it serves a folder on disk and a listing of the hub alike.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd.checkpoints.pickle_file import open_pickle
from fastsd.checkpoints.safetensors_file import MAX_TENSORS, SafetensorsFile, open_safetensors
from fastsd.checkpoints.strict_json import read_json
from fastsd.checkpoints.weights import WeightFile
from fastsd.checkpoints.wording import listed, shown
from fastsd.errors import CheckpointError

COMPONENTS = ("unet", "vae", "text_encoder")

Format = Literal["safetensors", "index", "pickle"]

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


def choose(component: str, names: Iterable[str], variant: str | None, allow_pickle: bool) -> Choice:
    """The file among `names` (those in the component's folder) to read.

    A given `variant` is taken and nothing else; without one the plain file, else the only variant there is. One file
    is preferred to shards, and safetensors to a pickle, which is only taken if `allow_pickle`.
    Raises CheckpointError if nothing fits, naming what there is.
    """
    names = sorted(names)
    candidates = [choice for name in names if (choice := _classify(component, name)) is not None]
    safe = [choice for choice in candidates if choice.format != "pickle"]
    pickles = [choice for choice in candidates if choice.format == "pickle"]
    chosen = _pick(component, safe, variant) or _pick(component, pickles, variant)
    if chosen is None:
        found = {choice.variant or "plain" for choice in candidates}
        wanted = f"variant {shown(variant)!r}" if variant else "usable weights"
        there = f"variants there: {listed(found)}" if found else f"files there: {listed(names) or 'none'}"
        raise CheckpointError(f"{component}/ holds no {wanted}: expected {_STEMS[component]}.safetensors; {there}")
    if chosen.format == "pickle" and not allow_pickle:
        raise CheckpointError(
            f"{component}/{shown(chosen.name)} is a pickle, which can carry code: convert it to safetensors, or pass "
            "allow_pickle=True if you trust where it comes from"
        )
    return chosen


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


def _pick(component: str, candidates: list[Choice], variant: str | None) -> Choice | None:
    variants = {choice.variant for choice in candidates}
    if variant is None and variants and None not in variants:
        if len(variants) > 1:
            names = listed({name for name in variants if name})
            raise CheckpointError(
                f"{component}/ holds several variants and no plain file: pass variant= one of {names}"
            )
        (variant,) = variants
    order: tuple[Format, ...] = ("safetensors", "index", "pickle")
    fitting = [choice for choice in candidates if choice.variant == variant]
    return min(fitting, key=lambda choice: order.index(choice.format), default=None)


def remote_files(component: str, names: Iterable[str], variant: str | None) -> list[str]:
    """The names to download for a component, given all `names` in its folder on the hub: safetensors only."""
    names = list(names)
    choice = choose(component, names, variant, allow_pickle=False)
    if choice.format != "index":
        return [choice.name]
    stem, tail = re.escape(_STEMS[component]), re.escape(f".{choice.variant}") if choice.variant else ""
    shard = re.compile(rf"{stem}(?:{tail}{_SHARD}|{_SHARD}{tail})\.safetensors")  # both orders are in use
    return [choice.name, *sorted(name for name in names if shard.fullmatch(name))]


def choose_local(folder: Path, component: str, variant: str | None, allow_pickle: bool) -> Choice:
    """`choose` among the files of a component's folder on disk; also checks that an index's shards are there."""
    try:
        names = os.listdir(folder / component)
    except OSError as error:
        raise CheckpointError(f"{component}/: cannot be read: {error.strerror or error}") from error
    choice = choose(component, names, variant, allow_pickle)
    if choice.format == "index":
        _read_index(folder / component, component, choice.name)
    return choice


def open_weights(folder: Path, component: str, variant: str | None, allow_pickle: bool) -> list[WeightFile]:
    """The chosen files, their headers read and checked."""
    choice = choose_local(folder, component, variant, allow_pickle)
    path, label = folder / component / choice.name, f"{component}/{choice.name}"
    if choice.format == "pickle":
        return [open_pickle(path, label)]
    if choice.format == "safetensors":
        return [open_safetensors(path, label)]
    return list(_open_shards(folder / component, component, choice.name))


def _open_shards(folder: Path, component: str, index_name: str) -> list[SafetensorsFile]:
    shards = []
    for shard, names in _read_index(folder, component, index_name).items():
        file = open_safetensors(folder / shard, f"{component}/{shard}")
        if file.tensors.keys() != names:
            odd = file.tensors.keys() ^ names
            raise CheckpointError(
                f"{component}/{shown(index_name)} and {shard} disagree on {len(odd)} tensors ({listed(odd)})"
            )
        shards.append(file)
    return shards


def _read_index(folder: Path, component: str, index_name: str) -> dict[str, set[str]]:
    """Tensor names by shard. Raises CheckpointError if a shard lies outside `folder` or is missing."""
    label = f"{component}/{index_name}"
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
