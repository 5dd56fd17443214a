"""The autoencoder of a model on a device, images ↔ latents, and how a net is run there: eagerly, or as a captured graph."""

import copy
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastsd import images
from fastsd.adapters import SwapLock
from fastsd.backends import refresh_weights
from fastsd.checks import choice, flag_or_none, float_tensor
from fastsd.config import VAEConfig
from fastsd.device import computing, is_out_of_memory
from fastsd.errors import NumericsError, ParameterError
from fastsd.graph import CudaGraphs, Graphs
from fastsd.models.vae import VAE
from fastsd.models.vq import VQ, autoencoder
from fastsd.noise import NoiseSource
from fastsd.ops import Ops, Wrap
from fastsd.request import check_seeds
from fastsd.seamless import seamless
from fastsd.vae_tiles import tiled

logger = logging.getLogger("fastsd")

GRAPH_MEMORY = 4 * 2**30
"""Bytes of GPU memory that a pipeline's CUDA graphs may hold; the least recently used goes first."""

TILE = 512
"""Pixels a side of the VAE's tiles, where no UNet says what size the model was trained at."""

Net = TypeVar("Net", bound=nn.Module)


class Source(Protocol):
    """Where weights come from."""

    def load_weights(self, component: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None: ...


class FirstStage:
    """An autoencoder, and what is kept to run it fast. Threads may share it."""

    def __init__(
        self, config: VAEConfig, source: Source, ops: Ops, device: torch.device, dtype: torch.dtype, graphs: bool
    ) -> None:
        self.ops = ops
        self.device = device
        self.dtype = dtype
        self.graphs = Graphs(CudaGraphs(device), GRAPH_MEMORY) if graphs and device.type == "cuda" else None
        self._weights_at: list[int] = []
        self._nets: list[nn.Module] = []
        self._swaps = SwapLock()
        self.vae = self._load("vae", lambda: autoencoder(config, ops), source)
        self.tile = max(1, TILE // config.downscale)  # latents a side

    def _load(self, component: str, build: Callable[[], Net], source: Source) -> Net:
        """A net with its weights; CheckpointError if they do not fit."""
        with torch.inference_mode(False):  # weights that count their changes, wherever the Pipeline is made
            with torch.device("meta"):
                net = build()
            source.load_weights(component, net, self.dtype, self.device)
        self._nets.append(net)
        return net.eval()

    def encode_image(
        self, image: Any, seed: int | Sequence[int] | None = None, vae_tiling: bool | None = None
    ) -> Tensor:
        """Images → latents as a diffusion model sees them, [B, C, H/8, W/8] fp32.

        image: a path, PIL images, an array or a tensor; see `fastsd.images.to_tensor`. Without a seed the latents are the
        mean of the VAE's distribution; with one (image i of a batch takes seed + i) they are a sample of it. vae_tiling: True
        encodes in tiles what is larger than one, None only after running out of memory, False never.

        Raises ImageError for the image, ParameterError for the rest, NumericsError if the VAE gives a non-finite value.
        """
        unit = self.vae.config.downscale
        tiling, notes = flag_or_none("vae_tiling", vae_tiling), list[str]()
        x = images.to_tensor(image, unit)
        noise = None
        if seed is not None:
            if not self.vae.config.variational:
                raise ParameterError("seed: has no meaning with a codebook, whose latents are not drawn; leave it out")
            size = (x.shape[1] // unit, x.shape[2] // unit, self.vae.config.latent_channels)
            noise = NoiseSource.from_seeds(check_seeds(seed, len(x))).draw(*size, self.device)
        with (
            self._swaps.using(),
            computing(self.device, f"encoding {len(x)} images of {x.shape[2]}x{x.shape[1]} in {self.dtype}"),
        ):
            self._refresh()
            encoded = nchw(self._finite("encode", [x, noise], notes, tiling=tiling))
        tell(notes)
        return encoded

    def decode_latents(
        self, latents: Tensor, output_type: str = "pil", vae_tiling: bool | None = None
    ) -> "list[Image.Image] | np.ndarray | Tensor":
        """Latents [B, C, H/8, W/8], as `encode_image` or output_type="latent" gives them → images as output_type asks.

        vae_tiling: as `encode_image` takes it.

        Raises ParameterError for the arguments, NumericsError if the VAE gives a non-finite value.
        """
        choice("output_type", output_type, images.OUTPUT_TYPES)
        tiling, notes = flag_or_none("vae_tiling", vae_tiling), list[str]()
        shape = (None, self.vae.config.latent_channels, None, None)
        float_tensor("latents", latents, shape, "images, channels, height, width")
        latents = latents.to(self.device, torch.float32)
        if output_type == "latent":
            return latents
        with self._swaps.using(), computing(self.device, f"decoding latents {list(latents.shape)} in {self.dtype}"):
            self._refresh()
            decoded = self._finite("decode", [nhwc(latents)], notes, tiling=tiling)
        tell(notes)
        return images.from_tensor(decoded, output_type)

    def _refresh(self) -> None:
        """Let graphs see weights that were changed in place; forget them where weights were moved."""
        if self.graphs is None:
            return
        refresh_weights()
        at = [parameter.data_ptr() for net in self._nets for parameter in net.parameters()]
        if at != self._weights_at:
            self.graphs.clear()
            self._weights_at = at

    def _replayed(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs) if self.graphs is None else self.graphs.call(key, function, *inputs)

    def _finite(
        self,
        method: str,
        inputs: list[Tensor | None],
        notes: list[str],
        degraded: list[str] | None = None,
        tiling: bool | None = None,
        wrap: Wrap = (False, False),
    ) -> Tensor:
        """What the VAE's method gives, in fp32. Where half precision overflows it is computed again in fp32, and noted.

        inputs: of B pictures. tiling: True: in tiles where a picture is larger than one; None: so only after running out of
        memory; False: never. After running out of memory it is also one picture at a time; degraded is told, else notes.
        wrap: edges that meet, see `fastsd.seamless`.
        """
        told = notes if degraded is None else degraded
        given = [x for x in inputs if x is not None]
        half = [x.to(self.device, self.dtype) for x in given]
        result = self._within_memory(self.vae, method, half, told, tiling, wrap).float()
        if not result.isfinite().all() and self.dtype != torch.float32:
            notes.append(f"vae: non-finite values in {self.dtype}; computed again in float32")
            full = copy.deepcopy(self.vae).float()
            wide = [x.to(self.device, torch.float32) for x in given]
            result = self._within_memory(full, method, wide, told, tiling, wrap)
        if not result.isfinite().all():
            raise NumericsError(f"vae: {method} gives non-finite values; the input or the checkpoint is damaged")
        return result

    def _larger_than_a_tile(self, side: int) -> bool:
        """Whether a picture whose longer side has so many pixels is one that the VAE may be given in tiles."""
        return side > self.tile * self.vae.config.downscale

    def _within_memory(
        self,
        vae: VAE | VQ,
        method: str,
        inputs: list[Tensor],
        degraded: list[str],
        tiling: bool | None,
        wrap: Wrap,
    ) -> Tensor:
        batch = len(inputs[0])
        unit = 1 if method == "encode" else vae.config.downscale
        large = self._larger_than_a_tile(max(inputs[0].shape[1:3]) * unit)
        whole, in_tiles = getattr(seamless(vae, wrap), method), getattr(tiled(vae, self.tile, wrap), method)
        try:
            if large and tiling:
                return in_tiles(*inputs)
            if vae is not self.vae:
                return whole(*inputs)
            return self._replayed((method, wrap, *(tuple(x.shape) for x in inputs)), whole, *inputs)
        except RuntimeError as error:
            if not is_out_of_memory(error) or not (batch > 1 or (large and tiling is None)):
                raise
        # Out here the exception is gone, and with it the failed attempt's tensors.
        less = in_tiles if large and tiling is not False else whole
        how = "one picture at a time" if less is whole or tiling else "tiled"
        degraded.append(f"vae: {how}, after running out of memory")
        pictures = zip(*(x.split(1) for x in inputs), strict=True) if batch > 1 else [inputs]
        return torch.cat([less(*picture) for picture in pictures])


def tell(notes: Sequence[str]) -> None:
    """Log what a user should know (logger "fastsd")."""
    for note in notes:
        logger.warning(note)


def nchw(x: Tensor) -> Tensor:
    """[B, H, W, C] → [B, C, H, W]."""
    return x.permute(0, 3, 1, 2).contiguous()


def nhwc(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H, W, C]."""
    return x.permute(0, 2, 3, 1).contiguous()
