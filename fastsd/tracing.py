"""A model's stages run on meta tensors: no weight is made and nothing is computed, so full-size models can be followed anywhere.

What is asked of the ops on the way is what a generation asks of them: `bench.shapes` writes it down, `fastsd.launches` plans it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache, partial
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsd.checks import integer
from fastsd.config import CLIPConfig, UNetConfig, VAEConfig
from fastsd.denoise import advance
from fastsd.errors import ParameterError
from fastsd.images import MAX_PIXELS
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vq import autoencoder
from fastsd.noise import NoiseSource
from fastsd.ops import REFERENCE, Ops, Wrap
from fastsd.sampling import NoiseSchedule, make_table
from fastsd.seamless import wrapped
from fastsd.walks import Buffers, Span, Walk

STAGES = ("text", "prompt", "schedule", "step", "decode", "encode")
"""CLIP; the UNet's keys and values of the prompts; its time projections; one step; latents → image; image → latents."""


class Nets(Protocol):
    """What a ModelConfig says of the nets."""

    @property
    def text_encoder(self) -> CLIPConfig: ...
    @property
    def unet(self) -> UNetConfig: ...
    @property
    def vae(self) -> VAEConfig: ...


LARGEST = isqrt(MAX_PIXELS)
"""Pixels of a side, if a square picture takes the whole budget."""


def side(nets: Nets, size: int | None) -> int:
    """Pixels of a square picture's side; None: what the model was trained at. ParameterError for what is no size of it."""
    unit = nets.vae.downscale
    pixels = nets.unet.sample_size * unit if size is None else integer("size", size, unit, LARGEST)
    if pixels % unit:
        raise ParameterError(f"size: {pixels} is not a multiple of {unit}")
    return pixels


def around(ops: Ops, name: str, call: Callable[..., Any]) -> Ops:
    """The ops under another name, each made by call(the op's name, the op, *arguments, **options)."""
    wrapped = {op.name: partial(call, op.name, getattr(ops, op.name)) for op in fields(Ops) if op.name != "name"}
    return Ops(name=name, **wrapped)


@cache
def signature(op: str) -> inspect.Signature:
    """Of an op, whatever computes it."""
    return inspect.signature(getattr(REFERENCE, op))


def replaced(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """The value with everything of a kind in it replaced; lists become tuples, named tuples stay themselves."""
    if isinstance(value, kind):
        return by(value)
    if not isinstance(value, tuple | list):
        return value
    items = [replaced(item, kind, by) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def run_stages(
    nets: Nets,
    ops: Callable[[str], Ops],
    dtype: torch.dtype,
    *,
    height: int,
    width: int,
    images: int,
    guided: bool,
    prompts: int,
    steps: Sequence[int],
    stages: Sequence[str] = STAGES,
    wrap: Wrap = (False, False),
) -> None:
    """Every stage once, each with its own ops: pictures of height × width pixels (multiples of the VAE's factor), so many
    different prompts, a schedule of each of `steps` lengths, and the UNet on `images` rows, or guided on twice as many.

    wrap: edges that meet, see `fastsd.seamless`.
    """
    plain, ops = ops, lambda stage: wrapped(plain(stage), wrap) if any(wrap) else plain(stage)
    rows, unit = (2 if guided else 1) * images, nets.vae.downscale
    latents = (images, height // unit, width // unit, nets.vae.latent_channels)

    def unet(stage: str) -> UNet:
        return UNet(nets.unet, ops(stage)).to(dtype)

    with torch.device("meta"), torch.no_grad():
        # 77 tokens are what the tokenizer pads to. A UNet may read another context than this text encoder's (SDXL's does).
        context = torch.empty(prompts, 77, nets.unet.cross_attention_dim, dtype=dtype)
        if "text" in stages:
            # One chunk at a time: see `fastsd.prompt_cache`.
            CLIPText(nets.text_encoder, ops("text")).to(dtype)(torch.zeros(1, 77, dtype=torch.int64))
        row = torch.zeros(rows, dtype=torch.int64)
        keys = [(k[row], v[row]) for k, v in unet("prompt").project_context(context)]
        times = [unet("schedule").project_time(torch.zeros(count)) for count in steps]
        if "step" in stages:
            condition = torch.empty(*latents[:3], nets.unet.in_channels - latents[3])
            buffers = _buffers(keys, times[-1], torch.empty(latents), condition if condition.shape[3] else None)
            advance(unet("step"), ops("step"), buffers, 2 if guided else 1)
        vae = partial(autoencoder, nets.vae)
        if "decode" in stages:
            vae(ops("decode")).to(dtype).decode(torch.empty(latents, dtype=dtype))
        if "encode" in stages:
            vae(ops("encode")).to(dtype).encode(torch.empty(images, height, width, nets.vae.in_channels, dtype=dtype))


def _buffers(
    keys: list[tuple[Tensor, Tensor]], time_bias: Tensor, latents: Tensor, condition: Tensor | None
) -> Buffers:
    """What a step of any walk of this shape reads and writes."""
    with torch.device("cpu"):
        table = make_table(NoiseSchedule.from_config({}), len(time_bias))
        noise = NoiseSource.from_seeds([0] * len(latents))
    walk = Walk(keys, time_bias, table, guidance=7.5, rescale=0.0, noise=noise, latents=latents, condition=condition)
    return Buffers.allocate(Span([walk], [None], 0, len(time_bias)), len(time_bias))
