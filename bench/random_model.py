"""A model of a preset's size with random weights, as a diffusers folder: fastsd and diffusers load the same file.

Speed does not depend on the weights. The tokenizer is the bundled model's, whose ids any vocabulary of that size or more has.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsd.config import SD15, SD21, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.pipeline import BUNDLED

PRESETS = {"sd15": SD15, "sd21": SD21}


def draw_weight(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random weight that keeps activations near unit size."""
    bound = 0.1 if len(shape) == 1 else (3.0 / shape[1:].numel()) ** 0.5
    weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return (weight + float("norm" in name and name.endswith("weight"))).to(dtype)


def save(folder: Path, config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Path:
    """The folder as diffusers saves it; several GB for the full sizes."""
    with torch.device("meta"):
        nets: dict[str, tuple[nn.Module, str, dict[str, Any]]] = {
            "text_encoder": (CLIPText(config.text_encoder), "model", _clip(config.text_encoder)),
            "unet": (UNet(config.unet), "diffusion_pytorch_model", _unet(config.unet)),
            "vae": (VAE(config.vae), "diffusion_pytorch_model", _vae(config.vae, config.unet.sample_size)),
        }
    for component, (net, file, settings) in nets.items():
        (folder / component).mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        weights = {name: draw_weight(name, w.shape, dtype, generator) for name, w in net.state_dict().items()}
        save_file(weights, folder / component / f"{file}.safetensors", metadata={"format": "pt"})
        (folder / component / "config.json").write_text(json.dumps(settings))
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(BUNDLED / part, folder / part)
    shutil.copy(BUNDLED / "model_index.json", folder)
    return folder


def _clip(config: CLIPConfig) -> dict[str, Any]:
    """Of the bundled tokenizer are the ids of a text's beginning and end."""
    ids = json.loads((BUNDLED / "text_encoder" / "config.json").read_text())
    ends = {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | asdict(config) | ends


def _unet(config: UNetConfig) -> dict[str, Any]:
    settings = asdict(config)
    down, up = settings.pop("down_attention"), settings.pop("up_attention")
    return {
        "_class_name": "UNet2DConditionModel",
        **settings,
        "attention_head_dim": settings.pop("num_attention_heads"),  # diffusers' old name for the number of heads
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in down],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in up],
    } | {"num_attention_heads": None}


def _vae(config: VAEConfig, latent_size: int) -> dict[str, Any]:
    settings = asdict(config)
    for key in (
        "down_attention",
        "up_attention",
        "resamp_with_conv",
        "use_conv_shortcut",
        "z_channels",
    ):  # of latent-diffusion's; the presets have none
        del settings[key]
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **settings,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": latent_size * config.downscale,
    }
