"""What `generate` was asked for, checked before anything is computed: arguments in, a frozen Request out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.config import ModelConfig
from fastsd.errors import ParameterError, PromptError
from fastsd.images import MAX_PIXELS, OUTPUT_TYPES
from fastsd.noise import LARGEST_SEED, NoiseSource, random_seed

MAX_IMAGES = 256

StepCallback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Request:
    """A checked call of `generate`. B images = prompts × num_images_per_prompt, the images of a prompt side by side."""

    prompts: list[str] | None  # P of them; None where embeddings were given
    negative_prompts: list[str] | None
    prompt_embeds: Tensor | None  # [P, L, C]
    negative_prompt_embeds: Tensor | None
    images_per_prompt: int
    height: int  # pixels
    width: int
    steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    clip_skip: int
    seeds: list[int] | None  # B of them; None where the caller's generator draws
    noise: NoiseSource
    latents: Tensor | None  # [B, C, H, W] unit Gaussian
    output_type: str
    warnings: list[str]

    @property
    def guided(self) -> bool:
        """Whether the UNet runs on (unconditional, conditional) pairs: above guidance 1, as in diffusers."""
        return self.guidance_scale > 1.0

    @property
    def batch(self) -> int:
        count = len(self.prompts) if self.prompts is not None else len(_present(self.prompt_embeds))
        return count * self.images_per_prompt


def check_request(
    config: ModelConfig,
    *,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    num_images_per_prompt: int,
    height: int | None,
    width: int | None,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_rescale: float,
    eta: float,
    clip_skip: int | None,
    seed: Any,
    generator: Any,
    latents: Tensor | None,
    output_type: str,
) -> Request:
    """The arguments of `Pipeline.generate` as a Request; ParameterError or PromptError names what is wrong and its range."""
    unit = config.vae.downscale
    default_size = config.unet.sample_size * unit
    count, prompts, negatives = _prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, config)
    images = integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    batch = count * images
    if batch > MAX_IMAGES:
        raise ParameterError(
            f"num_images_per_prompt: {count} prompts × {images} = {batch} images; at most {MAX_IMAGES}"
        )
    rows = _size("height", height, default_size, unit)
    columns = _size("width", width, default_size, unit)
    if rows * columns > MAX_PIXELS:
        raise ParameterError(f"height, width: {columns}x{rows} is over the budget of {MAX_PIXELS} pixels; ask for less")
    guidance = number("guidance_scale", guidance_scale, -1e4, 1e4)
    warnings = []
    if guidance <= 1.0 and (any(negatives or ()) or negative_prompt_embeds is not None):
        warnings.append(f"negative_prompt has no effect at guidance_scale {guidance:g}: it needs more than 1")
    seeds, noise = _seeds(seed, generator, batch)
    return Request(
        prompts=prompts,
        negative_prompts=negatives,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        images_per_prompt=images,
        height=rows,
        width=columns,
        steps=integer("num_inference_steps", num_inference_steps, 1, None),
        guidance_scale=guidance,
        guidance_rescale=number("guidance_rescale", guidance_rescale, 0.0, 1.0),
        eta=number("eta", eta, 0.0, 1.0),
        clip_skip=integer("clip_skip", clip_skip or 0, 0, config.text_encoder.num_hidden_layers - 1),
        seeds=seeds,
        noise=noise,
        latents=_latents(latents, (batch, config.vae.latent_channels, rows // unit, columns // unit)),
        output_type=choice("output_type", output_type, OUTPUT_TYPES),
        warnings=warnings,
    )


def integer(name: str, value: Any, low: int, high: int | None) -> int:
    """value as an int in [low, high], else ParameterError. Numbers that only look like integers are refused."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise ParameterError(f"{name}: {value!r} is not an integer; it must be one {_range(low, high)}")
    value = value.__index__()
    if value < low or (high is not None and value > high):
        raise ParameterError(f"{name}: {value} is out of range; it must be {_range(low, high)}")
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """value as a finite float in [low, high], else ParameterError."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise ParameterError(f"{name}: {value!r} is not a number; it must be one from {low:g} to {high:g}")
    value = float(value)
    if not math.isfinite(value) or not low <= value <= high:
        raise ParameterError(f"{name}: {value} is out of range; it must be from {low:g} to {high:g}")
    return value


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """value if it is one of choices, else ParameterError that lists them."""
    if value not in choices:
        raise ParameterError(f"{name}: {value!r} is unknown; choose one of {', '.join(choices)}")
    return value


def _range(low: int, high: int | None) -> str:
    return f"{low} or more" if high is None else f"from {low} to {high}"


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _size(name: str, value: int | None, default: int, multiple: int) -> int:
    pixels = default if value is None else integer(name, value, multiple, None)
    if pixels % multiple:
        near = max(multiple, round(pixels / multiple) * multiple)
        raise ParameterError(f"{name}: {pixels} is not a multiple of {multiple}; the nearest is {near}")
    return pixels


def _prompts(
    prompt: Any, negative: Any, embeds: Tensor | None, negative_embeds: Tensor | None, config: ModelConfig
) -> tuple[int, list[str] | None, list[str] | None]:
    """How many prompts, the prompts, and as many negative prompts; None for those given as embeddings."""
    if (prompt is None) == (embeds is None):
        raise PromptError("prompt: give either prompt or prompt_embeds, and not both")
    if negative is not None and negative_embeds is not None:
        raise PromptError("negative_prompt: give either negative_prompt or negative_prompt_embeds, not both")
    width = config.unet.cross_attention_dim
    prompts = None
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else list(_strings("prompt", prompt))
    elif embeds is not None:
        _check_embeds("prompt_embeds", embeds, width)
    count = len(prompts) if prompts is not None else len(_present(embeds))
    if negative_embeds is not None:
        _check_embeds("negative_prompt_embeds", negative_embeds, width)
        if embeds is not None and negative_embeds.shape != embeds.shape:
            raise PromptError(
                f"negative_prompt_embeds: shape {tuple(negative_embeds.shape)} differs from prompt_embeds' {tuple(embeds.shape)}"
            )
        if len(negative_embeds) != count:
            raise PromptError(f"negative_prompt_embeds: {len(negative_embeds)} rows for {count} prompts")
        return count, prompts, None
    negatives = (
        [negative or ""] * count
        if negative is None or isinstance(negative, str)
        else _strings("negative_prompt", negative)
    )
    if len(negatives) != count:
        raise PromptError(f"negative_prompt: {len(negatives)} given for {count} prompts; give one, or one a prompt")
    return count, prompts, negatives


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        raise PromptError(f"{name}: must be a string or a non-empty list of strings, not {value!r:.60}")
    return list(value)


def _check_embeds(name: str, embeds: Any, width: int) -> None:
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[2] != width or not embeds.is_floating_point():
        found = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise PromptError(f"{name}: must be a float tensor [prompts, tokens, {width}], not {found}")
    if not len(embeds) or not torch.isfinite(embeds).all():
        raise PromptError(f"{name}: is empty or holds NaN or infinite values")


def _seeds(seed: Any, generator: Any, batch: int) -> tuple[list[int] | None, NoiseSource]:
    if generator is not None:
        if seed is not None:
            raise ParameterError("seed: give either seed or generator, not both")
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ParameterError("generator: must be a torch.Generator or a list of them")
        if isinstance(generator, torch.Generator):
            return None, NoiseSource(generator, batch)
        if len(generators) != batch:
            raise ParameterError(f"generator: a list of {len(generators)} for {batch} images; give one an image")
        return None, NoiseSource(generators, batch)
    seeds = check_seeds(seed, batch)
    return seeds, NoiseSource.from_seeds(seeds)


def check_seeds(seed: Any, batch: int) -> list[int]:
    """One seed an image: those given, or seed, seed + 1, …; None or −1 is a random one. Each in [0, 2⁶⁴)."""
    if isinstance(seed, list | tuple):
        if len(seed) != batch:
            raise ParameterError(f"seed: a list of {len(seed)} for {batch} images; give one an image, or one number")
        return [_seed(one) for one in seed]
    first = _seed(seed)
    return [(first + index) % (LARGEST_SEED + 1) for index in range(batch)]


def _seed(value: Any) -> int:
    value = -1 if value is None else integer("seed", value, -1, LARGEST_SEED)
    return random_seed() if value == -1 else value


def _latents(latents: Any, shape: tuple[int, ...]) -> Tensor | None:
    if latents is None:
        return None
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape or not latents.is_floating_point():
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ParameterError(
            f"latents: must be a float tensor {list(shape)} (images, channels, height, width), not {found}"
        )
    if not torch.isfinite(latents).all():
        raise ParameterError("latents: hold NaN or infinite values")
    return latents
