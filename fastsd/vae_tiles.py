"""A VAE run tile by tile: memory for one tile's activations, whatever the size of the picture.

Tiles overlap by a quarter, and each fades in linearly over the one above it and the one to its left, as in diffusers'
AutoencoderKL with enable_tiling. What a tile shows depends on that tile alone (norms, attention), so the picture is not quite
the one that the whole VAE gives: colours may drift from tile to tile.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastsd.models.vae import VAE
from fastsd.models.vq import VQ
from fastsd.ops import Wrap
from fastsd.seamless import seamless

FirstStage = TypeVar("FirstStage", bound=VAE | VQ)


def tiled(vae: FirstStage, side: int, wrap: Wrap = (False, False)) -> FirstStage:
    """The VAE in tiles of at most side x side latents, on the same weights. Pictures that fit into one tile are not cut.

    Images must be multiples of the VAE's factor in height and width. wrap: edges that meet, see `fastsd.seamless`.
    """
    unit, step = vae.config.downscale, side - side // 4
    twin = copy.copy(vae)
    twin._modules = {
        **vae._modules,
        "encoder": Tiles(vae.encoder, side * unit, step * unit, step, wrap),
        "decoder": Tiles(vae.decoder, side, step, step * unit, wrap),
    }
    return twin


class Tiles(nn.Module):
    """A net that is run on tiles: size and step from one to the next in what it reads, step_out in what it gives."""

    def __init__(self, net: nn.Module, size: int, step: int, step_out: int, wrap: Wrap = (False, False)) -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.step = step
        self.step_out = step_out
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] → [B, H', W', O]
        _, height, width, _ = x.shape
        if max(height, width) <= self.size:
            return seamless(self.net, self.wrap)(x)
        single = width <= self.step, height <= self.step  # one tile reaches from edge to edge
        within = self.wrap[0] and single[0], self.wrap[1] and single[1]
        run: Callable[[Tensor], Tensor] = partial(self._tiles, seamless(self.net, within))
        for axis in (2, 1):
            if self.wrap[2 - axis] and not single[2 - axis]:
                run = partial(self._round, run, axis)
        return run(x)

    def _round(self, run: Callable[[Tensor], Tensor], axis: int, x: Tensor) -> Tensor:
        """The end of a picture whose edges meet is read once more before its beginning, and fades into what comes of that."""
        overlap, size = self.size - self.step, x.shape[axis]
        y = run(torch.cat([x.narrow(axis, size - overlap, overlap), x], axis))
        before = overlap * self.step_out // self.step
        first, middle, last = y.split([before, y.shape[axis] - 2 * before, before], axis)
        return torch.cat([middle, _faded_in(first, last, axis)], axis)

    def _tiles(self, net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows: list[Tensor] = []
        above: dict[int, Tensor] = {}  # what of the last row's tiles reaches into this row
        for top in range(0, height, self.step):
            row: list[Tensor] = []
            before: Tensor | None = None  # what of the last tile reaches into this one
            for left in range(0, width, self.step):
                tile = net(x[:, top : top + self.size, left : left + self.size].contiguous())
                tile = _faded_in(tile, above.get(left), 1)
                tile = _faded_in(tile, before, 2)
                row.append(tile[:, : self.step_out, : self.step_out])
                above[left], before = tile[:, self.step_out :], tile[:, :, self.step_out :]
            rows.append(torch.cat(row, 2))
        return torch.cat(rows, 1)


def _faded_in(tile: Tensor, before: Tensor | None, axis: int) -> Tensor:
    """The tile with its beginning along an axis blended from what lies there before: of that all at first, then ever less."""
    if before is None or not before.shape[axis]:
        return tile
    extent = before.shape[axis]
    share = torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent
    start, rest = tile.split([extent, tile.shape[axis] - extent], axis)
    return torch.cat([torch.lerp(before, start, share.view(-1, *[1] * (3 - axis))), rest], axis)
