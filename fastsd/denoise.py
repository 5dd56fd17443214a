"""The loop of every sampler: noise → latents. Once a prompt, once a schedule; then n equal steps on fixed buffers.

One captured step serves every sampler, schedule, prompt, seed and guidance scale, no host takes part in it, and walks of any
kind go side by side: the shorter ones leave when they are done.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.checks import present
from fastsd.device import is_out_of_memory
from fastsd.graph import Graphs
from fastsd.models.unet import KeyValue, UNet
from fastsd.ops import Ops, StepRow
from fastsd.seamless import seamless
from fastsd.walks import Buffers, Kept, Span, Walk

ROWS = 1024
"""Rows of a captured step's tables: more than a schedule of 1000 timesteps has. Where walks of different schedules have more
together, they run eagerly."""

Predict = Callable[[Tensor, Tensor, Sequence[KeyValue]], Tensor]
"""A UNet: x [U, H, W, C], time projections [U, T] and each cross-attention's (k, v) → its output [U, H, W, C]."""

AfterStep = Callable[[int, Tensor, Tensor], None]
"""Called with a step's index, the state [SLOTS, B, H, W, C] after it, a view whose latents, slot 0, it may write to, and the
unit noise that the step added, if it added some."""


def advance(unet: Predict, ops: Ops, buffers: Buffers, copies: int) -> None:
    """One step, in place: the UNet on what the tables show it of the state, guidance, the tables' row, what is kept."""
    b = buffers
    x, time_bias = ops.step_input(b.state, b.model_input, b.time_bias, b.time_rows, b.counter, copies)
    x = x if b.condition is None else torch.cat([x, b.condition], dim=-1)
    out = unet(x, time_bias, b.keys)
    ops.sampler_step(b.state, out, b.noise, StepRow(b.update, b.guidance, b.rescale, b.counter), new=b.state)
    if b.kept is not None:
        restore(b.state[0], b.kept, b.counter)


def restore(latents: Tensor, kept: Kept, counter: Tensor) -> None:
    """Outside the mask the latents [B, H, W, C] become the image, noised as before the counter's step; in place."""
    share, rest = kept.levels.index_select(0, counter[:1])[0].view(-1, 1, 1, 1, 2).unbind(-1)
    noised = share * kept.image + rest * kept.noise
    latents.copy_(torch.lerp(noised, latents, kept.mask))


@dataclass
class InPieces:
    """A UNet that has its batch cut in half where memory runs out, and again, from then on."""

    unet: UNet
    degraded: list[str]
    """Is told."""
    pieces: int = 1

    def __call__(self, x: Tensor, time_bias: Tensor, keys: Sequence[KeyValue]) -> Tensor:
        while True:
            try:
                if self.pieces == 1:
                    return self.unet(x, time_bias, keys)
                size = -(-len(x) // self.pieces)
                parts = [slice(start, start + size) for start in range(0, len(x), size)]
                return torch.cat([self.unet(x[p], time_bias[p], [(k[p], v[p]) for k, v in keys]) for p in parts])
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.pieces >= len(x):
                    raise
            # Out here the exception is gone, and with it the failed attempt's tensors.
            self.pieces = min(2 * self.pieces, len(x))
            self.degraded.append(f"unet: {len(x)} rows in {self.pieces} pieces, after running out of memory")


class Walked(NamedTuple):
    """What has become of a walk."""

    latents: Tensor
    """[B, H, W, C] fp32"""
    survived: int
    """After how many of its steps all was still finite."""
    degraded: list[str]
    """How the UNet's batch was cut, where memory ran out."""


class Denoiser:
    """Walks for one UNet, eagerly or by a captured step. Threads may share it."""

    def __init__(self, unet: UNet, ops: Ops, graphs: Graphs | None) -> None:
        self.unet = unet
        self.ops = ops
        self.graphs = graphs

    def run(
        self,
        walks: Sequence[Walk],
        after_step: Sequence[AfterStep | None] | None = None,
    ) -> list[Walked]:
        """Walks that can share the UNet's calls do; one whose latents are no longer finite is not gone on with.

        after_step: one a walk.
        """
        hooks = after_step or [None] * len(walks)
        groups: dict[Hashable, list[int]] = {}
        for index, walk in enumerate(walks):
            groups.setdefault(_alike(walk), []).append(index)
        results: dict[int, Walked] = {}
        for members in groups.values():
            found = self._together([walks[i] for i in members], [hooks[i] for i in members])
            results |= zip(members, found, strict=True)
        return [results[index] for index in range(len(walks))]

    def _together(self, walks: Sequence[Walk], hooks: Sequence[AfterStep | None]) -> list[Walked]:
        """Walks of one shape: all of them up to the end of the shortest, then the others up to the next one's, …."""
        states: list[Tensor | None] = [None] * len(walks)
        survived = [len(walk.table) for walk in walks]
        degraded: list[str] = []
        begin = 0
        while going := [i for i, walk in enumerate(walks) if begin < len(walk.table) == survived[i]]:
            end = min(len(walks[i].table) for i in going)
            span = Span([walks[i] for i in going], [states[i] for i in going], begin, end)
            ended, bad = self._run(span, [hooks[i] for i in going], degraded)
            for i, images in zip(going, span.images, strict=True):
                states[i] = ended[:, images]
                first = min(bad[images])
                survived[i] = begin + first if first < end - begin else survived[i]
            begin = end
        return [Walked(present(state)[0], count, degraded) for state, count in zip(states, survived, strict=True)]

    def _run(self, span: Span, hooks: Sequence[AfterStep | None], degraded: list[str]) -> tuple[Tensor, list[int]]:
        """The state [SLOTS, B, H, W, C] after a span, and for each image how many of its steps were finite."""
        with self._step(span, degraded) as (buffers, step):
            buffers.load(span)
            for index in range(span.begin, span.end):
                for walk, images in zip(span.walks, span.images, strict=True):
                    if walk.table.needs_noise(index):
                        _, height, width, channels = walk.latents.shape
                        buffers.noise[images] = walk.noise.draw(height, width, channels, walk.latents.device)
                step()
                for hook, images in zip(hooks, span.images, strict=True):
                    if hook is not None:
                        hook(index, buffers.state[:, images], buffers.noise[images])
            return buffers.state.clone(), buffers.counter[2:].tolist()

    @contextmanager
    def _step(self, span: Span, degraded: list[str]) -> Iterator[tuple[Buffers, Callable[[], None]]]:
        """Buffers for this span, and what advances them."""
        graphs = self.graphs if span.rows <= ROWS else None
        with nullcontext() if graphs is None else graphs.lease(_key(span), lambda: self._make(span)) as captured:
            if captured is not None:
                yield captured.buffers, captured.replay
            else:
                buffers = Buffers.allocate(span, span.rows)
                unet = InPieces(self._net(span), degraded)
                yield buffers, lambda: advance(unet, self.ops, buffers, span.copies)

    def _make(self, span: Span) -> tuple[Buffers, Callable[[], None]]:
        buffers = Buffers.allocate(span, ROWS)
        buffers.load(span)
        unet = self._net(span)
        return buffers, lambda: advance(unet, self.ops, buffers, span.copies)

    def _net(self, span: Span) -> UNet:
        return seamless(self.unet, span.walks[0].wrap)


def _alike(walk: Walk) -> Hashable:
    """What walks must have in common to share the UNet's calls."""
    return walk.latents.shape[1:], walk.copies, walk.keys[0][0].shape[1], walk.wrap


def _key(span: Span) -> tuple[object, ...]:
    """What a captured step is made for."""
    walk = span.walks[0]
    shape = (span.batch, *walk.latents.shape[1:])
    inpaints = walk.condition is not None
    return ("step", shape, walk.copies, walk.keys[0][0].shape[1], span.rescales, span.keeps, inpaints, walk.wrap)
