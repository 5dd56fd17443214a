"""The images that `generate` is given to begin from and to paint in, checked and read: arguments in, a frozen Source out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd import images, masks
from fastsd.checks import float_tensor, integer, number
from fastsd.config import ModelConfig
from fastsd.errors import ImageError, ParameterError
from fastsd.request import Request, check_size

IMG2IMG_STRENGTH, INPAINT_STRENGTH = 0.8, 1.0
"""diffusers' defaults."""
MAX_MASK_BLUR = 64


@dataclass(frozen=True)
class Source:
    """What a walk begins with, or keeps, of images. M of them: one, one a prompt, or one an image that is drawn."""

    pictures: Tensor
    """[M, H, W, 3] in [−1, 1], or [M, h, w, C] if they are latents."""
    latent: bool
    height: int
    """Pixels of what is drawn."""
    width: int
    strength: float
    mask: Tensor | None = None
    """[K, H, W, 1] in [0, 1], 1 where is painted: one, or one a picture."""
    mask_blur: float = 0.0
    paste_back: bool = False
    padding: int | None = None
    whole: tuple[Image.Image, Image.Image, masks.Box] | None = None
    """The picture and the mask that `pictures` and `mask` are a part of, and which part."""


def check_source(
    config: ModelConfig,
    *,
    image: Any,
    strength: float | None,
    mask_image: Any,
    mask_blur: float,
    padding_mask_crop: int | None,
    paste_back: bool,
    height: int | None,
    width: int | None,
    output_type: str,
) -> Source | None:
    """The arguments of `Pipeline.generate` as a Source, None without an image; ParameterError or ImageError for wrong ones."""
    of_mask = {"mask_blur": mask_blur or None, "padding_mask_crop": padding_mask_crop, "paste_back": paste_back or None}
    of_image = {"strength": strength, "mask_image": mask_image}
    _require(image, "image", of_image | of_mask)
    _require(mask_image, "mask_image", of_mask)
    if image is None:
        return None
    default = IMG2IMG_STRENGTH if mask_image is None else INPAINT_STRENGTH
    chosen = number("strength", default if strength is None else strength, 0.0, 1.0)
    blur = number("mask_blur", mask_blur, 0, MAX_MASK_BLUR)
    source: Source
    if padding_mask_crop is not None:
        padding = integer("padding_mask_crop", padding_mask_crop, 0, None)
        if output_type != "pil":
            raise ParameterError(
                f"output_type: {output_type} cannot be pasted into the picture; padding_mask_crop needs pil"
            )
        source = _part(config, image, mask_image, blur, padding, height, width, chosen)
    else:
        source = _whole(config, image, mask_image, blur, height, width, chosen)
    if source.latent and (paste_back or blur):
        raise ParameterError("paste_back: the image was given as latents, so there are no pixels; give a picture")
    if source.latent and mask_image is not None and inpaints(config):
        raise ParameterError("image: an inpainting checkpoint looks at the picture itself, not at latents; give that")
    return replace(source, mask_blur=blur, paste_back=bool(paste_back or blur))


def put_back(source: Source, painted: Tensor, output_type: str) -> "list[Image.Image] | np.ndarray | Tensor":
    """What was painted, [B, H, W, 3] in [−1, 1], as output_type asks; laid into the pictures where the call asked for that."""
    if source.whole is not None:
        return [masks.paste(part, *source.whole) for part in images.to_pil(painted)]
    if source.paste_back and source.mask is not None:
        pictures, mask = (spread(x, len(painted)).to(painted.device) for x in (source.pictures, source.mask))
        painted = torch.lerp(pictures, painted.clamp(-1.0, 1.0), mask)
    return images.from_tensor(painted, output_type)


def spread(x: Tensor, batch: int) -> Tensor:
    """[M, …] → [B, …], each as often as it takes, side by side."""
    return x.repeat_interleave(batch // len(x), 0)


def _require(needed: Any, name: str, given: dict[str, Any]) -> None:
    for other, value in given.items():
        if needed is None and value is not None:
            raise ParameterError(f"{other}: has no meaning without {name}; give one, or leave {other} out")


def check_count(source: Source, request: Request) -> None:
    """ParameterError unless there is one picture, one a prompt, or one an image that is drawn."""
    count, prompts = len(source.pictures), request.batch // request.images_per_prompt
    if count not in (1, prompts, request.batch):
        raise ParameterError(f"image: {count} images for {prompts} prompts; give one, or one a prompt")


def inpaints(config: ModelConfig) -> bool:
    """Whether the UNet sees the mask and the masked image beside the latents."""
    return config.unet.in_channels > config.vae.latent_channels


def _whole(
    config: ModelConfig, image: Any, mask: Any, blur: float, height: int | None, width: int | None, strength: float
) -> Source:
    unit = config.vae.downscale
    if is_latent(image, config):
        x = image if image.ndim == 4 else image[None]
        float_tensor("image", x, (None, config.vae.latent_channels, None, None), "images, channels, height, width")
        size = (x.shape[2] * unit, x.shape[3] * unit)
        if (height or size[0], width or size[1]) != size:
            raise ParameterError(f"image: latents for {size[1]}x{size[0]} pixels; leave height and width out")
        pictures, found = x.detach().float().permute(0, 2, 3, 1), (size[1], size[0])
    else:
        opened = _open(image)
        found = opened[0].size if isinstance(opened, list) else (opened.shape[2], opened.shape[1])
        size = check_size(config, height or max(found[1] // unit, 1) * unit, width or max(found[0] // unit, 1) * unit)
        pictures = resized(opened, *size)
    source = Source(pictures, is_latent(image, config), *size, strength)
    if mask is None:
        return source
    grey = [masks.blurred(one, blur) for one in masks.read_masks(mask, found)]
    if len(grey) not in (1, len(pictures)):
        raise ImageError(f"mask_image: {len(grey)} masks for {len(pictures)} images; give one, or one an image")
    return replace(source, mask=masks.to_tensor([_sized(one, *size) for one in grey]))


def _part(
    config: ModelConfig,
    image: Any,
    mask: Any,
    blur: float,
    padding: int,
    height: int | None,
    width: int | None,
    strength: float,
) -> Source:
    """Only what the mask covers, enlarged to the size that is drawn: by default the one the model was trained at."""
    opened = [] if is_latent(image, config) else _open(image)
    if not isinstance(opened, list) or len(opened) != 1:
        raise ParameterError("padding_mask_crop: takes one image, a path or a PIL image")
    rows, columns = check_size(config, height, width)
    grey = masks.read_masks(mask, opened[0].size)
    if len(grey) != 1:
        raise ParameterError("padding_mask_crop: takes one mask")
    smooth = masks.blurred(grey[0], blur)
    box = masks.crop_region(smooth, columns, rows, padding)
    picture, part = (masks.fit_inside(one.crop(box), columns, rows) for one in (opened[0], smooth))
    return Source(
        images.to_tensor(picture, 1),
        False,
        rows,
        columns,
        strength,
        mask=masks.to_tensor([part]),
        padding=padding,
        whole=(opened[0], smooth, box),
    )


def is_latent(image: Any, config: ModelConfig) -> bool:
    """Whether it is a tensor [C, H, W] or [B, C, H, W] of latents, as output_type="latent" gives it."""
    channels = config.vae.latent_channels
    return isinstance(image, Tensor) and image.ndim in (3, 4) and channels != 3 and image.shape[-3] == channels


def _open(image: Any) -> list[Image.Image] | Tensor:
    """Files and PIL images as PIL, all of one size; what else `images.to_tensor` takes as a tensor."""
    several = list(image) if isinstance(image, list | tuple) else [image]
    if not several or not all(isinstance(one, str | Path | Image.Image) for one in several):
        return images.to_tensor(image, 1)
    opened = [images.load_image(one) if isinstance(one, str | Path) else images.to_rgb(one) for one in several]
    if len({one.size for one in opened}) > 1:
        raise ImageError("image: all images of a list must have the same size")
    return opened


def _sized(image: Image.Image, height: int, width: int) -> Image.Image:
    size = (width, height)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def resized(opened: list[Image.Image] | Tensor, height: int, width: int) -> Tensor:
    """[M, height, width, 3] in [−1, 1]. Pictures are resized as diffusers does; tensors must have the size."""
    if isinstance(opened, list):
        return images.to_tensor([_sized(one, height, width) for one in opened], 1)
    if opened.shape[1:3] != (height, width):
        found = f"{opened.shape[2]}x{opened.shape[1]}"
        raise ImageError(f"image: {found} pixels for a picture of {width}x{height}; resize it, or give a PIL image")
    return opened
