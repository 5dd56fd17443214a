"""The loop of every sampler: noise → latents. Once a prompt, once a schedule; then n equal steps on fixed buffers.

A step reads all that differs between samplers, step counts, prompts, guidance and seeds from its buffers: the row of each table
at a counter that lies on the device too. So one captured step serves every one of them, and no host takes part in it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.graph import Graphs
from fastsd.models.unet import KeyValue, UNet
from fastsd.noise import NoiseSource
from fastsd.ops import Ops, StepRow
from fastsd.sampling import Table

SLOTS = 5
"""Latents of the longest state (PLMS, LMS and UniPC keep 4), and one to spare. A table of fewer is filled up with zeros."""
ROWS = 1024
"""Rows of a captured step's tables: more than a schedule of 1000 timesteps has. Longer ones run eagerly."""


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

    @property
    def guided(self) -> bool:
        return len(self.keys[0][0]) == 2 * len(self.latents)


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
    model_input: Tensor
    """[rows, SLOTS] fp32: what the UNet sees of the state"""
    update: Tensor
    """[rows, SLOTS, SLOTS+2] fp32"""
    guidance: Tensor
    """[B] fp32"""
    rescale: Tensor | None
    """[B] fp32"""
    counter: Tensor
    """[3] int32: see `StepRow.counter`"""
    kept: Kept | None
    """Its levels for rows + 1 steps."""
    condition: Tensor | None
    """[U, H, W, E] in the UNet's dtype"""

    @classmethod
    def allocate(cls, walk: Walk, rows: int) -> "Buffers":
        """For walks of this shape, of up to so many steps; all zeros."""
        x, time_bias = walk.latents, walk.time_bias
        batch = len(x)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=x.device)

        return cls(
            state=zeros(SLOTS, *x.shape),
            noise=torch.zeros_like(x),
            keys=[(torch.zeros_like(k), torch.zeros_like(v)) for k, v in walk.keys],
            time_bias=zeros(rows, time_bias.shape[1], dtype=time_bias.dtype),
            model_input=zeros(rows, SLOTS),
            update=zeros(rows, SLOTS, SLOTS + 2),
            guidance=zeros(batch),
            rescale=zeros(batch) if walk.rescale else None,
            counter=zeros(3, dtype=torch.int32),
            kept=None
            if walk.kept is None
            else Kept(zeros(*x.shape[:3], 1), torch.zeros_like(x), torch.zeros_like(x), zeros(rows + 1, 2)),
            condition=None
            if walk.condition is None
            else zeros(len(walk.keys[0][0]), *walk.condition.shape[1:], dtype=time_bias.dtype),
        )

    def load(self, walk: Walk) -> None:
        """Begin a walk: every buffer set, whatever the last one left."""
        n, slots = walk.table.model_input.shape
        model_input, update = torch.from_numpy(walk.table.model_input), torch.from_numpy(walk.table.update)
        wide_input, wide_update = model_input.new_zeros(n, SLOTS), update.new_zeros(n, SLOTS, SLOTS + 2)
        wide_input[:, :slots] = model_input
        wide_update[:, :slots, :slots] = update[:, :, :slots]
        wide_update[:, :slots, SLOTS:] = update[:, :, slots:]
        self.model_input[:n].copy_(wide_input)
        self.update[:n].copy_(wide_update)
        self.time_bias[:n].copy_(walk.time_bias)
        for mine, given in zip(self.keys, walk.keys, strict=True):
            for buffer, tensor in zip(mine, given, strict=True):
                buffer.copy_(tensor)
        self.state.zero_()
        self.state[0].copy_(walk.latents).mul_(walk.table.initial_scale)
        self.noise.zero_()
        self.guidance.fill_(walk.guidance)
        if self.rescale is not None:
            self.rescale.fill_(walk.rescale)
        self.counter.zero_()
        self.counter[1] = n
        if self.kept is not None and walk.kept is not None:
            for buffer, tensor in zip(self.kept[:3], walk.kept[:3], strict=True):
                buffer.copy_(tensor)
            self.kept.levels[: n + 1].copy_(walk.kept.levels)
        if self.condition is not None and walk.condition is not None:
            self.condition.view(-1, *walk.condition.shape).copy_(walk.condition)


def advance(unet: UNet, ops: Ops, buffers: Buffers, guided: bool) -> None:
    """One step, in place: the UNet on what the table shows it of the state, guidance, the table's row, what is kept."""
    b = buffers
    x, time_bias = ops.step_input(b.state, b.model_input, b.time_bias, b.counter, 2 if guided else 1)
    x = x if b.condition is None else torch.cat([x, b.condition], dim=-1)
    out = unet(x, time_bias.expand(len(x), -1), b.keys)
    table = b.update[:, None].expand(-1, len(b.noise), -1, -1)  # [rows, B, SLOTS, SLOTS+2]
    ops.sampler_step(b.state, out, b.noise, StepRow(table, b.guidance, b.rescale, b.counter), new=b.state)
    if b.kept is not None:
        restore(b.state[0], b.kept, b.counter)


def restore(latents: Tensor, kept: Kept, counter: Tensor) -> None:
    """Outside the mask the latents [B, H, W, C] become the image, noised as before the counter's step; in place."""
    level = kept.levels.index_select(0, counter[:1])  # [1, 2]
    noised = level[:, 0] * kept.image + level[:, 1] * kept.noise
    latents.copy_(torch.lerp(noised, latents, kept.mask))


class Denoiser:
    """Walks for one UNet, eagerly or by a captured step. Threads may share it."""

    def __init__(self, unet: UNet, ops: Ops, graphs: Graphs | None) -> None:
        self.unet = unet
        self.ops = ops
        self.graphs = graphs

    def run(self, walk: Walk, after_step: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, int]:
        """Latents [B, H, W, C] fp32, and after how many of the n steps all was still finite.

        after_step: called with each step's index and the latents, a view it may write to.
        """
        with self._step(walk) as (buffers, step):
            buffers.load(walk)
            _, height, width, channels = walk.latents.shape
            for index in range(len(walk.table)):
                if walk.table.needs_noise(index):
                    buffers.noise.copy_(walk.noise.draw(height, width, channels, walk.latents.device))
                step()
                if after_step is not None:
                    after_step(index, buffers.state[0])
            return buffers.state[0].clone(), int(buffers.counter[1])

    @contextmanager
    def _step(self, walk: Walk) -> Iterator[tuple[Buffers, Callable[[], None]]]:
        """Buffers for this walk, and what advances them."""
        graphs = self.graphs if len(walk.table) <= ROWS else None
        with nullcontext() if graphs is None else graphs.lease(_key(walk), lambda: self._make(walk)) as captured:
            if captured is not None:
                yield captured.buffers, captured.replay
            else:
                buffers = Buffers.allocate(walk, len(walk.table))
                yield buffers, lambda: advance(self.unet, self.ops, buffers, walk.guided)

    def _make(self, walk: Walk) -> tuple[Buffers, Callable[[], None]]:
        buffers = Buffers.allocate(walk, ROWS)
        buffers.load(walk)
        return buffers, lambda: advance(self.unet, self.ops, buffers, walk.guided)


def _key(walk: Walk) -> tuple[object, ...]:
    """What a captured step is made for."""
    inpaints = walk.kept is not None, walk.condition is not None
    return ("step", tuple(walk.latents.shape), walk.guided, walk.keys[0][0].shape[1], bool(walk.rescale), *inpaints)
