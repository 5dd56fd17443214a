"""The vector-quantised autoencoders of latent diffusion: images ↔ latents ↔ entries of a codebook.

van den Oord et al. 2017 (arXiv 1711.00937), Esser et al. 2021 (arXiv 2012.09841); the attribute names are diffusers' VQModel's.
A diffusion model learns the latents before they are quantised: quantising is the decoder's first step.
"""

import torch
from torch import Tensor, nn

from fastsd.config import VAEConfig, VQConfig
from fastsd.errors import ParameterError
from fastsd.models.layers import conv1x1
from fastsd.models.vae import VAE, Decoder, Encoder
from fastsd.ops import REFERENCE, Ops

DISTANCES = 1 << 22
"""Most distances held at once: 16 MiB; a picture of 512² has 2²⁷ of them at f4 with 8192 entries."""


def autoencoder(config: VAEConfig, ops: Ops = REFERENCE) -> "VAE | VQ":
    """The net of a config: a VQ of a VQConfig, else a VAE."""
    return VQ(config, ops) if isinstance(config, VQConfig) else VAE(config, ops)


class VQ(nn.Module):
    """The sizes in the comments are vq-f4's: 3 channels, a quarter of the image's height and width."""

    def __init__(self, config: VQConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config = config
        latents, coded = config.latent_channels, config.coded_channels
        self.encoder = Encoder(config, ops, coded)
        self.quant_conv = conv1x1(ops, coded, latents)
        self.quantize = Codebook(config.num_vq_embeddings, latents)
        self.post_quant_conv = conv1x1(ops, latents, coded)
        self.decoder = Decoder(config, ops)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image [B, H, W, 3] in [−1, 1] → latents [B, H/4, W/4, 3], not quantised, · scaling_factor.

        noise, as VAE.encode takes it, changes nothing: there is no distribution to draw from.
        """
        return self.quant_conv(self.encoder(image)) * self.config.scaling_factor

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The codebook's entries nearest to the latents [B, H, W, 3], scaled as these, and their indices [B, H, W].

        An entry is NaN where its latent is not finite. ParameterError if the latents are not as wide as the entries.
        """
        values, indices = self.quantize(latents / self.config.scaling_factor)
        return values * self.config.scaling_factor, indices

    def decode(self, latents: Tensor, force_not_quantize: bool = False) -> Tensor:
        """latents [B, H, W, 3] as `encode` gives them → image [B, 4H, 4W, 3], about [−1, 1], not clamped.

        force_not_quantize: decode them as they are, not the entries nearest to them.
        """
        z = latents / self.config.scaling_factor
        z = z if force_not_quantize else self.quantize(z)[0]
        return self.decoder(self.post_quant_conv(z))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Indices into the codebook [B, H, W] → image [B, 4H, 4W, 3]. ParameterError if one of them is no entry's."""
        return self.decoder(self.post_quant_conv(self.quantize.entries(indices)))


class Codebook(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., C] → the entries with the least Euclidean distance [..., C], and their indices [...].

        Among equally near ones it is the first.
        """
        width = self.embedding.embedding_dim
        if z.shape[-1] != width:
            raise ParameterError(f"latents must have {width} channels, as the codebook's entries, not {z.shape[-1]}")
        indices = _nearest(z.flatten(0, -2).float(), self.embedding.weight.float()).view(z.shape[:-1])
        finite = z.isfinite().all(-1, keepdim=True)  # NaN is near to nothing, and must not come out as a fine entry
        return self.embedding(indices).where(finite, torch.nan), indices

    def entries(self, indices: Tensor) -> Tensor:
        """The entries [..., C] of these indices [...]; ParameterError if one is none's."""
        size = self.embedding.num_embeddings
        if indices.dtype not in (torch.int32, torch.int64) or bool(((indices < 0) | (indices >= size)).any()):
            raise ParameterError(f"indices must be integers from 0 to {size - 1}, one for each entry of the codebook")
        return self.embedding(indices)


def _nearest(z: Tensor, entries: Tensor) -> Tensor:
    """The index [N] of the entry [K, C] nearest to each z [N, C], the least of several equally near.

    Each distance is summed up by itself: equal entries are equally far to the last bit, which a product of matrices does
    not promise, and nothing is lost by subtracting large squares.
    """
    blocks = z.split(max(1, DISTANCES // len(entries)))
    direct = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(rows, entries, compute_mode=direct).argmin(1) for rows in blocks])
