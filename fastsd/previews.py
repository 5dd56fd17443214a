"""Pictures of latents in passing, for far less than the VAE takes: a linear map of each latent, or TAESD's small decoder."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastsd.checkpoints.taesd import open_taesd_decoder
from fastsd.checkpoints.weights import fill_module
from fastsd.checks import float_tensor, integer
from fastsd.device import computing
from fastsd.errors import ParameterError
from fastsd.first_stage import nhwc
from fastsd.images import to_pil
from fastsd.models.taesd import TAESDDecoder
from fastsd.stages import Stages
from fastsd.wording import quoted

SHADES = 4
"""Of each of red, green and blue in the chart that the linear map is fitted on."""
PATCH = 4
"""Latents a side of each colour's patch: less lets the neighbours in."""


class Previews(Stages):
    """The stages of a model, and what shows latents in passing."""

    def preview(self, latents: Tensor, taesd: str | Path | TAESDDecoder | None = None) -> list[Image.Image]:
        """Latents [B, C, H/8, W/8] as the UNet sees them, e.g. a callback's "denoised" → a small picture of each.

        Without taesd one pixel a latent, by a linear map that is fitted on the model's own VAE the first time. taesd: a file
        with TAESD's decoder, or what `load_taesd` gave: then pictures of full size.

        Raises ParameterError for the latents, CheckpointError for the file.
        """
        shape = (None, self.config.vae.latent_channels, None, None)
        float_tensor("latents", latents, shape, "images, channels, height, width")
        decoder = self.load_taesd(taesd) if isinstance(taesd, str | Path) else taesd
        with computing(self.device, f"previews of latents {list(latents.shape)}"):
            x = nhwc(latents.to(self.device, torch.float32))
            if decoder is None:
                return to_pil(x @ self._linear[:-1] + self._linear[-1])
            return to_pil(decoder(x.to(self.dtype)))

    def load_taesd(self, path: str | Path) -> TAESDDecoder:
        """TAESD's decoder from a safetensors file: of the original (`taesd_decoder.safetensors`), or a whole AutoencoderTiny.

        Raises CheckpointError if the file is not one for this model's latents.
        """
        if not isinstance(path, str | Path):
            raise ParameterError(f"taesd: must be a file's path, not {quoted(path)}")
        vae = self.config.vae
        with torch.inference_mode(False):
            with torch.device("meta"):
                decoder = TAESDDecoder(vae.latent_channels, len(vae.block_out_channels))
            fill_module("taesd", [open_taesd_decoder(path)], decoder, self.dtype, self.device)
        return decoder.eval()

    @cached_property
    def _linear(self) -> Tensor:
        """[C+1, 3] fp32: (latent, 1) · this ≈ the mean of the pixels that it stands for, in [−1, 1].

        Least squares on a chart of flat colours that went through the model's own VAE.
        """
        unit = self.config.vae.downscale
        chart = _chart(unit)
        with computing(self.device, "fitting previews"):
            latents = self._finite("encode", [chart, None], []).cpu().double()
        cells = F.avg_pool2d(chart.permute(0, 3, 1, 2).double(), unit).permute(0, 2, 3, 1)
        known = torch.cat([latents, torch.ones_like(latents[..., :1])], dim=-1)
        return torch.linalg.lstsq(known.flatten(0, 2), cells.flatten(0, 2)).solution.float().to(self.device)


class Previewer:
    """A `callback_on_step_end` that shows what the picture is about to become, every so many steps.

    on_preview(step, pictures) gets the step's index and one picture an image, see `Previews.preview`; an exception it raises
    cancels the call. The VAE is asked, or taesd read, here and not in the loop.
    """

    def __init__(
        self,
        pipe: Previews,
        on_preview: Callable[[int, list[Image.Image]], Any],
        every: int = 5,
        taesd: str | Path | None = None,
    ) -> None:
        if not callable(on_preview):
            raise ParameterError(f"on_preview: must be a function, not {quoted(on_preview)}")
        self.on_preview = on_preview
        self.every = integer("every", every, 1, None)
        self.decoder = None if taesd is None else pipe.load_taesd(taesd)
        if self.decoder is None:
            _ = pipe._linear

    def __call__(self, pipe: Previews, step: int, timestep: float, values: dict[str, Any]) -> None:
        denoised = values["denoised"]
        if (step + 1) % self.every == 0 and denoised.isfinite().all():  # what is not is told at the end of the walk
            self.on_preview(step, pipe.preview(denoised, self.decoder))


def _chart(unit: int) -> Tensor:
    """Every mixture of SHADES shades of red, green and blue in a patch of its own: [1, H, W, 3] in [−1, 1], H = W = 32·unit."""
    shades = torch.linspace(-1.0, 1.0, SHADES, device="cpu")
    colours = torch.cartesian_prod(shades, shades, shades)
    rows = int(len(colours) ** 0.5)
    patches = colours.view(1, rows, -1, 3)
    return patches.repeat_interleave(PATCH * unit, 1).repeat_interleave(PATCH * unit, 2)
