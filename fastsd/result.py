"""What `generate` gives back."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fastsd.adapters import UsedLora
from fastsd.hires import UPSCALERS, Hires
from fastsd.image_source import Source
from fastsd.metadata import RNG_LABELS, file_name, format_parameters, hash_name
from fastsd.model_hash import ModelFile
from fastsd.prompt_tags import LoraTag, with_tags, without_tags
from fastsd.request import Request
from fastsd.sampling import SAMPLERS, Table
from fastsd.sampling.names import schedule_label


@dataclass(frozen=True)
class Result:
    """The images of one call and what is needed to make them again."""

    images: "list[Image.Image] | np.ndarray | Tensor"
    """As output_type asked: "pil" a list of B images; "np" [B, H, W, 3] and "pt" [B, 3, H, W], floats in [0, 1]; "latent"
    [B, C, H/8, W/8] fp32, as the UNet sees them and `Pipeline.decode_latents` takes them."""
    seeds: list[int] | None
    """One an image, each reproduces its image alone (beside the same latents, if any were given); None if the caller's
    generator drew."""
    timings: dict[str, float]
    """Milliseconds a stage: "text", "encode" (of an image), "unet", "hires" (a second pass), "vae", "total"."""
    parameters: list[str]
    """A1111's `parameters` text for each image, as `fastsd.metadata.save_image` writes it into a file."""
    warnings: list[str] = field(default_factory=list)
    """What a user should know: words that were cut off, a stage that was repeated in fp32."""
    degraded: list[str] = field(default_factory=list)
    """What was done otherwise than asked, for want of memory; among the warnings too."""


class MadeWith(NamedTuple):
    """What images are made with: the files, and whether the VAE ran in tiles."""

    model: ModelFile
    vae: ModelFile | None
    """In the place of the model's own."""
    loras: Sequence[UsedLora]
    words: Mapping[str, str]
    """Of textual inversions, those that the prompts may hold → their files' SHA-256."""
    vae_tiles: bool = False


def describe(
    request: Request, source: Source | None, hires: Hires | None, table: Table, made_with: MadeWith
) -> list[str]:
    """A1111's text for each image of a request. table: the whole walk's or its end; hires: the second pass, if there is one.

    As there, a prompt names the LoRAs; but one that is weighed by block has a hash alone: no tag can say its weights.
    """
    loras = _by_name(made_with.loras)
    default = SAMPLERS[table.sampler].default_eta
    per_prompt, variation = request.images_per_prompt, request.noise.variation
    same: dict[str, Any] = {
        "steps": len(table) if table.schedule == "custom" and source is None else request.steps,
        "sampler": SAMPLERS[table.sampler].label,
        "schedule_type": schedule_label(table.schedule),
        "cfg_scale": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "model": file_name(made_with.model.stem),
        "model_hash": made_with.model.hash(),
        "vae": made_with.vae and file_name(made_with.vae.name),
        "vae_hash": made_with.vae and made_with.vae.hash(),
        "vae_tiling": made_with.vae_tiles or None,
        "lora_hashes": _hashes((lora.name, lora.sha256) for lora in loras),
        "clip_skip": request.clip_skip + 1 if request.prompts else None,  # A1111 counts the last layer as 1
        "eta": None if default is None or request.eta == default else request.eta,
        "guidance_rescale": request.guidance_rescale or None,
        "tiling": request.tiling or None,
        "variation_strength": variation and variation.strength,
        "rng": RNG_LABELS[request.noise.rng] if request.seeds else None,
        "step_noise": "Brownian" if request.step_noise == "brownian" and SAMPLERS[table.sampler].brownian else None,
    }
    if source is not None:
        same |= {
            "denoising_strength": source.strength,
            "mask_blur": source.mask_blur or None,
            "padding": source.padding,
        }
    if hires is not None:
        same |= {"denoising_strength": hires.strength, "hires_scale": hires.scale, "hires_steps": hires.steps}
        same["hires_upscaler"] = UPSCALERS[hires.upscaler]
    # The web UI's word for brackets that are letters; without any it makes no difference.
    written = "\n".join((*(request.prompts or ()), *(request.negative_prompts or ())))
    if request.prompt_style == "plain" and re.search(r"[()\[\]\\]|BREAK", written):
        same["emphasis"] = "None"
    said = written.lower()
    same["ti_hashes"] = _hashes((word, sha256) for word, sha256 in made_with.words.items() if word.lower() in said)
    tags = [LoraTag(one.name, one.text_encoder, one.unet) for one in loras if one.unet is not None]
    texts = []
    for index in range(request.batch):
        prompt = request.prompts[index // per_prompt] if request.prompts else ""
        unsaid = {
            "embeddings in the place of a prompt": request.prompts is None,
            "latents of its own": request.latents is not None,
            "tags that were encoded as words": bool(loras) and without_tags(prompt) != prompt,
        }
        own = {
            "prompt": with_tags(prompt, tags),
            "made_with": " and ".join(what for what, holds in unsaid.items() if holds),
            "negative_prompt": request.negative_prompts[index // per_prompt] if request.negative_prompts else "",
            "seed": request.seeds[index] if request.seeds else None,
            "variation_seed": variation and variation.seeds[index],
        }
        texts.append(format_parameters({key: value for key, value in (own | same).items() if value is not None}))
    return texts


def _by_name(loras: Iterable[UsedLora]) -> list[UsedLora]:
    """One a file, with the sum of its weights, and under a name of its own: a second file of a name has a number behind it."""
    files: dict[tuple[str, str], UsedLora] = {}
    for lora in loras:
        name = file_name(lora.name)
        before = files.get((name, lora.sha256), UsedLora(name, lora.sha256, 0.0, 0.0))
        unet = None if lora.unet is None or before.unet is None else before.unet + lora.unet
        files[name, lora.sha256] = UsedLora(name, lora.sha256, before.text_encoder + lora.text_encoder, unet)
    named: dict[str, UsedLora] = {}
    for lora in files.values():
        names = (f"{lora.name}-{number}" if number else lora.name for number in (0, *range(2, len(files) + 2)))
        name = next(name for name in names if hash_name(name) not in named)
        named[hash_name(name)] = lora._replace(name=name)
    return list(named.values())


def _hashes(files: Iterable[tuple[str, str]]) -> str:
    """ "name: hash, name: hash", of each the first 12 digits; a name loses what would part it."""
    return ", ".join(f"{hash_name(name)}: {sha256[:12]}" for name, sha256 in files)
