"""The second pass over a larger picture, the web UI's "Hires. fix": what `generate` was given for it, and what it begins with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from fastsd.checks import choice, integer, number
from fastsd.config import ModelConfig
from fastsd.errors import ParameterError
from fastsd.image_source import Source, resized
from fastsd.images import MAX_PIXELS, to_pil
from fastsd.ops import Wrap
from fastsd.request import Request

STRENGTH = 0.7
"""The web UI's default."""
MAX_SCALE = 8.0
UPSCALERS = {"latent": "Latent", "latent-nearest": "Latent (nearest)", "lanczos": "Lanczos"}
"""Our names of what enlarges between the passes, and the web UI's."""


@dataclass(frozen=True)
class Hires:
    """The second pass, begun from the first one's picture."""

    height: int  # pixels
    width: int
    steps: int
    strength: float
    upscaler: str
    scale: float


def check_hires(
    config: ModelConfig,
    request: Request,
    source: Source | None,
    scale: float | None,
    steps: int | None,
    strength: float | None,
    upscaler: str | None,
) -> Hires | None:
    """The arguments of `Pipeline.generate` as a Hires, None without a scale; ParameterError says what is wrong."""
    if scale is None:
        for name, value in {"hires_steps": steps, "hires_strength": strength, "hires_upscaler": upscaler}.items():
            if value is not None:
                raise ParameterError(f"{name}: has no meaning without hires_scale; give one, or leave {name} out")
        return None
    if source is not None:
        raise ParameterError("hires_scale: enlarges what is drawn from a prompt alone; leave image out")
    factor, unit = number("hires_scale", scale, 1.0, MAX_SCALE), config.vae.downscale
    height, width = (round(side * factor / unit) * unit for side in (request.height, request.width))
    if height * width > MAX_PIXELS:
        raise ParameterError(f"hires_scale: {width}x{height} is over the budget of {MAX_PIXELS} pixels; ask for less")
    return Hires(
        height,
        width,
        steps=request.steps if steps is None else integer("hires_steps", steps, 1, None),
        strength=number("hires_strength", STRENGTH if strength is None else strength, 0.0, 1.0),
        upscaler=choice("hires_upscaler", "latent" if upscaler is None else upscaler, list(UPSCALERS)),
        scale=factor,
    )


def walks(request: Request, source: Source | None, hires: Hires | None) -> list[tuple[int, float]]:
    """(steps, the share of them that is taken) of each pass."""
    first = (request.steps, source.strength if source else 1.0)
    return [first, (hires.steps, hires.strength)] if hires else [first]


def enlarge(
    hires: Hires, request: Request, latents: Tensor, decode: Callable[[Tensor], Tensor]
) -> tuple[Request, Source]:
    """The second pass of a request whose first gave latents [B, h, w, C]: the same seeds from their beginning.

    decode: latents → pictures [B, H, W, 3] in [−1, 1].
    """
    second = replace(request, height=hires.height, width=hires.width, noise=request.noise.again(), latents=None)
    latent = hires.upscaler != "lanczos"
    if latent:
        mode = "bilinear" if hires.upscaler == "latent" else "nearest"
        unit = request.height // latents.shape[1]

        def larger(x: Tensor, height: int, width: int) -> Tensor:
            return F.interpolate(x.permute(0, 3, 1, 2), (height, width), mode=mode).permute(0, 2, 3, 1)

        pictures = _enlarged(latents, hires.height // unit, hires.width // unit, request.wrap, larger)
    else:

        def larger(x: Tensor, height: int, width: int) -> Tensor:
            return resized(to_pil(x), height, width)

        pictures = _enlarged(decode(latents), hires.height, hires.width, request.wrap, larger)
    return second, Source(pictures, latent, hires.height, hires.width, hires.strength)


def _enlarged(x: Tensor, height: int, width: int, wrap: Wrap, larger: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """What `larger` makes of x [B, H, W, C]; where edges meet, each has the opposite one's pixels for neighbours."""
    across, down = (3 if meets else 1 for meets in wrap)
    copies = larger(x.repeat(1, down, across, 1), down * height, across * width)
    top, left = down // 2 * height, across // 2 * width
    return copies[:, top : top + height, left : left + width]
