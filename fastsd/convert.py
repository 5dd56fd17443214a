"""A model from a diffusers folder to a single file (LDM keys), or back: other names, the same tensors in the same dtypes.

A file carries the folder's configs and tokenizer in its metadata, so that nothing is lost on the way to a file. What a file holds
beyond a model (moving averages, the buffers of training, OpenCLIP's last layer) does not go into a folder.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.checkpoints import ldm_keys
from fastsd.checkpoints.file_bytes import read_capped
from fastsd.checkpoints.file_parts import CONFIG_KEY, CONFIGS, TOKENIZER_FILES, VOCABULARY_FILES
from fastsd.checkpoints.folder import ModelFolder
from fastsd.checkpoints.folder_writer import own, save_tensors, write_folder, written
from fastsd.checkpoints.opening import open_model
from fastsd.checkpoints.single_file import CLIP_VOCABULARY, SingleFile
from fastsd.checkpoints.strict_json import read_json
from fastsd.checkpoints.weights import read_state
from fastsd.config import ModelConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vq import autoencoder
from fastsd.wording import quoted

SUFFIX = ".safetensors"
_MAX_TOKENIZER_BYTES = 4 * 2**20  # a header of 16 MB must hold it, and each quote doubly escaped


def convert(source: str | Path, target: str | Path, *, force: bool = False, **options: Any) -> Path:
    """Write the model `source` to `target` in the other layout; `target` appears whole or not at all.

    A folder (or hub id) becomes a single `.safetensors` file, a single file a diffusers folder. force: replace a file, or a
    diffusers folder, that is there. options: as `open_model` takes them. Peak memory: the model, in the file's dtype, and
    once more its largest file.

    Raises ParameterError for the arguments, CheckpointError if the source is not SD 1.x or 2.x or the target not writable.
    """
    target = Path(target)
    model = open_model(source, **options)
    if target.exists() and (
        model.path.resolve() == target.resolve() or target.resolve() in model.path.resolve().parents
    ):
        raise ParameterError(f"target: {quoted(str(target))} is, or holds, the source; choose another one")
    _check_target(target, isinstance(model, ModelFolder), force)
    config = ModelConfig.from_json(model.text_encoder, model.unet, model.vae)
    with torch.device("meta"):
        nets: dict[str, nn.Module] = {
            "unet": UNet(config.unet),
            "vae": autoencoder(config.vae),
            "text_encoder": CLIPText(config.text_encoder),
        }
    with written(target) as temporary:
        if isinstance(model, ModelFolder):
            _write_file(model, config, nets, temporary)
        else:
            _write_folder(model, nets, temporary)
    return target


def _check_target(target: Path, to_file: bool, force: bool) -> None:
    name = quoted(str(target))
    if to_file != (target.suffix.lower() == SUFFIX):
        wanted = (
            f"a folder becomes a single file: the name must end in {SUFFIX}"
            if to_file
            else (f"a single file becomes a folder: the name must not end in {SUFFIX}")
        )
        raise ParameterError(f"target: {name}: {wanted}")
    if not target.parent.is_dir():
        raise ParameterError(f"target: {name}: the folder {quoted(str(target.parent))} does not exist; make it first")
    if os.path.lexists(target):
        if not force:
            raise ParameterError(f"target: {name} exists; pass force=True (--force) to replace it")
        ours = target.is_file() if to_file else (target / "model_index.json").is_file() and not target.is_symlink()
        if not ours:
            kind = "file" if to_file else "diffusers folder"
            raise ParameterError(f"target: {name} is no {kind}, and is not replaced; choose another name")


def _state(model: ModelFolder | SingleFile, component: str, net: nn.Module) -> dict[str, Tensor]:
    """The component's tensors under the net's names, each in memory of its own."""
    tensors = read_state(component, model.weight_files(component), net)
    return {name: own(tensor) for name, tensor, _ in tensors}


def _write_file(model: ModelFolder, config: ModelConfig, nets: dict[str, nn.Module], path: Path) -> None:
    open_clip = config.text_encoder.hidden_act == "gelu"
    state: dict[str, Tensor] = {}
    for component, table in ldm_keys.tables(config, open_clip).items():
        back = ldm_keys.inverse(table)
        for name, tensor in _state(model, component, nets[component]).items():
            ldm_name = ldm_keys.renamed(name, back)
            if ldm_name is None:
                raise CheckpointError(
                    f"{component}: {name} has no name in LDM keys; this architecture cannot be converted"
                )
            # LDM's autoencoder computes its attention with 1×1 convolutions
            convolution = component == "vae" and ".attn" in ldm_name and tensor.ndim == 2
            state[ldm_name] = tensor[:, :, None, None] if convolution else tensor
    configs: dict[str, Any] = {name: getattr(model, name) for name in CONFIGS}
    stored = configs | {"tokenizer": _tokenizer_files(model.tokenizer)}
    # one key alone: safetensors writes several in any order, and the same model should give the same file
    save_tensors(ldm_keys.pack(state), path, {CONFIG_KEY: json.dumps(stored, ensure_ascii=False)})


def _tokenizer_files(folder: Path) -> dict[str, str]:
    """The text of the tokenizer's files, without a vocabulary that is CLIP's own."""
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    try:
        files = {name: read_capped(folder / name, f"tokenizer/{name}", _MAX_TOKENIZER_BYTES).decode() for name in there}
    except UnicodeDecodeError as error:
        raise CheckpointError(f"tokenizer/: a file is not UTF-8 ({error.reason})") from error
    if VOCABULARY_FILES[0] in files and "tokenizer.json" not in files:
        same = all(_same(name, folder) for name in VOCABULARY_FILES)
        return {name: text for name, text in files.items() if not (same and name in VOCABULARY_FILES)}
    return files


def _same(name: str, folder: Path) -> bool:
    """Whether the folder's file says what CLIP's does."""
    ours, theirs = CLIP_VOCABULARY / name, folder / name
    if name.endswith(".json"):
        return read_json(ours, name) == read_json(theirs, name)
    return ours.read_bytes().split() == theirs.read_bytes().split()


def _write_folder(model: SingleFile, nets: dict[str, nn.Module], path: Path) -> None:
    states = ((component, _state(model, component, net)) for component, net in nets.items())  # one in memory at a time
    configs: dict[str, dict[str, Any]] = {name: getattr(model, name) for name in CONFIGS}
    write_folder(path, configs, states, model.tokenizer)
