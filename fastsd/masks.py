"""Masks of inpainting: white is painted, black is kept. Reading them, and the part of a picture that is painted alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from fastsd.checks import FLOATS
from fastsd.errors import ImageError
from fastsd.images import load_grey, to_grey

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom lie outside."""


def read_masks(mask: Any, size: tuple[int, int]) -> list[Image.Image]:
    """One mask or several → grey images of 8 bits, of the pictures' size (width, height).

    mask: a path, a PIL image (colours become grey, transparency is not looked at), a list of either; an array [H, W],
    [B, H, W] or [B, H, W, 1] or a tensor [H, W], [B, H, W] or [B, 1, H, W], of booleans, of uint8 or of floats in [0, 1].
    Raises ImageError for anything else.
    """
    if isinstance(mask, list | tuple):
        if not mask:
            raise ImageError("mask_image: the list is empty; give at least one mask")
        return [one for each in mask for one in read_masks(each, size)]
    if isinstance(mask, str | Path):
        mask = load_grey(mask)
    masks = [to_grey(mask)] if isinstance(mask, Image.Image) else _from_array(mask)
    for one in masks:
        if one.size != size:
            found, wanted = ("x".join(map(str, sides)) for sides in (one.size, size))
            raise ImageError(f"mask_image: {found} pixels, but the image has {wanted}; resize the mask")
    return masks


def to_tensor(masks: list[Image.Image]) -> Tensor:
    """Grey images of one size → fp32 [B, H, W, 1] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(mask, dtype=np.float32) / 255.0 for mask in masks]))[..., None]


def to_latent(mask: Tensor, unit: int) -> Tensor:
    """[B, H, W, 1] in [0, 1] → [B, H/unit, W/unit, 1], 0 or 1: each latent's upper left pixel, as in diffusers."""
    return (mask[:, ::unit, ::unit] >= 0.5).float()


def blurred(mask: Image.Image, radius: float) -> Image.Image:
    """radius: the Gaussian's standard deviation in pixels."""
    return mask.filter(ImageFilter.GaussianBlur(radius)) if radius else mask


def crop_region(mask: Image.Image, width: int, height: int, padding: int) -> Box:
    """What of a picture to paint alone: all that is not black, `padding` pixels more on each side, and what gives it the
    proportions of width × height as far as the picture reaches.

    Raises ImageError for a mask that is all black.
    """
    found = mask.getbbox()
    if found is None:
        raise ImageError("mask_image: it is all black, so there is nothing to paint; make white what is to be painted")
    left, top = (max(side - padding, 0) for side in found[:2])
    right, bottom = (min(side + padding, most) for side, most in zip(found[2:], mask.size, strict=True))
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _stretched(top, bottom, (right - left) * height / width, mask.height)
    else:
        left, right = _stretched(left, right, (bottom - top) * width / height, mask.width)
    return left, top, right, bottom


def fit_inside(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole image, enlarged or reduced to fit into width × height, in the middle; its outermost pixels fill the rest."""
    wide = width / height >= image.width / image.height
    inner = (image.width * height // image.height, height) if wide else (width, image.height * width // image.width)
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    pixels = np.asarray(image.resize(inner, Image.Resampling.LANCZOS))
    around = ((top, height - inner[1] - top), (left, width - inner[0] - left), (0, 0))
    return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))


def cut_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    """The other way: the image enlarged or reduced to cover width × height, what juts out cut off."""
    wide = width / height > image.width / image.height
    outer = (width, image.height * width // image.width) if wide else (image.width * height // image.height, height)
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return image.resize(outer, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))


def paste(painted: Image.Image, picture: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """The picture with its part `box` painted over as far as the mask is white; where it is black not a bit changes."""
    left, top, right, bottom = box
    layer = picture.copy()
    layer.paste(cut_middle(painted, right - left, bottom - top), (left, top))
    return Image.composite(layer, picture, mask)


def _stretched(low: int, high: int, length: float, most: int) -> tuple[int, int]:
    """The span made about `length` long, evenly on both sides, moved and at last cut to lie in [0, most]."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high > most:
        low, high = low - (high - most), most
    return (0, min(high - low, most)) if low < 0 else (low, high)


def _from_array(mask: Any) -> list[Image.Image]:
    if isinstance(mask, Tensor):
        if mask.layout != torch.strided or mask.device.type == "meta" or mask.dtype not in (*FLOATS, *_WHOLE):
            raise ImageError(f"mask_image: a tensor must be dense floats, uint8 or booleans, not {mask.dtype}")
        mask = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()
    array = np.asarray(mask)
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.dtype.kind not in "ufb":
        raise ImageError(
            f"mask_image: give a path, a PIL image, or an array [H, W] or [B, H, W], not {type(mask).__name__}"
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise ImageError(f"mask_image: integer arrays must be uint8, not {array.dtype}")
    levels = array.astype(np.float64) * (1.0 if array.dtype == np.uint8 else 255.0)
    if not np.isfinite(levels).all() or levels.min() < 0.0 or levels.max() > 255.0:
        raise ImageError("mask_image: values out of range; floats lie in [0, 1], uint8 in 0 to 255")
    return [Image.fromarray(one) for one in levels.round().astype(np.uint8)]


_WHOLE = (torch.uint8, torch.bool)
