"""Finding and opening the files of adapters: LoRA weights, and the embeddings of textual inversion."""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd.checkpoints import pickle_file
from fastsd.checkpoints.embedding_image import read_embedding_image
from fastsd.checkpoints.file_bytes import LEGACY_PICKLE, file_sha256, opened, read_capped
from fastsd.checkpoints.hub import is_repo_id, resolve_file
from fastsd.checkpoints.pickle_file import Classes, PickleFile, open_pickle
from fastsd.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from fastsd.checkpoints.strict_json import parse_object
from fastsd.checkpoints.weights import WeightFile
from fastsd.errors import CheckpointError
from fastsd.wording import listed, shown

LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
EMBEDDING_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""What diffusers calls the files in a folder of its own."""

MAX_LORA_BYTES = 4 * 2**30
MAX_EMBEDDING_BYTES = 16 * 2**20
"""Far above what adapters of Stable Diffusion need: a LoRA of rank 128 on every layer has 0.7 GB, 75 vectors 0.3 MB."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PICKLE_HEADS = (b"PK\x03\x04", LEGACY_PICKLE, b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Embedding(NamedTuple):
    """A textual inversion as it was read."""

    label: str
    """What messages call the file."""
    word: str
    vectors: Tensor
    """[n, C]"""
    sha256: str
    """Of the file, in hex."""


class _ParameterDict:
    """Stands for torch's, in which the web UI's own files hold their vectors; none of its code is run."""

    _parameters: Any = None
    _keys: Any = None


_PARAMETER_DICT: Classes = [(_ParameterDict, "torch.nn.modules.container.ParameterDict")]


def find_lora(path: str | Path, weight_name: str | None = None, **hub: Any) -> Path:
    """A LoRA's file: `path` itself, or `weight_name` in the folder or Hub repository `path`, else the one that diffusers writes
    there, or the only one.

    hub: revision, token, cache_dir, local_files_only, as `resolve_file` takes them.
    Raises CheckpointError (HubError for the Hub) if there is none.
    """
    return _find(path, weight_name, LORA_FILES, hub)


def open_lora(file: Path, allow_pickle: bool = False) -> SafetensorsFile | PickleFile:
    """A LoRA's file; of safetensors only the header is read yet. A pickle (.pt, .bin), told by its content, is opened if
    `allow_pickle`.

    Raises CheckpointError if it is damaged, unsafe, or larger than 4 GiB.
    """
    pickled = _is_pickle(file, MAX_LORA_BYTES, allow_pickle)
    opened_file = (open_pickle if pickled else open_safetensors)(file, _label(file))
    size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in opened_file.tensors.values())
    if size > MAX_LORA_BYTES:  # a pickle's tensors may be views, larger than the memory under them
        raise CheckpointError(f"{_label(file)}: tensors of {size:,} bytes are no adapter of Stable Diffusion")
    return opened_file


def read_hashed(file: SafetensorsFile | PickleFile, path: Path) -> tuple[dict[str, Tensor], str]:
    """A LoRA's tensors, and the hash by which the web UI knows it: SHA-256 of what is behind a safetensors header, or of a whole
    pickle, in hex."""
    return file.read_hashed() if isinstance(file, SafetensorsFile) else (file.read(), file_sha256(path))


def training_config(file: WeightFile) -> dict[str, Any]:
    """The settings of PEFT (`unet.lora_alpha`, …) that diffusers 0.34 and later keep in the header; {} where there are none."""
    if not isinstance(file, SafetensorsFile):
        return {}
    with opened(file.path, file.label) as stream:
        header = stream.read(file.header_bytes)[8:]
    metadata = parse_object(header, f"{file.label}: header").get("__metadata__")
    text = metadata.get("lora_adapter_metadata") if isinstance(metadata, dict) else None
    return parse_object(text.encode(), f"{file.label}: lora_adapter_metadata") if isinstance(text, str) else {}


def read_embedding(
    path: str | Path, weight_name: str | None = None, allow_pickle: bool = False, **hub: Any
) -> Embedding:
    """A textual inversion's file, found as `find_lora` finds one.

    Both kinds are read: A1111's (`emb_params`, or a `string_to_param` with one entry; also within a PNG) and diffusers'
    {word: vectors}. Where it holds no word, the word is the file's name without its suffix.
    Raises CheckpointError as `find_lora` and `open_lora` do, above 16 MB, and for vectors that are no matrix of finite numbers.
    """
    file = _find(path, weight_name, EMBEDDING_FILES, hub)
    label = _label(file)
    state: Any
    if _is_pickle(file, MAX_EMBEDDING_BYTES, allow_pickle):
        state = _load_pickle(file, label)
    elif file.suffix.lower() == ".png":
        state = read_embedding_image(file, label)
    else:
        state = open_safetensors(file, label).read()
    word, vectors = _only_embedding(state, file.stem, label)
    if type(vectors) not in (Tensor, torch.nn.Parameter) or vectors.layout != torch.strided or not vectors.is_cpu:
        raise CheckpointError(f"{label}: the embedding is no dense tensor, but a {shown(type(vectors).__name__)}")
    fits = 0 < vectors.numel() * vectors.itemsize <= MAX_EMBEDDING_BYTES
    if vectors.dtype not in _FLOATS or vectors.ndim not in (1, 2) or not fits:
        kind = f"{list(vectors.shape)} of {vectors.dtype}".replace("torch.", "")
        raise CheckpointError(f"{label}: an embedding is vectors [n, C] of floats, not {kind}")
    if not vectors.isfinite().all():
        raise CheckpointError(f"{label}: holds NaN or infinite values; the file is damaged")
    return Embedding(label, word, vectors.detach().reshape(-1, vectors.shape[-1]), file_sha256(file))


def _load_pickle(path: Path, label: str) -> Any:
    data = read_capped(path, label, MAX_EMBEDDING_BYTES)
    if data.startswith(b"PK"):
        pickle_file.check_zip(data, label)
    elif not data.startswith(LEGACY_PICKLE):
        raise CheckpointError(f"{label}: not a file of torch.save, but another pickle")
    return pickle_file.unpickle(data, label, _PARAMETER_DICT)


def _only_embedding(state: Any, stem: str, label: str) -> tuple[str, Any]:
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{label}: holds no embedding: neither a mapping of a word to vectors nor A1111's")
    if {"clip_l", "clip_g"} & state.keys():
        raise CheckpointError(
            f"{label}: is an embedding for Stable Diffusion XL; fastsd runs Stable Diffusion 1.x and 2.x"
        )
    if "string_to_param" in state:
        word, entries = state.get("name"), _entries(state["string_to_param"])
    else:
        word, entries = None, state
    if not isinstance(entries, dict) or len(entries) != 1:
        held = listed([str(key) for key in entries]) if isinstance(entries, dict) and entries else "none"
        raise CheckpointError(f"{label}: must hold one embedding, but holds {held}")
    key, vectors = next(iter(entries.items()))
    if entries is state and key != "emb_params":
        word = key
    return word if isinstance(word, str) and word else stem, vectors


def _entries(held: Any) -> Any:
    """What a ParameterDict holds: torch before 1.12 kept it as a module's parameters, later as attributes and a list of keys."""
    if not isinstance(held, _ParameterDict):
        return held
    if isinstance(held._parameters, dict) and held._parameters:
        return held._parameters
    return {key: vars(held).get(key) for key in held._keys or () if isinstance(key, str)}


def _find(path: str | Path, weight_name: str | None, usual: Sequence[str], hub: dict[str, Any]) -> Path:
    if weight_name is not None and (not re.fullmatch(r"[^/\\\0]+", weight_name) or weight_name in (".", "..")):
        raise CheckpointError(f"weight_name: {shown(repr(weight_name))} is no plain file name in the folder")
    choose = partial(_choose, shown(str(path), 300), weight_name, usual)
    if os.path.isdir(path):
        return Path(path) / choose([name for name in os.listdir(path) if os.path.isfile(Path(path) / name)])
    if os.path.isfile(path):
        if weight_name is not None:
            raise CheckpointError(f"{shown(str(path), 300)} is a file already; leave weight_name out")
        return Path(path)
    if isinstance(path, Path) or not is_repo_id(path):
        raise CheckpointError(
            f"no such file or folder: {shown(str(path), 300)} (a repository on the hub is named owner/name)"
        )
    return resolve_file(path, choose, **hub)


def _choose(place: str, weight_name: str | None, usual: Sequence[str], names: Sequence[str]) -> str:
    """The wanted one of the files in a folder or a repository."""
    there = listed(names) or "none"
    if weight_name is not None:
        if weight_name not in names:
            raise CheckpointError(f"{place} holds no {shown(weight_name)}; files there: {there}")
        return weight_name
    fitting = [name for name in usual if name in names] or [name for name in names if name.endswith(".safetensors")]
    if not fitting or (len(fitting) > 1 and fitting[0] not in usual):
        raise CheckpointError(f"{place}: say which file with weight_name; files there: {there}")
    return fitting[0]


def _is_pickle(path: Path, limit: int, allow_pickle: bool) -> bool:
    label = _label(path)
    with opened(path, label) as file:
        head = file.read(16)
        size = file.seek(0, 2)
    if size > limit:
        raise CheckpointError(f"{label}: {size:,} bytes; more than {limit:,} are no adapter of Stable Diffusion")
    if not head.startswith(_PICKLE_HEADS):
        return False
    if not allow_pickle:
        raise CheckpointError(
            f"{label} is a pickle, which can carry code: convert it to safetensors, or pass allow_pickle=True if you trust "
            "where it comes from"
        )
    return True


def _label(path: Path) -> str:
    return shown(path.name)
