"""Opening an autoencoder by itself: a diffusers folder, or a single file of diffusers' names or latent diffusion's.

A file's config is read from its names and shapes, as a whole checkpoint's is. Its names may also stand within those of a whole
checkpoint, behind `first_stage_model.`; what else such a file holds is not looked at.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastsd.checkpoints import ldm_config, ldm_keys
from fastsd.checkpoints.architecture import recognise
from fastsd.checkpoints.file_parts import Part, Pieces, averaged, open_file, part_of, stored_configs
from fastsd.checkpoints.keys import module_name
from fastsd.checkpoints.ldm_config import SCALING_FACTORS, Json, Shapes
from fastsd.checkpoints.pickle_file import PickleFile
from fastsd.checkpoints.safetensors_file import SafetensorsFile
from fastsd.checkpoints.strict_json import read_json
from fastsd.checkpoints.weight_files import open_weights
from fastsd.checkpoints.weights import WeightFile, fill_module
from fastsd.config import MAX_DEPTH, MAX_LEVELS, VAEConfig, autoencoder_config
from fastsd.errors import CheckpointError, ParameterError
from fastsd.wording import listed, shown

logger = logging.getLogger("fastsd")

CLASSES = ("AutoencoderKL", "VQModel")
SUBFOLDERS = ("", "vae", "vqvae")
"""Where in a diffusers folder, or a repository, an autoencoder lies: by itself, in a pipeline, in one of latent diffusion's."""

_SCALE = ("scaling_factor", "shift_factor")


@dataclass(frozen=True)
class AutoencoderFiles:
    """An autoencoder whose headers were checked; no weights are read yet (but a pickle's)."""

    label: str
    vae: Json
    files: list[WeightFile] = field(repr=False)
    scaled: bool
    """Whether it says itself how its latents are scaled."""

    def load_weights(self, component: str, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Fill `module`, built on the meta device; component is "vae". See `ModelFolder.load_weights`."""
        fill_module(component, self.files, module, dtype, device)

    def config_in(self, vae: Json, unet: Json, model: str) -> Json:
        """The config to take in the place of the model's `vae`: unless it says how its latents are scaled, they are as the UNet
        has learnt them. CheckpointError if they have not as many channels as the UNet's.
        """
        found, wanted = autoencoder_config(self.vae).latent_channels, unet.get("out_channels", 4)
        if found != wanted:
            raise CheckpointError(
                f"{self.label}: latents of {found} channels, but the UNet of {model} makes {shown(str(wanted))}; "
                "take an autoencoder that the model was made for"
            )
        if self.scaled:
            return self.vae
        own = {key: value for key, value in self.vae.items() if key not in _SCALE}
        return own | {key: vae[key] for key in _SCALE if key in vae}


def open_autoencoder(
    path: Path, *, variant: str | None = None, allow_pickle: bool = False, use_ema: bool | None = False
) -> AutoencoderFiles:
    """Check the config and the headers of the autoencoder `path`: a folder (or its vae/ or vqvae/) or a file.

    variant: of a folder, see `open_folder`. allow_pickle: also read `.bin`, `.ckpt` and `.pt` (never code). use_ema: of a file
    of latent diffusion's names take the moving average; None: if it holds one, and else say so (logger "fastsd").

    Raises CheckpointError if it is missing, damaged, unsafe or no autoencoder, ParameterError for the options.
    """
    if os.path.isfile(path):
        if variant is not None:
            raise ParameterError("variant: is for folders; a single file has none")
        return _open_file(path, allow_pickle, use_ema)
    if use_ema:
        raise ParameterError("use_ema: is for single files; of a folder take the variant, if it has one")
    folder = find_autoencoder(path)
    config = read_config(folder)
    return AutoencoderFiles(
        shown(folder.name), config, open_weights(folder, "vae", variant, allow_pickle), "scaling_factor" in config
    )


def find_autoencoder(path: Path) -> Path:
    """The folder itself, or its subfolder, that holds an autoencoder's config.json. CheckpointError if there is none."""
    for name in SUBFOLDERS:
        if os.path.isfile(path / name / "config.json"):
            return path / name
    raise CheckpointError(
        f"{shown(path.name)} holds no autoencoder: there is no config.json, nor in vae/ or vqvae/; of a single file give its path"
    )


def read_config(folder: Path) -> Json:
    """The config.json of an autoencoder's folder. CheckpointError if it is of another class, or cannot be run."""
    label = f"{shown(folder.name)}/config.json"
    config = read_json(folder / "config.json", label)
    name = config.get("_class_name", CLASSES[0])
    if name not in CLASSES:
        raise CheckpointError(f"{label} describes a {shown(str(name))}, not a {' or '.join(CLASSES)}")
    autoencoder_config(config)
    return config


def _open_file(path: Path, allow_pickle: bool, use_ema: bool | None) -> AutoencoderFiles:
    file = open_file(path, allow_pickle)
    start = ldm_keys.VAE if any(name.startswith(ldm_keys.VAE) for name in file.tensors) else ""
    shapes = {name: spec.shape for name, spec in file.tensors.items() if name.startswith(start)}
    diffusers = any(name.startswith("encoder.down_blocks.") for name in shapes)
    if not diffusers and not any(name.startswith(f"{start}encoder.down.") for name in shapes):
        kind = recognise("vae", file.tensors) or "no autoencoder: none of its tensors is called as they are"
        raise CheckpointError(f"{file.label}: this is {kind}")
    stored = stored_configs(file)[0].get("vae")
    inferred = ldm_config.autoencoder(Shapes(_ldm_names(shapes) if diffusers else shapes, file.label), start)
    json = stored or inferred | {"scaling_factor": SCALING_FACTORS[inferred["_class_name"]]}
    try:
        config = autoencoder_config(json)
    except CheckpointError as error:
        raise CheckpointError(f"{file.label}: {error}") from error
    scaled = stored is not None and "scaling_factor" in stored
    if not diffusers:
        return AutoencoderFiles(file.label, json, [_part(file, config, start, use_ema)], scaled)
    if use_ema:
        raise CheckpointError(f"{file.label}: use_ema: a file of diffusers' names holds no average; leave it out")
    return AutoencoderFiles(file.label, json, [file], scaled)


def _ldm_names(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by diffusers' names, also its older ones, → the same by latent diffusion's."""
    count = Shapes(shapes, "").count
    levels = min(count("encoder.down_blocks.{}"), MAX_LEVELS)
    layers = min(count("encoder.down_blocks.0.resnets.{}"), MAX_DEPTH)
    table = ldm_keys.vae_table(VAEConfig(block_out_channels=(32,) * levels, layers_per_block=layers), "")
    back = ldm_keys.inverse(table)
    names = {name: ldm_keys.renamed(module_name("vae", name) or name, back) for name in shapes}
    return {ldm: shapes[name] for name, ldm in names.items() if ldm is not None}


def _part(file: SafetensorsFile | PickleFile, config: VAEConfig, start: str, use_ema: bool | None) -> Part:
    """The tensors of latent diffusion's names. CheckpointError for names that are neither known nor of no use."""
    table, pieces, unknown = ldm_keys.vae_table(config, start), Pieces(), set()
    for name in file.tensors:
        target = ldm_keys.renamed(name, table)
        if target is not None:
            pieces[name] = (target,)
        elif name.startswith(start) and not ldm_keys.ignored(name):
            unknown.add(name)
    if unknown:
        raise CheckpointError(f"{file.label}: {len(unknown)} tensors that no autoencoder has ({listed(unknown)})")

    def ema_name(name: str) -> str:
        return start + ldm_keys.ema_name(name.removeprefix(start), "")

    if use_ema is None and not any(ema_name(name) in file.tensors for name in pieces):
        logger.warning("%s holds no moving average of the autoencoder; its own weights are read", file.label)
    elif use_ema is not False:
        pieces = averaged(file, pieces, ema_name)
    return part_of("vae", file, pieces)
