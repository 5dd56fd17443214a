"""What is measured: the bundled model drawing a picture, and one step of SD 1.5's UNet; each by fastsd and by diffusers.

Both sides of a workload share weights, inputs, dtype and threads. `run()` gives an array that the parity check compares.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import fastsd
from fastsd.backends import onednn_ops
from fastsd.config import SD15
from fastsd.models.unet import UNet
from fastsd.ops import REFERENCE
from fastsd.pipeline import BUNDLED
from tests.tolerances import IMAGE_PSNR, NET, UNET_STEP

PROMPT = "a large red circle in the center on a white background"


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One row of the table."""

    name: str
    contenders: dict[str, Callable[[], Contender]]  # made when needed: alone, when memory is measured
    gate: Callable[[np.ndarray, np.ndarray], str | None]  # (fastsd's, diffusers') → what breaches parity


def bundled_picture(steps: int = 20) -> Workload:
    """A 64×64 picture by the trained model, guidance on, from the prompt to the pixels."""
    arguments: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}

    def ours(backend: str) -> Contender:
        pipe = fastsd.Pipeline(device="cpu", dtype="float32", backend=backend)
        return Contender(
            f"fastsd {pipe.ops.name}", lambda: np.asarray(pipe.generate(PROMPT, seed=0, **arguments).images)
        )

    def theirs(memory_format: torch.memory_format) -> Contender:
        diffusers = import_diffusers()
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            BUNDLED, torch_dtype=torch.float32, safety_checker=None
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=memory_format)
        pipe.vae.to(memory_format=memory_format)
        return Contender(
            _diffusers_name(memory_format),
            lambda: pipe(PROMPT, generator=[torch.Generator().manual_seed(0)], **arguments).images,
        )

    contenders = {"fastsd": lambda: ours("auto"), "fastsd reference": lambda: ours("reference")}
    return Workload(f"bundled model, {steps} steps, fp32", contenders | _both(theirs), picture_gate)


def sd15_unet_step(dtype: torch.dtype, pixels: int = 256) -> Workload:
    """One step of the 860M-parameter UNet on a guided batch (2), random weights, latents of pixels/8."""
    label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    weights = Weights(dtype)
    x = torch.randn(2, 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    context = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(2)).to(dtype)
    timestep = torch.tensor([500.0])

    @torch.no_grad()
    def ours(name: str) -> Contender:
        ops = onednn_ops() if name == "onednn" else REFERENCE
        with torch.device("meta"):
            unet = UNet(SD15.unet, ops)
        unet.load_state_dict(weights.of(torch.channels_last), assign=True)
        unet.requires_grad_(False)
        image = x.permute(0, 2, 3, 1).contiguous()
        keys, time = unet.project_context(context), unet.project_time(timestep).expand(2, -1)
        return Contender(f"fastsd {name}", lambda: unet(image, time, keys).permute(0, 3, 1, 2).float().numpy())

    def theirs(memory_format: torch.memory_format) -> Contender:
        diffusers = import_diffusers()
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        unet.load_state_dict(weights.of(memory_format), assign=True)
        return Contender(_diffusers_name(memory_format), lambda: unet(x, timestep, context).sample.float().numpy())

    contenders = {"fastsd": lambda: ours("onednn"), "fastsd reference": lambda: ours("reference")}
    name = f"SD 1.5 UNet, batch 2, {pixels}x{pixels}, {label}"
    return Workload(name, contenders | _both(theirs), lambda a, b: step_gate(a, b, dtype))


class Weights:
    """Random weights of SD 1.5's UNet that keep activations near unit size; those in one memory layout are held once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._made: dict[torch.memory_format, dict[str, torch.Tensor]] = {}

    def of(self, memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
        if memory_format not in self._made:
            generator = torch.Generator().manual_seed(0)
            with torch.device("meta"):
                shapes = UNet(SD15.unet).state_dict()
            self._made[memory_format] = {
                name: self._draw(name, shape.shape, generator).contiguous(
                    memory_format=memory_format if shape.ndim == 4 else torch.contiguous_format
                )
                for name, shape in shapes.items()
            }
        return self._made[memory_format]

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        bound = 0.1 if len(shape) == 1 else (3.0 / shape[1:].numel()) ** 0.5
        weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return (weight + float("norm" in name and name.endswith("weight"))).to(self.dtype)


def import_diffusers() -> Any:
    """diffusers without its bars and notices."""
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of pictures in [0, 1], in dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10.0 * float(np.log10(error))


def picture_gate(ours: np.ndarray, theirs: np.ndarray) -> str | None:
    """What is asked of fp32 pictures."""
    quality = psnr(ours, theirs)
    return None if quality >= IMAGE_PSNR else f"PSNR {quality:.1f} dB, {IMAGE_PSNR:g} asked"


def step_gate(ours: np.ndarray, theirs: np.ndarray, dtype: torch.dtype) -> str | None:
    """fp32: the largest absolute error against the largest value. bf16: relative L2, the gate of a UNet step."""
    if dtype == torch.float32:
        error, gate = float(np.abs(ours - theirs).max() / np.abs(theirs).max()), NET
    else:
        error, gate = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)), UNET_STEP[dtype]
    return None if error <= gate else f"error {error:.1e}, {gate:.0e} allowed"


def _both(make: Callable[[torch.memory_format], Contender]) -> dict[str, Callable[[], Contender]]:
    """diffusers in both layouts, so that it is judged by its better one."""
    return {
        "diffusers": lambda: make(torch.contiguous_format),
        "diffusers channels_last": lambda: make(torch.channels_last),
    }


def _diffusers_name(memory_format: torch.memory_format) -> str:
    return "diffusers channels_last" if memory_format == torch.channels_last else "diffusers"
