"""An autoencoder by itself: images ↔ latents, without a diffusion model between them.

For compression (latents, or indices into a codebook), and for the reconstruction error as a score of how unlike an image is to
those that it was trained on (Sakurada and Yairi 2014, "Anomaly detection using autoencoders with nonlinear dimensionality
reduction").
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd import images
from fastsd.backends import select_ops
from fastsd.checkpoints import open_autoencoder, resolve_autoencoder
from fastsd.checks import choice, float_tensor, text_or_none
from fastsd.config import VAEConfig, autoencoder_config
from fastsd.device import computing, select_device, select_dtype
from fastsd.errors import CheckpointError, ParameterError
from fastsd.first_stage import FirstStage, nchw, nhwc
from fastsd.ldm_autoencoder import read_original_config
from fastsd.models.vq import VQ
from fastsd.ops import Ops
from fastsd.wording import quoted


class Autoencoder(FirstStage):
    """The first stage of a latent diffusion model: with a mean and a variance (KL), or with a codebook (VQ).

    Its methods keep no state between calls: threads may share it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str | Ops = "auto",
        variant: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        allow_pickle: bool = False,
        use_ema: bool = False,
        original_config: str | Path | Mapping[str, Any] | None = None,
        graphs: bool = True,
    ) -> None:
        """Load an autoencoder: a diffusers folder (or one that holds it as vae/ or vqvae/), a single file, or a Hub id.

        use_ema: of a single file take the averaged weights. original_config: latent diffusion's YAML, its path or what it
        holds, for what a single file's tensors do not tell: without it the latents are scaled by 0.18215, those of a codebook
        not at all. The other options are as `Pipeline` takes them.

        Raises CheckpointError (HubError for the Hub) if it cannot be had or is no such autoencoder, and ParameterError for the
        arguments.
        """
        if not isinstance(model, str | Path):
            raise ParameterError(f"model: must be a folder, a file or a Hub id, not {quoted(model)}")
        for name, value in {"variant": variant, "revision": revision}.items():
            text_or_none(name, value)
        chosen = select_device(device)
        chosen_dtype = select_dtype(dtype, chosen)
        ops = select_ops(backend, chosen)
        given = None if original_config is None else read_original_config(original_config)
        path = resolve_autoencoder(
            model,
            revision=revision,
            variant=variant,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if given is not None and not path.is_file():
            raise ParameterError("original_config: is for single files; a folder has its own config.json")
        source = open_autoencoder(path, variant=variant, allow_pickle=allow_pickle, use_ema=use_ema)
        super().__init__(given or autoencoder_config(source.vae), source, ops, chosen, chosen_dtype, graphs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> "Autoencoder":
        """A diffusers folder or a Hub id; options as the constructor takes them."""
        return cls(name_or_path, **options)

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> "Autoencoder":
        """One file of latent diffusion's or diffusers' names; options as the constructor takes them. Needs no network."""
        if not isinstance(path, str | Path) or not os.path.isfile(path):
            raise CheckpointError(f"no such file: {quoted(str(path))}")
        return cls(path, **options)

    @property
    def config(self) -> VAEConfig:
        """Its sizes: `downscale` pixels a latent along each axis, `latent_channels`, `scaling_factor`."""
        return self.vae.config

    encode = FirstStage.encode_image
    decode = FirstStage.decode_latents

    def reconstruct(self, image: Any, output_type: str = "pil") -> "list[Image.Image] | np.ndarray | Tensor":
        """Images → the same through the latents and back, as output_type ("pil", "np", "pt") asks.

        image: as `encode` takes it. The latents are not drawn: it is the mean's picture, or that of the nearest entries.
        """
        choice("output_type", output_type, ("pil", "np", "pt"))
        return self.decode(self.encode(image), output_type)

    def reconstruction_error(self, image: Any) -> Tensor:
        """Images → the mean squared error of each one's reconstruction, [B] fp64 on the CPU.

        Of values in [0, 1], as files hold them: −10 · log10 of it is the PSNR in dB.
        """
        truth = images.from_tensor(images.to_tensor(image, self.config.downscale), "pt")
        found = self.reconstruct(image, "pt")
        assert isinstance(found, Tensor)
        assert isinstance(truth, Tensor)
        return (found.cpu().double() - truth.double()).square().mean(dim=(1, 2, 3))

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, H/4, W/4] → the codebook's entries nearest to them, likewise, and their indices [B, H/4, W/4] int64.

        Raises ParameterError for the latents, and if the autoencoder has no codebook.
        """
        codebook = self._codebook()
        shape = (None, self.config.latent_channels, None, None)
        float_tensor("latents", latents, shape, "images, channels, height, width")
        with computing(self.device, f"quantising latents {list(latents.shape)} in {self.dtype}"):
            values, indices = codebook.quantise(nhwc(latents.to(self.device, self.dtype)))
            return nchw(values).float(), indices

    def decode_indices(self, indices: Tensor, output_type: str = "pil") -> "list[Image.Image] | np.ndarray | Tensor":
        """Indices [B, H/4, W/4] as `quantize` gives them → images as output_type asks. ParameterError likewise."""
        codebook = self._codebook()
        if not isinstance(indices, Tensor) or indices.ndim != 3 or 0 in indices.shape:
            raise ParameterError("indices: must be a tensor of integers [images, height, width]")
        with computing(self.device, f"looking up indices {list(indices.shape)}"):
            entries = codebook.quantize.entries(indices.to(self.device))
            latents = nchw(entries.float() * self.config.scaling_factor)
        return self.decode(latents, output_type)

    def _codebook(self) -> VQ:
        if not isinstance(self.vae, VQ):
            raise ParameterError("quantize: this autoencoder has no codebook; encode and decode do without one")
        return self.vae
