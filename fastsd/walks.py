"""Requests on their way from noise to latents: what a walk is given, and the buffers in which walks go side by side.

A step reads all that differs between samplers, step counts, prompts, guidance and seeds from its buffers: each image's own row
of its own table, at a counter that lies on the device too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.models.unet import KeyValue
from fastsd.noise import NoiseSource
from fastsd.ops import Wrap
from fastsd.sampling import Table

SLOTS = 5
"""Latents of the longest state (PLMS, LMS and UniPC keep 4), and one to spare. A table of fewer is filled up with zeros."""


class Kept(NamedTuple):
    """What a walk keeps of an image while it paints the rest."""

    mask: Tensor
    """[B, H, W, 1] fp32: 1 where the walk paints, 0 where the image stays."""
    image: Tensor
    """[B, H, W, C] fp32 latents."""
    noise: Tensor
    """[B, H, W, C] fp32, what the image is noised with, the same at every level."""
    levels: Tensor
    """[n+1, 2] fp32: (image's share, noise's share) in the latents before each step and after the last, (1, 0)."""


class Walk(NamedTuple):
    """One request, ready for the loop. B images; U = B rows of the UNet, or with guidance 2B: unconditional, conditional."""

    keys: Sequence[KeyValue]
    """Each cross-attention's (k, v), [U, L, N, D]."""
    time_bias: Tensor
    """[n, T] in the UNet's dtype: a row a step."""
    table: Table
    guidance: float
    rescale: float
    noise: NoiseSource
    latents: Tensor
    """[B, H, W, C] fp32, what the table's initial scale makes the first state of: unit noise, if it is a whole walk."""
    kept: Kept | None = None
    condition: Tensor | None = None
    """[B, H, W, E], what an inpainting UNet sees beside the latents: the mask and the latents of what is outside it."""
    wrap: Wrap = (False, False)
    """Whether left and right edges, top and bottom ones meet."""

    @property
    def copies(self) -> int:
        """U / B: 2 with guidance, else 1."""
        return len(self.keys[0][0]) // len(self.latents)


class Span(NamedTuple):
    """Rows begin to end of the tables of walks that are all at the same step, side by side in one batch."""

    walks: Sequence[Walk]
    states: Sequence[Tensor | None]
    """Each walk's [SLOTS, b, H, W, C] before row begin; None: it begins."""
    begin: int
    end: int

    @property
    def batch(self) -> int:
        return sum(len(walk.latents) for walk in self.walks)

    @property
    def copies(self) -> int:
        return self.walks[0].copies

    @property
    def images(self) -> list[slice]:
        """Each walk's place in the batch."""
        ends = accumulate(len(walk.latents) for walk in self.walks)
        return [slice(end - len(walk.latents), end) for walk, end in zip(self.walks, ends, strict=True)]

    @property
    def rescales(self) -> bool:
        return any(walk.rescale > 0 for walk in self.walks)

    @property
    def keeps(self) -> bool:
        return any(walk.kept is not None for walk in self.walks)

    @property
    def rows(self) -> int:
        """Time projections that are needed: walks of the same schedule share them."""
        return len({id(walk.time_bias) for walk in self.walks}) * (self.end - self.begin)


@dataclass
class Buffers:
    """What a step reads and writes, always at the same addresses."""

    state: Tensor
    """[SLOTS, B, H, W, C] fp32"""
    noise: Tensor
    """[B, H, W, C] fp32, fresh before each step that adds some, else finite"""
    keys: list[KeyValue]
    time_bias: Tensor
    """[rows, T]"""
    time_rows: Tensor
    """[rows, B] int32: which of them an image's step takes"""
    model_input: Tensor
    """[rows, B, SLOTS] fp32: what the UNet sees of the state"""
    update: Tensor
    """[rows, B, SLOTS, SLOTS+2] fp32"""
    guidance: Tensor
    """[B] fp32"""
    rescale: Tensor | None
    """[B] fp32"""
    counter: Tensor
    """[2 + B] int32: see `StepRow.counter`"""
    kept: Kept | None
    """Its levels [rows + 1, B, 2]."""
    condition: Tensor | None
    """[U, H, W, E] in the UNet's dtype"""

    @classmethod
    def allocate(cls, span: Span, rows: int) -> "Buffers":
        """For spans of this shape, of up to so many steps and time projections; all zeros."""
        walk, batch = span.walks[0], span.batch
        latents, time_bias = walk.latents.shape[1:], walk.time_bias

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=walk.latents.device)

        def like(x: Tensor) -> Tensor:
            return zeros(span.copies * batch, *x.shape[1:], dtype=x.dtype)

        return cls(
            state=zeros(SLOTS, batch, *latents),
            noise=zeros(batch, *latents),
            keys=[(like(k), like(v)) for k, v in walk.keys],
            time_bias=zeros(rows, time_bias.shape[1], dtype=time_bias.dtype),
            time_rows=zeros(rows, batch, dtype=torch.int32),
            model_input=zeros(rows, batch, SLOTS),
            update=zeros(rows, batch, SLOTS, SLOTS + 2),
            guidance=zeros(batch),
            rescale=zeros(batch) if span.rescales else None,
            counter=zeros(2 + batch, dtype=torch.int32),
            kept=Kept(
                zeros(batch, *latents[:2], 1), zeros(batch, *latents), zeros(batch, *latents), zeros(rows + 1, batch, 2)
            )
            if span.keeps
            else None,
            condition=None if walk.condition is None else like(walk.condition.to(time_bias.dtype)),
        )

    def load(self, span: Span) -> None:
        """Begin a span: every buffer set, whatever the last one left."""
        steps, copies = span.end - span.begin, span.copies
        filled: dict[int, int] = {}
        """Where the time projections of each schedule begin."""
        self.state.zero_()
        self.noise.zero_()
        self.counter.zero_()
        self.counter[2:] = steps
        for walk, state, images in zip(span.walks, span.states, span.images, strict=True):
            model_input, update = _widened(walk.table, span.begin, span.end)
            self.model_input[:steps, images] = model_input.to(self.update)[:, None]
            self.update[:steps, images] = update.to(self.update)[:, None]
            first = filled.setdefault(id(walk.time_bias), len(filled) * steps)
            self.time_bias[first : first + steps].copy_(walk.time_bias[span.begin : span.end])
            self.time_rows[:steps, images] = torch.arange(first, first + steps).to(self.time_rows)[:, None]
            if state is None:
                self.state[0, images] = walk.latents * walk.table.initial_scale
            else:
                self.state[:, images] = state
            self.guidance[images] = walk.guidance
            if self.rescale is not None:
                self.rescale[images] = walk.rescale
            for mine, given in zip(self.keys, walk.keys, strict=True):
                for buffer, tensor in zip(mine, given, strict=True):
                    buffer.unflatten(0, (copies, -1))[:, images] = tensor.unflatten(0, (copies, -1))
            if self.kept is not None:
                self._keep(self.kept, walk.kept, images, span)
            if self.condition is not None and walk.condition is not None:
                self.condition.unflatten(0, (copies, -1))[:, images] = walk.condition.to(self.condition.dtype)

    @staticmethod
    def _keep(mine: Kept, given: Kept | None, images: slice, span: Span) -> None:
        """What a walk keeps; one that paints everywhere keeps nothing."""
        if given is None:
            mine.mask[images] = 1.0
            mine.image[images] = mine.noise[images] = mine.levels[:, images] = 0.0
            return
        for buffer, tensor in zip(mine[:3], given[:3], strict=True):
            buffer[images] = tensor
        mine.levels[: span.end - span.begin + 1, images] = given.levels[span.begin : span.end + 1, None]


def _widened(table: Table, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Rows of a table for SLOTS slots: model_input [n, SLOTS] and update [n, SLOTS, SLOTS+2]."""
    given_input, given_update = (
        torch.from_numpy(table.model_input[begin:end]),
        torch.from_numpy(table.update[begin:end]),
    )
    n, slots = given_input.shape
    model_input, update = given_input.new_zeros(n, SLOTS), given_input.new_zeros(n, SLOTS, SLOTS + 2)
    model_input[:, :slots] = given_input
    update[:, :slots, :slots] = given_update[:, :, :slots]
    update[:, :slots, SLOTS:] = given_update[:, :, slots:]
    return model_input, update
