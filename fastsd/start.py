"""Where a walk begins: with noise, or with an image and noise; and what it keeps of the image, or is shown of it.

The order of the random draws is that of diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline: the sample
of the image's latents, the noise, the sample of the masked image's latents; the noise of the steps follows. Where one image
serves several, each of them draws its own sample of it, so that it comes out alone as well (diffusers draws from the first
generator of a list for all when it inpaints). A single generator for the batch draws as many samples as there are pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.brownian import BrownianNoise
from fastsd.config import ModelConfig
from fastsd.image_source import Source, inpaints, spread
from fastsd.masks import to_latent
from fastsd.noise import NoiseSource
from fastsd.request import Request
from fastsd.sampling import SAMPLERS, NoiseSchedule, Table
from fastsd.walks import Kept

Encode = Callable[[list[Tensor | None]], Tensor]
"""[pictures [M, H, W, 3] in [−1, 1], unit noise [B, h, w, C] or None] → latents [B, h, w, C] fp32: see `VAE.encode`."""


class Start(NamedTuple):
    """What a `Walk` begins with."""

    table: Table
    latents: Tensor
    noise: NoiseSource
    """What the steps draw from."""
    kept: Kept | None = None
    condition: Tensor | None = None


@dataclass(frozen=True)
class Beginner:
    """Begins the walks of a model."""

    config: ModelConfig
    schedule: NoiseSchedule
    encode: Encode
    device: torch.device

    def begin(self, request: Request, source: Source | None, table: Table, notes: list[str]) -> Start:
        """table: of the steps that are taken (`make_table`'s strength). A warning goes to notes."""
        size = self._size(request)
        mask = None if source is None or source.mask is None else self._mask(source.mask)
        from_noise = source is None or (mask is not None and source.strength == 1.0)
        image = None
        if source is not None and not (from_noise and inpaints(self.config)):
            image = self._sample(request, source.pictures, source.latent)
        if request.latents is None:
            noise = request.noise.draw_first(*size, self.device)
        else:
            noise = request.latents.permute(0, 2, 3, 1).to(self.device, torch.float32).contiguous()
        condition = self._condition(request, source, mask)
        steps = self._step_noise(request, table)
        if mask is not None and not mask.any():
            notes.append("mask_image: white nowhere, or in less than a latent; nothing is painted")
        if image is None:
            return Start(table, noise, steps, None, condition)
        levels = torch.from_numpy(table.noise_levels(self.schedule)).float()
        kept = None
        if mask is not None and condition is None:
            kept = Kept(spread(mask, request.batch), image, noise, levels.to(self.device))
        if from_noise:
            return Start(table, noise, steps, kept, condition)
        share, rest = levels[0].tolist()
        begun = share * image + rest * noise
        return Start(replace(table, initial_scale=1.0), begun, steps, kept, condition)

    def _step_noise(self, request: Request, table: Table) -> NoiseSource:
        if request.step_noise == "independent" or not SAMPLERS[table.sampler].brownian or request.seeds is None:
            return request.noise
        return BrownianNoise(request.seeds, request.noise.rng, table, self.schedule)

    def _condition(self, request: Request, source: Source | None, mask: Tensor | None) -> Tensor | None:
        """What an inpainting UNet sees beside the latents, [B, h, w, 1+C]; without a mask it shall paint all. None for others."""
        if not inpaints(self.config):
            if source is not None and mask is not None and self.config.vae.variational:
                # in diffusers the masked image is sampled for these too
                request.noise.draw(*self._size(request), self.device, shared=len(source.pictures))
            return None
        if source is None or source.mask is None or mask is None:
            black = torch.zeros(1, request.height, request.width, self.config.vae.in_channels)
            seen = spread(self.encode([black, None]), request.batch)
            return torch.cat([torch.ones_like(seen[..., :1]), seen], dim=-1)
        seen = self._sample(request, source.pictures * (source.mask < 0.5), latent=False)
        return torch.cat([spread(mask, request.batch), seen], dim=-1)

    def _sample(self, request: Request, pictures: Tensor, latent: bool) -> Tensor:
        """Latents [B, h, w, C] of pictures [M, …]: as they are, or as the VAE gives them, drawn where it gives a distribution."""
        if latent:
            return spread(pictures.to(self.device), request.batch)
        if not self.config.vae.variational:
            return spread(self.encode([pictures, None]), request.batch)
        noise = request.noise.draw(*self._size(request), self.device, shared=len(pictures))
        if len(pictures) > 1:  # one is encoded once for all noises
            pictures = spread(pictures, len(noise))
        return spread(self.encode([pictures, noise]), request.batch)

    def _mask(self, mask: Tensor) -> Tensor:
        return to_latent(mask, self.config.vae.downscale).to(self.device)

    def _size(self, request: Request) -> tuple[int, int, int]:
        """Height, width and channels of the latents."""
        unit = self.config.vae.downscale
        return request.height // unit, request.width // unit, self.config.vae.latent_channels
