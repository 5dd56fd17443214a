"""Noise that belongs to an image: each draws its own from its own seed, whatever the device and the batch."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.checks import number
from fastsd.errors import ParameterError
from fastsd.philox import Philox

LARGEST_SEED = 2**64 - 1
RNGS = ("cpu", "gpu")
"""Whose random numbers a seed stands for: torch's on the CPU, or those that a CUDA device draws (see `fastsd.philox`)."""
NEARLY_PARALLEL = 0.9995
"""Cosine from which `slerp` goes straight: on so short an arc the two agree, and the sine to divide by is next to 0."""


class Variation(NamedTuple):
    """Another noise that the first one of each image is turned towards."""

    seeds: list[int]
    """One an image."""
    strength: float
    """0: the image's own noise, 1: the other."""


class NoiseSource:
    """Unit Gaussian noise for a batch of images, drawn step after step.

    With a list of generators image i draws from generators[i] alone, so it reproduces in any batch and on any device. With
    one generator the batch draws together, as diffusers does for `generator=torch.Generator()`.
    """

    def __init__(self, generators: Sequence[torch.Generator | Philox] | torch.Generator, batch: int) -> None:
        self.generators = generators
        self.batch = batch
        self.seeds: list[int] | None = None
        self.rng = "cpu"
        self.variation: Variation | None = None

    @classmethod
    def from_seeds(cls, seeds: Sequence[int], variation: Variation | None = None, rng: str = "cpu") -> "NoiseSource":
        """seeds: one an image, each in [0, 2⁶⁴). rng: one of RNGS."""
        source = cls([seeded(seed, rng) for seed in seeds], len(seeds))
        source.seeds, source.variation, source.rng = list(seeds), variation, rng
        return source

    def again(self) -> "NoiseSource":
        """The same noise from its beginning; the caller's own generators only go on."""
        return self if self.seeds is None else NoiseSource.from_seeds(self.seeds, self.variation, self.rng)

    def draw(self, height: int, width: int, channels: int, device: torch.device, shared: int | None = None) -> Tensor:
        """The next noise, fp32 [B, H, W, C]. Numbers are drawn in [C, H, W] order, the order of diffusers.

        shared: how many a batch with one generator draws instead of B, where its images share something.
        """
        if isinstance(self.generators, torch.Generator):
            noise = randn((shared or self.batch, channels, height, width), self.generators)
        else:
            noise = torch.stack([randn((channels, height, width), generator) for generator in self.generators])
        return noise.permute(0, 2, 3, 1).contiguous().to(device)

    def draw_first(self, height: int, width: int, channels: int, device: torch.device) -> Tensor:
        """The noise that a walk begins with, fp32 [B, H, W, C]: what `draw` gives, turned towards the variation's."""
        noise = self.draw(height, width, channels, device)
        if self.variation is None:
            return noise
        other = NoiseSource.from_seeds(self.variation.seeds, rng=self.rng).draw(height, width, channels, device)
        return torch.stack([slerp(a, b, self.variation.strength) for a, b in zip(noise, other, strict=True)])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from a (t = 0) to b (t = 1) along the arc between them, in a's dtype.

    Latents or embeddings of one shape, each taken as one vector: between unit Gaussian noises all that lies between has unit
    variance too. Nearly parallel ones are interpolated linearly. ParameterError for other shapes, or t outside [0, 1].
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.is_floating_point()):
        raise ParameterError("slerp: a and b must be float tensors of one shape")
    t = number("t", t, 0.0, 1.0)
    x, y = a.double(), b.double().to(a.device)
    cosine = float((x * y).sum() / (x.norm() * y.norm()).clamp_min(torch.finfo(torch.float64).tiny))
    if abs(cosine) > NEARLY_PARALLEL:
        return torch.lerp(x, y, t).to(a.dtype)
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    near, far = (torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle))
    return (float(near) * x + float(far) * y).to(a.dtype)


def seeded(seed: int, rng: str) -> torch.Generator | Philox:
    """seed: in [0, 2⁶⁴). rng: one of RNGS."""
    return Philox(seed) if rng == "gpu" else torch.Generator("cpu").manual_seed(seed)


def randn(shape: Sequence[int], generator: torch.Generator | Philox) -> Tensor:
    """The generator's next unit Gaussian noise, fp32."""
    if isinstance(generator, Philox):
        return torch.from_numpy(generator.normal(*shape))
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def random_seed() -> int:
    """A fresh 32-bit seed, from the operating system: the global random state stays untouched."""
    return secrets.randbelow(2**32)
