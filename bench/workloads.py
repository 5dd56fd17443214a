"""What is measured, and when two sides are held to have done the same: a picture, or one step of a UNet alone.

All sides of a case share weights, inputs, dtype and threads. What each gives is an array that the gates compare.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsd.checkpoints import open_model
from fastsd.config import ModelConfig
from fastsd.device import DTYPES
from fastsd.verify import psnr
from tests.tolerances import HALF_IMAGE_PSNR, IMAGE_PSNR, NET, UNET_STEP

PROMPT = "a large red circle in the center on a white background"
GUIDANCE = 7.5
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One row: what is drawn, how often, in what. Pictures are guided, so the UNet sees 2 × batch rows."""

    model: str
    """Its name in the report."""
    folder: str
    """Where it lies; not in the report. Empty for a step alone."""
    pixels: int
    batch: int = 1
    steps: int = 20
    sampler: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    alone: bool = False
    """One step of SD 1.5's UNet instead of a picture."""

    @property
    def name(self) -> str:
        size, short = f"{self.pixels}x{self.pixels}", SHORT[self.torch_dtype]
        if self.alone:
            return f"{self.model} UNet, batch {2 * self.batch}, {size}, {short}"
        return f"{self.model}, {size}, batch {self.batch}, {self.steps} steps, {short}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Drawn:
    """What one run gave: pictures [B, H, W, 3] in [0, 1], or a step's output; and the seconds of its stages."""

    array: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    """text, unet (the whole loop), decode; none for a step alone."""
    calls: int = 1
    """Calls of the UNet in the loop."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], Drawn]
    step: Callable[[], np.ndarray] | None = None
    """One call of its UNet on `Inputs.rows`; None for a step alone, where `run` is that."""


class Inputs:
    """The same for everyone who draws a case: drawn on the CPU in fp32, rounded to the case's dtype."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = model_config(case.folder)
        self.side = case.pixels // self.config.vae.downscale

    @property
    def latents(self) -> Tensor:
        """Initial noise [B, C, H, W]."""
        return self._draw(1, self.case.batch, self.config.vae.latent_channels, self.side, self.side)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """For a UNet step: x [2B, C, H, W], a timestep (whole, one), context [2B, 77, C]."""
        x = self._draw(2, 2 * self.case.batch, self.config.unet.in_channels, self.side, self.side)
        context = self._draw(3, 2 * self.case.batch, 77, self.config.unet.cross_attention_dim)
        return x, torch.tensor(500, device=self.case.device), context

    def generators(self) -> list[torch.Generator]:
        """For samplers that add noise: one an image, drawing on the CPU."""
        return [torch.Generator().manual_seed(seed) for seed in range(self.case.batch)]

    def _draw(self, seed: int, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.case.device, self.case.torch_dtype)


def model_config(folder: str | Path) -> ModelConfig:
    opened = open_model(folder)
    return ModelConfig.from_json(opened.text_encoder, opened.unet, opened.vae)


def picture_gate(ours: np.ndarray, theirs: np.ndarray, dtype: torch.dtype) -> str | None:
    """What breaches parity between two pictures; None: nothing."""
    quality, asked = psnr(ours, theirs), HALF_IMAGE_PSNR.get(dtype, IMAGE_PSNR)
    return None if quality >= asked else f"picture: PSNR {quality:.1f} dB, {asked:g} asked"


def step_error(ours: np.ndarray, theirs: np.ndarray, dtype: torch.dtype) -> float:
    """fp32: the largest absolute error against the largest value. Else relative L2."""
    if dtype == torch.float32:
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def step_gate(ours: np.ndarray, theirs: np.ndarray, dtype: torch.dtype) -> str | None:
    """What breaches parity between two outputs of a UNet; None: nothing."""
    error, gate = step_error(ours, theirs, dtype), NET if dtype == torch.float32 else UNET_STEP[dtype]
    return None if error <= gate else f"UNet step: error {error:.1e}, {gate:.0e} allowed"
