"""Training the autoencoder: reconstruction at several scales, and a KL term that keeps the latents near a unit Gaussian.

Rombach et al. 2022, arXiv 2112.10752, section 3.1, without the discriminator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.models.vae import VAE
from fastsd.training.data import Batch, Dataset, Draws
from fastsd.training.loop import Task


@dataclass(frozen=True)
class AutoencoderLoss:
    """The terms, and the crop they are taken on."""

    l1: float = 1.0
    l2: float = 2.0
    scales: float = 0.5  # L1 of the pictures averaged over 2, 4 and 8 pixels
    gradients: float = 1.0  # L1 of the differences of neighbours: edges
    kl: float = 2e-3  # a latent value, against l1 a colour value
    posterior_logvar: float | None = None  # log-variance of every latent; None: the encoder's own
    colour_pull: float = (
        0.0  # at first, L2 of three latent channels to the averaged colours; down to 0 by a third of the run
    )
    freeze_encoder: bool = False


class AutoencoderTask(Task):
    def __init__(self, vae: VAE, loss: AutoencoderLoss) -> None:
        super().__init__()
        self.vae, self.loss = vae, loss
        frozen = [vae.encoder] + ([vae.quant_conv] if vae.quant_conv is not None else [])
        for net in frozen if loss.freeze_encoder else []:
            net.requires_grad_(False)

    def losses(self, batch: Batch, draws: Draws, progress: float) -> dict[str, Tensor]:
        """batch: "image" [B, H, W, 3] in [−1, 1]."""
        image: Tensor = batch["image"]
        options = self.loss
        with torch.set_grad_enabled(torch.is_grad_enabled() and not options.freeze_encoder):
            mean, logvar = self.vae.moments(image)  # [B, h, w, C]
        mean, logvar = mean.float(), logvar.float()
        if options.posterior_logvar is not None:
            logvar = torch.full_like(mean, options.posterior_logvar)
        z = mean + (0.5 * logvar).exp() * draws.normal(*mean.shape[1:])
        scaling = self.vae.config.scaling_factor
        out = self.vae.decode((z - self.vae.config.shift_factor) * scaling).float()  # [B, H, W, 3]
        terms = reconstruction(out, image)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        pull = max(0.0, 1 - 3 * progress) * options.colour_pull
        total = (
            options.l1 * terms["l1"]
            + options.l2 * terms["l2"]
            + options.scales * terms["scales"]
            + options.gradients * terms["gradients"]
            + options.kl * kl
        )
        if pull:
            colours = _pooled(image, image.shape[1] // mean.shape[1])
            total = total + pull * (mean[..., :3] - colours).square().mean()
        psnr = 10 * torch.log10(4 / terms["l2"].detach())
        return {"loss": total, "l1": terms["l1"], "kl": kl, "psnr": psnr}


def reconstruction(out: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The distances of two pictures [B, H, W, 3]: l1, l2, scales (L1 of averages) and gradients (L1 of differences)."""
    error = out - image
    scales = [_pooled(error, size).abs().mean() for size in (2, 4, 8)]
    across = error[:, :, 1:] - error[:, :, :-1]
    down = error[:, 1:] - error[:, :-1]
    return {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "scales": torch.stack(scales).mean(),
        "gradients": across.abs().mean() + down.abs().mean(),
    }


def _pooled(image: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(image.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data set, or random crops of them. A `Source` of "image" [H, W, 3] in [−1, 1]."""

    dataset: Dataset
    crop: int | None = None
    flat: float = 0.1  # how many crops may be of one colour: there is little to learn from them

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
        image = self.dataset.image(index)
        if self.crop is not None:
            image = self._cropped(image, rng)
        return {"image": as_tensor(image)}

    def _cropped(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        assert self.crop is not None
        for _ in range(8):
            top, left = (int(rng.integers(0, side - self.crop + 1)) for side in image.shape[:2])
            part = image[top : top + self.crop, left : left + self.crop]
            if part.std((0, 1)).max() > 8 or rng.random() < self.flat:
                break
        return part


def as_tensor(image: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 → float32 in [−1, 1]."""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1)


@torch.no_grad()
def fix_posterior(vae: VAE, logvar: float) -> None:
    """Make the encoder give this log-variance everywhere: what it was trained with."""
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    rows = vae.config.latent_channels
    last.weight[rows:] = 0
    assert last.bias is not None
    last.bias[rows:] = logvar
