"""Images in and out: files, PIL images and arrays ↔ tensors [B, H, W, 3] in [−1, 1]."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastsd.checks import FLOATS, integer
from fastsd.errors import ImageError

MAX_PIXELS = 4096 * 4096
FORMATS = ("PNG", "JPEG", "WEBP")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def load_image(path: str | Path) -> Image.Image:
    """Read a PNG, JPEG or WebP file as RGB: upright (EXIF orientation applied), alpha laid on white.

    Raises ImageError for anything else, for a damaged file, and above 16.8 megapixels (judged by the header, before
    the pixels are decoded).
    """
    return _load(path, to_rgb)


def load_grey(path: str | Path) -> Image.Image:
    """The same for a mask: upright grey of 8 bits; transparency is not looked at."""
    return _load(path, to_grey)


def _load(path: str | Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image.size, name)
            image.load()
            return convert(image)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a PNG, JPEG or WebP image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: cannot be read as an image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF orientation applied, palette, CMYK, grey and 16-bit converted, transparency laid on white."""
    image = _upright(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """Upright 8-bit grey, as a mask is read: colours by their luminance, transparency not looked at."""
    return _upright(image).convert("L")


def _upright(image: Image.Image) -> Image.Image:
    """EXIF orientation applied, 16-bit grey scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image, dtype=np.float64)  # PIL's own conversion to 8 bits clips instead of scaling
    return Image.fromarray(np.clip(np.round(levels / 257.0), 0, 255).astype(np.uint8))


def extend(
    image: str | Path | Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Outpainting: the image on a canvas that is so many pixels larger on each side, and the mask of what is new.

    The image's outermost pixels run on to the canvas' edge, for a strength below 1 to begin from. Both go into
    `Pipeline.generate(image=…, mask_image=…)`. Raises ImageError for the image, or a canvas over the budget of pixels,
    ParameterError for the numbers.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    left, right, top, bottom = (integer(name, value, 0, MAX_PIXELS) for name, value in sides.items())
    picture = load_image(image) if isinstance(image, str | Path) else to_rgb(image)
    _check_size((picture.width + left + right, picture.height + top + bottom), "the extended canvas")
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros((picture.height, picture.width), np.uint8), around, constant_values=255)
    return Image.fromarray(np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")), Image.fromarray(mask)


def to_tensor(image: Any, multiple: int) -> Tensor:
    """One image or several → fp32 [B, H, W, 3] in [−1, 1].

    image: a path, a PIL image, a list of either; an array [H, W, 3] or [B, H, W, 3] of uint8, or of floats in [0, 1]; a
    tensor [3, H, W] or [B, 3, H, W] of floats in [−1, 1], as diffusers takes it. Height and width must be multiples of
    `multiple`. Raises ImageError for anything else.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ImageError("image: the list is empty; give at least one image")
        tensors = [to_tensor(one, multiple) for one in image]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            raise ImageError("image: all images of a list must have the same size")
        return torch.cat(tensors)
    if isinstance(image, str | Path):
        image = load_image(image)
    if isinstance(image, Image.Image):
        _check_size(image.size, "image")
        image = np.asarray(to_rgb(image))
    x = _from_tensor(image) if isinstance(image, Tensor) else _from_array(image)
    _check_size((x.shape[2], x.shape[1]), "image")
    if x.shape[1] % multiple or x.shape[2] % multiple:
        raise ImageError(
            f"image: {x.shape[2]}x{x.shape[1]} pixels; width and height must be multiples of {multiple}: resize or crop it"
        )
    if not torch.isfinite(x).all() or x.abs().max() > 1.5:  # a little beyond the range is a decoder's overshoot
        raise ImageError(
            "image: values out of range; tensors lie in [-1, 1], float arrays in [0, 1], uint8 in 0 to 255"
        )
    return x


def from_tensor(x: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """[B, H, W, 3] in [−1, 1] → what output_type names: PIL images; "np" [B, H, W, 3] or "pt" [B, 3, H, W] in [0, 1]."""
    if output_type == "pil":
        return to_pil(x)
    x = _unit(x)
    return x.permute(0, 3, 1, 2).contiguous() if output_type == "pt" else x.cpu().numpy()


def to_pil(x: Tensor) -> list[Image.Image]:
    """[B, H, W, 3] in [−1, 1] → images of 8 bits."""
    return [Image.fromarray(one) for one in (_unit(x).cpu().numpy() * 255.0).round().astype(np.uint8)]


def _unit(x: Tensor) -> Tensor:
    return (x.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def _from_tensor(image: Tensor) -> Tensor:
    x = image if image.ndim == 4 else image[None]
    dense = x.dtype in FLOATS and x.layout == torch.strided and x.device.type != "meta"
    if x.ndim != 4 or x.shape[1] != 3 or not len(x) or not dense:
        kind = f"{list(image.shape)} of {image.dtype}"
        raise ImageError(f"image: a tensor must be dense floats [3, H, W] or [B, 3, H, W], not {kind}")
    return x.detach().float().permute(0, 2, 3, 1).contiguous()


def _from_array(image: Any) -> Tensor:
    array = np.asarray(image)
    array = array if array.ndim == 4 else array[None]
    if array.ndim != 4 or array.shape[3] != 3 or not len(array) or array.dtype.kind not in "uf":
        raise ImageError(
            f"image: give a path, a PIL image, or an array [H, W, 3] of uint8 or of floats in [0, 1], not {type(image).__name__}"
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise ImageError(f"image: integer arrays must be uint8, not {array.dtype}")
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) / scale
    return x * 2.0 - 1.0


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width}x{height} pixels; fastsd takes 1 to {MAX_PIXELS} pixels")
