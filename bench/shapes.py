"""Which calls a model makes: each stage is run on meta tensors, and its calls are written down.

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
    result: torch.Size

    def meta(self, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """The arguments again, on meta."""

        def tensor(value: Any) -> Any:
            return torch.empty(value, dtype=dtype, device="meta") if isinstance(value, torch.Size) else value

        return [tensor(value) for value in self.arguments], {name: tensor(value) for name, value in self.options}


STAGES = ("text", "prompt", "schedule", "step", "decode")


def trace(config: ModelConfig, pixels: int, batch: int = 2) -> dict[str, Counter[Call]]:
    """How often each call is made by each stage.

    text: CLIP on `batch` prompts; prompt: their keys and values; schedule: the time projections of one timestep; step: one UNet
    step on `batch` rows; decode: one image.
    """
    calls: dict[str, Counter[Call]] = {stage: Counter() for stage in STAGES}
    latent = pixels // config.vae.downscale
    with torch.device("meta"), torch.no_grad():
        ids, x = torch.zeros(batch, 77, dtype=torch.int64), torch.empty(batch, latent, latent, config.unet.in_channels)
        context = CLIPText(config.text_encoder, recording(calls["text"]))(ids)
        keys = UNet(config.unet, recording(calls["prompt"])).project_context(context)
        time = UNet(config.unet, recording(calls["schedule"])).project_time(torch.zeros(1)).expand(batch, -1)
        UNet(config.unet, recording(calls["step"]))(x, time, keys)
        VAE(config.vae, recording(calls["decode"])).decode(x[:1])
    return calls


def recording(calls: Counter[Call]) -> Ops:
    """The reference ops, each call written down."""

    def record(name: str) -> Callable[..., Tensor]:
        def op(*arguments: Any, **options: Any) -> Tensor:
            shapes = [value.shape if isinstance(value, Tensor) else value for value in arguments]
            while shapes and shapes[-1] is None:
                shapes.pop()
            named = sorted((key, value.shape if isinstance(value, Tensor) else value) for key, value in options.items())
            result = getattr(REFERENCE, name)(*arguments, **options)
            calls[Call(name, tuple(shapes), tuple(named), result.shape)] += 1
            return result

        return op

    return Ops(name="recording", **{field.name: record(field.name) for field in fields(Ops) if field.name != "name"})
