"""Writing a model as a diffusers folder; whatever is written appears whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastsd.checkpoints.file_parts import CONFIGS, TOKENIZER_FILES
from fastsd.checkpoints.folder import CONFIG_FILES
from fastsd.errors import CheckpointError
from fastsd.wording import shown

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def write_folder(
    path: Path,
    configs: Mapping[str, dict[str, Any]],
    states: Iterable[tuple[str, Mapping[str, Tensor]]],
    tokenizer: Path,
) -> None:
    """configs: "unet", "vae", "text_encoder" and "scheduler"; states: of the three nets, under fastsd's names."""
    for component, weights in states:
        (path / component).mkdir(parents=True)
        prefix = "text_model." if component == "text_encoder" else ""  # readable by any transformers
        state = {prefix + name: own(tensor) for name, tensor in weights.items()}
        save_tensors(state, path / component / WEIGHTS[component], {"format": "pt"})
    (path / "scheduler").mkdir()
    for name in CONFIGS:
        write_json(path / CONFIG_FILES[name], configs[name])
    (path / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, path / "tokenizer" / name)
    write_json(path / "model_index.json", _model_index(configs))


def _model_index(configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    inpainting = configs["unet"].get("in_channels") == 9
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", configs["scheduler"].get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", configs["vae"].get("_class_name", "AutoencoderKL")],
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that those may read who may read the user's other files: the library makes it the user's alone."""
    path.touch()
    permissions = path.stat().st_mode & 0o777
    safetensors.torch.save_file(state, path, metadata)
    path.chmod(permissions)


def own(tensor: Tensor) -> Tensor:
    """Contiguous, and not a view of anything larger: what safetensors writes."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to, given that name at the end; nothing is left behind by an error."""
    temporary = target.parent / f".fastsd-{secrets.token_hex(8)}.tmp"
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")]:
            if path.is_file():
                _sync(path)
        if target.is_dir():  # one folder cannot be renamed over another
            target.rename(old)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{shown(str(target), 300)}: cannot be written: {shown(reason)}") from error
    finally:  # a Ctrl-C passes here as well
        if old.exists() and not target.exists():
            old.rename(target)
        for path in (temporary, old):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """A network disk may say only here that it is full."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
