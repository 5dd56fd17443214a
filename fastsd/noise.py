"""Noise that belongs to an image: each draws its own from its own seed, on the CPU, whatever the device and the batch."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_SEED = 2**64 - 1


class NoiseSource:
    """Unit Gaussian noise for a batch of images, drawn step after step.

    With a list of generators image i draws from generators[i] alone, so it reproduces in any batch and on any device. With
    one generator the batch draws together, as diffusers does for `generator=torch.Generator()`.
    """

    def __init__(self, generators: Sequence[torch.Generator] | torch.Generator, batch: int) -> None:
        self.generators = generators
        self.batch = batch

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> "NoiseSource":
        """seeds: one an image, each in [0, 2⁶⁴)."""
        return cls([torch.Generator("cpu").manual_seed(seed) for seed in seeds], len(seeds))

    def draw(self, height: int, width: int, channels: int, device: torch.device) -> Tensor:
        """The next noise, fp32 [B, H, W, C]. Numbers are drawn in [C, H, W] order, the order of diffusers."""
        if isinstance(self.generators, torch.Generator):
            noise = _randn((self.batch, channels, height, width), self.generators)
        else:
            noise = torch.stack([_randn((channels, height, width), generator) for generator in self.generators])
        return noise.permute(0, 2, 3, 1).contiguous().to(device)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def random_seed() -> int:
    """A fresh 32-bit seed, from the operating system: the global random state stays untouched."""
    return secrets.randbelow(2**32)
