"""Which calls a model makes: one step, one prompt and one decode, run on meta tensors and written down.

No weight is made and nothing is computed, so the full-size models can be listed anywhere.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastsd.config import SD15, SD21, ModelConfig
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.ops import REFERENCE, Ops

MODELS: dict[str, ModelConfig] = {"sd15": SD15, "sd21": SD21}


@dataclass(frozen=True)
class Call:
    """One call of an op, by the shapes of its tensors: what a kernel is planned from."""

    op: str
    arguments: tuple[Any, ...]  # shapes of tensors, other values as they are; trailing None left out
    options: tuple[tuple[str, Any], ...]

    def meta(self, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """The arguments again, on meta."""

        def tensor(value: Any) -> Any:
            return torch.empty(value, dtype=dtype, device="meta") if isinstance(value, torch.Size) else value

        return [tensor(value) for value in self.arguments], {name: tensor(value) for name, value in self.options}


def trace(config: ModelConfig, pixels: int, batch: int = 2) -> Counter[Call]:
    """How often each call is made by one UNet step on `batch` rows, CLIP on `batch` prompts and the decode of one image."""
    calls: Counter[Call] = Counter()
    ops = recording(calls)
    latent = pixels // config.vae.downscale
    with torch.device("meta"), torch.no_grad():
        text, unet, vae = CLIPText(config.text_encoder, ops), UNet(config.unet, ops), VAE(config.vae, ops)
        context = text(torch.zeros(batch, 77, dtype=torch.int64))
        keys, time = unet.project_context(context), unet.project_time(torch.zeros(batch))
        unet(torch.empty(batch, latent, latent, config.unet.in_channels), time, keys)
        vae.decode(torch.empty(1, latent, latent, config.vae.latent_channels))
    return calls


def recording(calls: Counter[Call]) -> Ops:
    """The reference ops, each call written down first."""

    def record(name: str) -> Callable[..., Tensor]:
        def op(*arguments: Any, **options: Any) -> Tensor:
            shapes = [value.shape if isinstance(value, Tensor) else value for value in arguments]
            while shapes and shapes[-1] is None:
                shapes.pop()
            named = sorted((key, value.shape if isinstance(value, Tensor) else value) for key, value in options.items())
            calls[Call(name, tuple(shapes), tuple(named))] += 1
            return getattr(REFERENCE, name)(*arguments, **options)

        return op

    return Ops(name="recording", **{field.name: record(field.name) for field in fields(Ops) if field.name != "name"})
