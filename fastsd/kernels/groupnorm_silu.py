"""Group norm, then SiLU if asked: y = (x − mean_g) / √(var_g + eps) · w + b; y · σ(y). NHWC (Wu & He 2018, arXiv 1803.08494).

Reads B·H·W·C elements twice and writes them once: bound by memory. Two kernels, so that one image fills the GPU:
`statistics_kernel` leaves (mean, M2) of each channel of each chunk of pixels, `apply_kernel` merges those of the groups it
touches (Chan, Golub & LeVeque 1983) and normalises its chunk. Tiles are runs of channels, whatever the width of a group.
A skip is read through its own pointer: a tile lies wholly in x or wholly in the skip, a group may lie in both.
Small images take one kernel instead, a CTA a group: `groupnorm_whole`.

All statistics are of x − pivot, the pivot being the first value of the group in its image: where the mean is 1000 times the
deviation, the mean itself does not fit fp32.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastsd.kernels.groupnorm_kernels import apply_kernel, condense_kernel, statistics_kernel
from fastsd.kernels.groupnorm_whole import whole_kernel
from fastsd.kernels.launch import Launch, check_operands


class Config(NamedTuple):
    block_pixels: int
    block_channels: int
    steps: int  # tiles of block_pixels that one CTA walks; 0: as many as there are, of one group, by `whole_kernel`
    num_warps: int


WHOLE_PIXELS = 1024
"""Up to here a CTA can walk all pixels of a group, 122 KB for 60 channels of fp16, in about the time of a second launch."""


def choose_config(batch: int, pixels: int, channels: int, groups: int, skip_channels: int = 0) -> Config:
    """One kernel up to WHOLE_PIXELS; two beyond. Untuned, for want of a device."""
    if pixels <= WHOLE_PIXELS:
        return _whole(pixels, (channels + skip_channels) // groups, elements=4096)
    return choose_chunks(batch, pixels, channels, skip_channels)


def _whole(pixels: int, width: int, elements: int) -> Config:
    """Tiles of up to so many elements for 8 warps; 16 warps spill."""
    block_w = triton.next_power_of_2(width)
    return Config(max(1, min(triton.next_power_of_2(pixels), elements // block_w)), block_w, 0, num_warps=8)


def choose_chunks(batch: int, pixels: int, channels: int, skip_channels: int = 0) -> Config:
    """At least 264 CTAs (two for each of 132 SMs) where the shape has them at 16 pixels each; from 512 on each takes more.

    Large images take narrow tiles: each CTA merges (its channels) × (all chunks), so that for as many CTAs half the width is a
    quarter of the merging, and 32 channels of fp16 are still the 64 bytes of one DRAM burst.
    """
    widest = triton.next_power_of_2(max(channels, skip_channels))
    block_channels = min(widest, 64 if pixels <= 1024 else 32)
    columns = batch * (triton.cdiv(channels, block_channels) + triton.cdiv(skip_channels, block_channels))
    most = min(128, 4096 // block_channels)  # 32 elements a thread: with (mean, M2) beside each, 120 registers
    block_pixels = min(most, max(16, triton.next_power_of_2(pixels)))
    while block_pixels > 16 and columns * triton.cdiv(pixels, block_pixels) < 264:
        block_pixels //= 2
    steps = max(1, columns * triton.cdiv(pixels, block_pixels) // 512)
    return Config(block_pixels, block_channels, steps, num_warps=4)


def candidates(batch: int, pixels: int, channels: int, groups: int, skip_channels: int = 0) -> list[Config]:
    """What a tuner should time, `choose_config`'s pick first: tiles of 2048 or 4096 elements, 264 or 528 CTAs, 4 or 8 warps.

    More CTAs read with more in flight, and merge more partial statistics each. Up to four times WHOLE_PIXELS also one kernel.
    """
    first = choose_config(batch, pixels, channels, groups, skip_channels)
    widest = triton.next_power_of_2(max(channels, skip_channels))
    configs: list[Config] = []
    if pixels <= 4 * WHOLE_PIXELS:
        configs += [_whole(pixels, (channels + skip_channels) // groups, elements) for elements in (4096, 8192)]
    for block_channels in sorted({min(widest, size) for size in (32, 64, 128)}):
        columns = batch * (triton.cdiv(channels, block_channels) + triton.cdiv(skip_channels, block_channels))
        for elements, num_warps in ((2048, 4), (4096, 4), (4096, 8)):
            block_pixels = min(elements // block_channels, max(16, triton.next_power_of_2(pixels)))
            tiles = columns * triton.cdiv(pixels, block_pixels)
            configs += [Config(block_pixels, block_channels, max(1, tiles // ctas), num_warps) for ctas in (264, 528)]
    return list(dict.fromkeys([first, *configs]))[:16]


class Statistics(NamedTuple):
    """(mean, M2) of each channel of each chunk of an image's pixels."""

    partials: Tensor
    """[B, chunks, 2, C] fp32"""
    chunk: int
    """Pixels of a chunk; the last may be shorter."""
    pivoted: bool
    """The means are of x − the first value of the channel's group in its image."""


MERGED = 64
"""Chunks that each CTA may have to merge; more are condensed first."""


def plan_group_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    skip: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> list[Launch]:
    """The launches of `group_norm` into out [B, H, W, C+C₂]."""
    batch, height, width, channels = out.shape
    config = config or choose_config(batch, height * width, x.shape[-1], groups, channels - x.shape[-1])
    if config.steps == 0:
        return [_plan_whole(x, w, b, groups, eps, silu, skip, out, config)]
    chunks = triton.cdiv(triton.cdiv(height * width, config.block_pixels), config.steps)
    partials = torch.empty(batch, chunks, 2, channels, dtype=torch.float32, device=x.device)
    inputs, grid, sizes, geometry = _tiles(x, skip, groups, config)
    statistics = Launch(
        statistics_kernel, grid, inputs | {"partials_ptr": partials} | sizes, geometry, config.num_warps
    )
    taken = Statistics(partials, config.steps * config.block_pixels, pivoted=True)
    return [statistics, *plan_apply(x, w, b, groups, eps, silu, skip, taken, out, config)]


def plan_apply(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    skip: Tensor | None,
    statistics: Statistics,
    out: Tensor,
    config: Config | None = None,
) -> list[Launch]:
    """The launches of a group norm whose statistics are known already."""
    config = config or choose_chunks(x.shape[0], x.shape[1] * x.shape[2], x.shape[-1], out.shape[-1] - x.shape[-1])
    inputs, grid, sizes, geometry = _tiles(x, skip, groups, config)
    partials, chunk, pivoted = statistics
    batch, chunks, _, channels = partials.shape
    launches = []
    fold = 1 if pivoted else _fold(chunks)
    if fold > 1:
        chunks //= fold
        condensed = torch.empty(batch, chunks, 2, channels, dtype=torch.float32, device=x.device)
        block = min(64, triton.next_power_of_2(channels))
        launches = [
            Launch(
                condense_kernel,
                (triton.cdiv(channels, block), batch * chunks),
                {"partials_ptr": partials, "out_ptr": condensed, "STAT_PIXELS": chunk},
                {"C": channels, "FOLD": fold, "BLOCK_C": block},
                num_warps=4,
            )
        ]
        partials, chunk = condensed, chunk * fold
    # A tile begins at a multiple of `step` channels, at worst one step before the end of a group.
    group = channels // groups
    step = gcd(config.block_channels, group, x.shape[-1])
    tile_groups = triton.next_power_of_2(triton.cdiv(config.block_channels + group - step, group))
    block_w = triton.next_power_of_2(group)
    # 1024 partials at once are 8 a thread, all in flight together; 2048 spill on sm_100.
    block_k = max(1, min(triton.next_power_of_2(chunks), 1024 // (tile_groups * block_w)))
    apply = Launch(
        apply_kernel,
        grid,
        inputs
        | {"w_ptr": w, "b_ptr": b, "partials_ptr": partials, "out_ptr": out}
        | sizes
        | {"STAT_PIXELS": chunk, "STAT_CHUNKS": chunks, "eps": float(eps)},
        geometry
        | {"PIVOTED": pivoted, "SILU": silu, "TILE_GROUPS": tile_groups, "BLOCK_W": block_w, "BLOCK_K": block_k},
        config.num_warps,
    )
    return [*launches, apply]


def _fold(chunks: int) -> int:
    """How many chunks become one, a power of two that divides them, until MERGED or fewer are left."""
    fold = 1
    while chunks // fold > MERGED and chunks % (2 * fold) == 0 and fold < 64:
        fold *= 2
    return fold


def _plan_whole(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    skip: Tensor | None,
    out: Tensor,
    config: Config,
) -> Launch:
    batch, height, width, c1 = x.shape
    channels = out.shape[-1]
    group = channels // groups
    tensors = {"x_ptr": x, "skip_ptr": x if skip is None else skip, "w_ptr": w, "b_ptr": b, "out_ptr": out}
    even = height * width % config.block_pixels == 0
    blocks = {"EVEN": even, "BLOCK_P": config.block_pixels, "BLOCK_W": triton.next_power_of_2(group)}
    return Launch(
        whole_kernel,
        (groups, batch),
        tensors | {"PIXELS": height * width, "eps": float(eps)},
        {"C1": c1, "C2": channels - c1, "WIDTH": group, "SILU": silu, **blocks},
        config.num_warps,
    )


Arguments = dict[str, Tensor | int | float]


def _tiles(
    x: Tensor, skip: Tensor | None, groups: int, config: Config
) -> tuple[Arguments, tuple[int, int, int], Arguments, dict[str, int | bool]]:
    """What both kernels are launched with: inputs, grid, sizes, geometry."""
    batch, height, width, c1 = x.shape
    c2 = 0 if skip is None else skip.shape[-1]
    pixels = height * width
    chunks = triton.cdiv(triton.cdiv(pixels, config.block_pixels), config.steps)
    tiles = triton.cdiv(c1, config.block_channels) + triton.cdiv(c2, config.block_channels)
    geometry = {
        "C1": c1,
        "C2": c2,
        "WIDTH": (c1 + c2) // groups,
        "EVEN": pixels % config.block_pixels == 0,
        "BLOCK_P": config.block_pixels,
        "BLOCK_C": config.block_channels,
    }
    inputs: Arguments = {"x_ptr": x, "skip_ptr": x if skip is None else skip}  # unread if absent
    return inputs, (tiles, chunks, batch), {"PIXELS": pixels, "STEPS": config.steps}, geometry


def group_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Group norm, then SiLU if asked. x [B, H, W, C] → same; with a skip [B, H, W, C₂] laid beside x: [B, H, W, C+C₂].

    ValueError for what the kernels do not serve: other dtypes, tensors that are not contiguous or on several devices, no
    elements, channels that the groups do not divide, 2³¹ pixels an image, more than 65,535 images.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be [B, H, W, C] with elements, not {list(x.shape)}")
    channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels are not a multiple of {groups} groups")
    out = torch.empty((*x.shape[:3], channels), dtype=x.dtype, device=x.device) if out is None else out
    _check(x, w, b, skip, out)
    for launch in plan_group_norm(x, w, b, groups, eps, silu, skip, out, config):
        launch.run()
    return out


def _check(x: Tensor, w: Tensor, b: Tensor, skip: Tensor | None, out: Tensor) -> None:
    batch, height, width, c1 = x.shape
    channels = out.shape[-1]
    if batch > 65535 or height * width * 2 >= 2**31:
        raise ValueError(f"x {list(x.shape)} has too many images or pixels: at most 65,535 and 2³⁰")
    c2 = 0 if skip is None else skip.shape[-1]
    laid = {"x": (x, x.shape), "w": (w, (c1 + c2,)), "b": (b, (c1 + c2,)), "out": (out, (*x.shape[:3], c1 + c2))}
    laid |= {} if skip is None else {"skip": (skip, (*x.shape[:3], channels - c1))}
    check_operands(laid)
    if out.dtype != x.dtype or (skip is not None and skip.dtype != x.dtype):
        raise ValueError(f"skip and out must be {x.dtype} as x")
