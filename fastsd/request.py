"""What `generate` was asked for, checked before anything is computed: arguments in, a frozen Request out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.brownian import STEP_NOISES
from fastsd.checks import choice, flag_or_none, float_tensor, integer, number, present
from fastsd.config import ModelConfig
from fastsd.errors import ParameterError, PromptError
from fastsd.images import MAX_PIXELS, OUTPUT_TYPES
from fastsd.noise import LARGEST_SEED, RNGS, NoiseSource, Variation, random_seed
from fastsd.ops import Wrap
from fastsd.prompt_chunks import STYLES
from fastsd.prompt_syntax import parse
from fastsd.seamless import WRAPS, check_tiling
from fastsd.tokenizer import check_prompt
from fastsd.wording import quoted

MAX_IMAGES = 256

StepCallback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Request:
    """A checked call of `generate`. B images = prompts × num_images_per_prompt, the images of a prompt side by side."""

    prompts: list[str] | None  # P of them; None where embeddings were given
    negative_prompts: list[str] | None
    prompt_embeds: Tensor | None  # [P, L, C]
    negative_prompt_embeds: Tensor | None
    prompt_style: str
    images_per_prompt: int
    height: int  # pixels
    width: int
    steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float | None
    clip_skip: int
    seeds: list[int] | None  # B of them; None where the caller's generator draws
    noise: NoiseSource
    step_noise: str
    latents: Tensor | None  # [B, C, H, W] unit Gaussian
    output_type: str
    vae_tiling: bool | None
    tiling: bool | str
    warnings: list[str]

    @property
    def guided(self) -> bool:
        """Whether the UNet runs on (unconditional, conditional) pairs: above guidance 1, as in diffusers."""
        return self.guidance_scale > 1.0

    @property
    def wrap(self) -> Wrap:
        """Whether left and right edges, top and bottom ones shall meet."""
        return WRAPS[self.tiling]

    @property
    def batch(self) -> int:
        count = len(self.prompts) if self.prompts is not None else len(present(self.prompt_embeds))
        return count * self.images_per_prompt


def check_request(
    config: ModelConfig,
    *,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    prompt_style: Any,
    num_images_per_prompt: int,
    height: int | None,
    width: int | None,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_rescale: float,
    eta: float | None,
    clip_skip: int | None,
    seed: Any,
    generator: Any,
    latents: Tensor | None,
    output_type: str,
    vae_tiling: bool | None,
    callback_on_step_end: Any,
    variation_seed: Any = None,
    variation_strength: float = 0.0,
    rng: Any = "cpu",
    step_noise: Any = "independent",
    tiling: Any = False,
    padding_mask_crop: int | None = None,
) -> Request:
    """The arguments of `Pipeline.generate` as a Request; ParameterError or PromptError names what is wrong and its range."""
    unit = config.vae.downscale
    style = choice("prompt_style", prompt_style, tuple(STYLES))
    count, prompts, negatives = _prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, style, config)
    images = integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    batch = count * images
    if batch > MAX_IMAGES:
        raise ParameterError(
            f"num_images_per_prompt: {count} prompts × {images} = {batch} images; at most {MAX_IMAGES}"
        )
    rows, columns = check_size(config, height, width)
    guidance = number("guidance_scale", guidance_scale, -1e4, 1e4)
    warnings = []
    if guidance <= 1.0 and (any(negatives or ()) or negative_prompt_embeds is not None):
        warnings.append(f"negative_prompt has no effect at guidance_scale {guidance:g}: it needs more than 1")
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise ParameterError(f"callback_on_step_end: must be a function, not {quoted(callback_on_step_end)}")
    if latents is not None:
        shape = (batch, config.vae.latent_channels, rows // unit, columns // unit)
        float_tensor("latents", latents, shape, "images, channels, height, width")
    if check_tiling(tiling) and padding_mask_crop is not None:
        raise ParameterError("tiling: the edges of a part do not meet; leave padding_mask_crop out")
    variation = number("variation_strength", variation_strength, 0.0, 1.0)
    seeds, noise = _seeds(seed, generator, batch, variation_seed, variation, choice("rng", rng, RNGS))
    if choice("step_noise", step_noise, STEP_NOISES) == "brownian" and seeds is None:
        raise ParameterError("step_noise: a Brownian path has a seed; give seed instead of generator")
    return Request(
        prompts=prompts,
        negative_prompts=negatives,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        prompt_style=style,
        images_per_prompt=images,
        height=rows,
        width=columns,
        steps=integer("num_inference_steps", num_inference_steps, 1, None),
        guidance_scale=guidance,
        guidance_rescale=number("guidance_rescale", guidance_rescale, 0.0, 1.0),
        eta=None if eta is None else number("eta", eta, 0.0, 1.0),
        clip_skip=_clip_skip(clip_skip, config),
        seeds=seeds,
        noise=noise,
        step_noise=step_noise,
        latents=latents,
        output_type=choice("output_type", output_type, OUTPUT_TYPES),
        vae_tiling=flag_or_none("vae_tiling", vae_tiling),
        tiling=tiling,
        warnings=warnings,
    )


def check_texts(config: ModelConfig, prompt: Any, prompt_style: Any, clip_skip: Any) -> tuple[list[str], str, int]:
    """The arguments of `Pipeline.encode_prompt`: prompts, their style, how many layers to leave out."""
    style = choice("prompt_style", prompt_style, tuple(STYLES))
    return _strings("prompt", prompt, style), style, _clip_skip(clip_skip, config)


def _clip_skip(value: Any, config: ModelConfig) -> int:
    return integer("clip_skip", 0 if value is None else value, 0, config.text_encoder.num_hidden_layers - 1)


def check_size(config: ModelConfig, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default what the model was trained at; ParameterError for what cannot be drawn."""
    unit = config.vae.downscale
    default = config.unet.sample_size * unit
    rows, columns = _size("height", height, default, unit), _size("width", width, default, unit)
    if rows * columns > MAX_PIXELS:
        raise ParameterError(f"height, width: {columns}x{rows} is over the budget of {MAX_PIXELS} pixels; ask for less")
    return rows, columns


def _size(name: str, value: int | None, default: int, multiple: int) -> int:
    pixels = default if value is None else integer(name, value, multiple, None)
    if pixels % multiple:
        near = max(multiple, round(pixels / multiple) * multiple)
        raise ParameterError(f"{name}: {pixels} is not a multiple of {multiple}; the nearest is {near}")
    return pixels


def _prompts(
    prompt: Any,
    negative: Any,
    embeds: Tensor | None,
    negative_embeds: Tensor | None,
    style: str,
    config: ModelConfig,
) -> tuple[int, list[str] | None, list[str] | None]:
    """How many prompts, the prompts, and as many negative prompts; None for those given as embeddings."""
    if (prompt is None) == (embeds is None):
        raise PromptError("prompt: give either prompt or prompt_embeds, and not both")
    if negative is not None and negative_embeds is not None:
        raise PromptError("negative_prompt: give either negative_prompt or negative_prompt_embeds, not both")
    width = config.unet.cross_attention_dim
    prompts = None if prompt is None else _strings("prompt", prompt, style)
    count = len(prompts) if prompts is not None else len(_embeds("prompt_embeds", embeds, width))
    if negative_embeds is not None:
        _embeds("negative_prompt_embeds", negative_embeds, width)
        if embeds is not None and negative_embeds.shape != embeds.shape:
            found, wanted = list(negative_embeds.shape), list(embeds.shape)
            raise PromptError(f"negative_prompt_embeds: shape {found} differs from prompt_embeds' {wanted}")
        if len(negative_embeds) != count:
            raise PromptError(f"negative_prompt_embeds: {len(negative_embeds)} rows for {count} prompts")
        return count, prompts, None
    negatives = _strings("negative_prompt", negative or "", style)
    if len(negatives) == 1 and not isinstance(negative, list | tuple):
        negatives *= count
    if len(negatives) != count:
        raise PromptError(f"negative_prompt: {len(negatives)} given for {count} prompts; give one, or one a prompt")
    return count, prompts, negatives


def _strings(name: str, value: Any, style: str) -> list[str]:
    if isinstance(value, str):
        return [_string(name, value, style)]
    if not isinstance(value, list | tuple) or not value:
        raise PromptError(f"{name}: must be a string or a non-empty list of strings, not {quoted(value)}")
    return [_string(f"{name}[{index}]", one, style) for index, one in enumerate(value)]


def _string(name: str, value: Any, style: str) -> str:
    text = check_prompt(name, value)
    if style == "a1111":
        parse(text, name)  # refuses weights that no chunk may have
    return text


def _embeds(name: str, embeds: Any, width: int) -> Tensor:
    try:
        return float_tensor(name, embeds, (None, None, width), "prompts, tokens, width")
    except ParameterError as error:
        raise PromptError(str(error)) from error


def _seeds(
    seed: Any, generator: Any, batch: int, variation_seed: Any, strength: float, rng: str
) -> tuple[list[int] | None, NoiseSource]:
    if variation_seed is not None and not strength:
        raise ParameterError("variation_seed: has no effect at variation_strength 0; give a strength above it")
    if generator is not None:
        if strength:
            raise ParameterError("variation_strength: varies the noise of a seed; give seed instead of generator")
        if seed is not None:
            raise ParameterError("seed: give either seed or generator, not both")
        if rng != "cpu":
            raise ParameterError("rng: says what a seed stands for; give seed instead of generator")
        if isinstance(generator, torch.Generator):
            return None, NoiseSource(generator, batch)
        if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
            raise ParameterError(f"generator: must be a torch.Generator or a list of them, not {quoted(generator)}")
        if len(generator) != batch:
            raise ParameterError(f"generator: a list of {len(generator)} for {batch} images; give one an image")
        return None, NoiseSource(generator, batch)
    if not strength:
        seeds = check_seeds(seed, batch)
        return seeds, NoiseSource.from_seeds(seeds, rng=rng)
    # As in the web UI: all images are variations of one, unless the caller lists their seeds.
    seeds = check_seeds(seed, batch) if isinstance(seed, list | tuple) else [_seed(seed)] * batch
    others = check_seeds(variation_seed, batch, "variation_seed")
    return seeds, NoiseSource.from_seeds(seeds, Variation(others, strength), rng)


def check_seeds(seed: Any, batch: int, name: str = "seed") -> list[int]:
    """One seed an image: those given, or seed, seed + 1, …; None or −1 is a random one. Each in [0, 2⁶⁴)."""
    if isinstance(seed, list | tuple):
        if len(seed) != batch:
            raise ParameterError(f"{name}: a list of {len(seed)} for {batch} images; give one an image, or one number")
        return [_seed(one, name) for one in seed]
    first = _seed(seed, name)
    return [(first + index) % (LARGEST_SEED + 1) for index in range(batch)]


def _seed(value: Any, name: str = "seed") -> int:
    value = -1 if value is None else integer(name, value, -1, LARGEST_SEED)
    return random_seed() if value == -1 else value
