"""What `generate` gives back."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor


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
    """Milliseconds a stage: "text", "unet", "vae", "total"."""
    parameters: list[str]
    """A1111's `parameters` text for each image, as `fastsd.metadata.save_image` writes it into a file."""
    warnings: list[str] = field(default_factory=list)
    """What a user should know: words that were cut off, a stage that was repeated in fp32."""
