"""Opening a model in the diffusers layout: a folder of folders, one for each component, and JSON that describes them.

model_index.json   unet/  vae/  text_encoder/  (config.json, weights)   scheduler/  (scheduler_config.json)   tokenizer/
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastsd.checkpoints.architecture import INPUT_CHANNELS, RUN_INPUT_CHANNELS
from fastsd.checkpoints.autoencoder import CLASSES, AutoencoderFiles
from fastsd.checkpoints.strict_json import read_json
from fastsd.checkpoints.weight_files import COMPONENTS, choose_local, open_weights
from fastsd.checkpoints.weights import WeightFile, fill_module
from fastsd.errors import CheckpointError, ParameterError
from fastsd.wording import listed, quoted, shown

logger = logging.getLogger("fastsd")

CONFIG_FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""The sets of files of which one must be in tokenizer/."""

_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
)

# First match wins.
_FAMILIES = (
    ("StableDiffusionXL", "Stable Diffusion XL"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("Flux", "FLUX"),
    ("StableDiffusionControlNet", "a ControlNet pipeline"),
    ("LatentConsistency", "a latent consistency model"),
    ("PixArt", "PixArt"),
    ("Kandinsky", "Kandinsky"),
)

_CLASSES = {"unet": ("UNet2DConditionModel",), "vae": CLASSES}

_SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder whose layout and JSON were checked; no weights are read yet."""

    path: Path
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    tokenizer: Path
    variant: str | None
    allow_pickle: bool
    vae_files: list[WeightFile] | None = field(default=None, repr=False)
    """Those of an autoencoder that was taken instead of the folder's."""

    def load_weights(self, component: str, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Fill `module`, built on the meta device, with 'unet', 'vae' or 'text_encoder'.

        The module's names must be diffusers' (CLIP's without `text_model.`). Every tensor becomes `dtype` on `device`,
        4-D weights channels-last, requires_grad False; the file is read, not mapped, so later changes of it do not
        reach the module. Peak memory is about twice the component's largest file.

        Raises CheckpointError, before anything large is read, if the files are missing, damaged or unsafe or their
        names or shapes differ from the module's; and after reading if a value is not finite in the file or in
        `dtype`. The module is then as it was. Raises ParameterError for an unknown component.
        """
        if component not in COMPONENTS:
            raise ParameterError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}")
        fill_module(component, self.weight_files(component), module, dtype, device)

    def weight_files(self, component: str) -> list[WeightFile]:
        """The files of one component, their headers read and checked."""
        if component == "vae" and self.vae_files is not None:
            return self.vae_files
        return open_weights(self.path / component, component, self.variant, self.allow_pickle)


def open_folder(
    path: Path, *, variant: str | None = None, allow_pickle: bool = False, vae: AutoencoderFiles | None = None
) -> ModelFolder:
    """Check the layout and JSON of the diffusers folder `path`, and that weights are there; read none.

    `variant` picks `*.{variant}.safetensors`, e.g. "fp16", and where only some components have it the plain file of the
    others, which is logged (logger "fastsd"); None takes the plain file, else the only variant there is.
    `allow_pickle` also accepts `.bin` files where there are no safetensors. Code in the folder is never run.
    `vae`: an autoencoder to take instead of the folder's.

    Raises CheckpointError if the folder is missing, incomplete, or holds another architecture.
    """
    path = Path(path)
    configs = read_layout(path)
    for component, choice in choose_local(path, variant, allow_pickle).items():
        if variant is not None and choice.variant != variant:
            logger.warning("%s/ holds no variant %s; %s is read", component, quoted(variant), choice.name)
    files = None
    if vae is not None:
        configs["vae"] = vae.config_in(configs["vae"], configs["unet"], _show(path))
        files = vae.files
    return ModelFolder(
        path=path, tokenizer=path / "tokenizer", variant=variant, allow_pickle=allow_pickle, vae_files=files, **configs
    )


def read_layout(path: Path) -> dict[str, dict[str, Any]]:
    """The JSON configs by component, everything but the weights checked. Raises CheckpointError."""
    _check_is_pipeline(path)
    configs = {}
    for component, file in CONFIG_FILES.items():
        if not os.path.isdir(path / component):
            raise CheckpointError(f"{_show(path)}: the folder {component}/ is missing; the model is incomplete")
        configs[component] = read_json(path / file, file)
    _check_classes(configs)
    tokenizer = path / "tokenizer"
    if not any(all(os.path.isfile(tokenizer / name) for name in names) for names in TOKENIZER_FILES):
        raise CheckpointError(
            f"{_show(path)}: tokenizer/ is missing, or holds no tokenizer.json or vocab.json + merges.txt"
        )
    return configs


def _check_is_pipeline(path: Path) -> None:
    if os.path.isfile(path):
        raise CheckpointError(
            f"{_show(path)} is a single file, not a diffusers folder; open it with Pipeline.from_single_file"
        )
    if not os.path.isdir(path):
        raise CheckpointError(f"no such folder: {_show(path)}")
    if not os.path.isfile(path / "model_index.json"):
        raise CheckpointError(f"{_show(path)} {_without_index(path)}")
    name = read_json(path / "model_index.json", "model_index.json").get("_class_name")
    if name not in _PIPELINES:
        text = shown(str(name))
        family = next((family for start, family in _FAMILIES if text.startswith(start)), None)
        of = f" ({family})" if family else ""
        raise CheckpointError(
            f"model_index.json names the pipeline {text}{of}; fastsd runs Stable Diffusion 1.x and 2.x"
        )
    if os.path.isdir(path / "transformer") and not os.path.isdir(path / "unet"):
        raise CheckpointError(
            f"{_show(path)} has a transformer/ in place of unet/; fastsd runs Stable Diffusion 1.x and 2.x"
        )


def _without_index(path: Path) -> str:
    """What a folder without model_index.json seems to be, to follow its name in a message."""
    if os.path.isdir(path / "transformer"):
        return "has a transformer/ in place of unet/ (Stable Diffusion 3, FLUX, ...); fastsd runs Stable Diffusion 1.x and 2.x"
    if os.path.isfile(path / "config.json"):
        kind = shown(str(read_json(path / "config.json", "config.json").get("_class_name", "single component")))
        return f"holds a {kind}, not a whole pipeline: model_index.json is missing"
    try:
        names = os.listdir(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if "pytorch_lora_weights.safetensors" in names:
        return "holds a LoRA, not a model: model_index.json is missing"
    single = [name for name in names if name.endswith(_SINGLE_FILE_SUFFIXES)]
    if single:
        return f"holds single-file checkpoints ({listed(single)}); give the path of one of them"
    return "is no diffusers folder: model_index.json is missing"


def _check_classes(configs: dict[str, dict[str, Any]]) -> None:
    """Refuse configs of other classes. Files that say nothing of their class are left to the comparison of names."""
    for component, expected in _CLASSES.items():
        name = configs[component].get("_class_name", expected[0])
        if name not in expected:
            wanted = " or ".join(expected)
            raise CheckpointError(f"{CONFIG_FILES[component]} describes a {shown(str(name))}, not a {wanted}")
    names = configs["text_encoder"].get("architectures") or ["CLIPTextModel"]
    if not isinstance(names, list) or "CLIPTextModel" not in names:
        raise CheckpointError(f"text_encoder/config.json describes {shown(str(names))}, not a CLIPTextModel")
    channels = configs["unet"].get("in_channels")
    if isinstance(channels, int) and channels in INPUT_CHANNELS and channels not in RUN_INPUT_CHANNELS:
        raise CheckpointError(f"unet/config.json describes {INPUT_CHANNELS[channels]}; fastsd runs UNets of 4 and 9")


def _show(path: Path) -> str:
    return shown(str(path), 300)
