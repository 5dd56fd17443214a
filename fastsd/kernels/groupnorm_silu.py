"""Group norm, then SiLU if asked: y = (x − mean_g) / √(var_g + eps) · w + b; y · σ(y). NHWC (Wu & He 2018, arXiv 1803.08494).

Reads B·H·W·C elements twice and writes them once: bound by memory. Two kernels, so that one image fills the GPU:
`statistics_kernel` leaves (mean, M2) of each channel of each chunk of pixels, `apply_kernel` merges those of the groups it
touches (Chan, Golub & LeVeque 1983) and normalises its chunk. Tiles are runs of channels, whatever the width of a group.
A skip is read through its own pointer: a tile lies wholly in x or wholly in the skip, a group may lie in both.

All statistics are of x − pivot, the pivot being the first value of the group in its image: where the mean is 1000 times the
deviation, the mean itself does not fit fp32.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.launch import Launch, check_operands


class Config(NamedTuple):
    block_pixels: int
    block_channels: int
    steps: int  # tiles of block_pixels that one CTA walks
    num_warps: int


def choose_config(batch: int, pixels: int, channels: int, skip_channels: int = 0) -> Config:
    """At least 264 CTAs (two for each of 132 SMs) where the shape has them at 16 pixels each; from 512 on each takes more.

    Large images take narrow tiles: each CTA merges (its channels) × (all chunks), so that for as many CTAs half the width is a
    quarter of the merging, and 32 channels of fp16 are still the 64 bytes of one DRAM burst. Untuned, for want of a device.
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


@triton.jit
def pivot_of(
    x_ptr,  # [B, PIXELS, C1]
    skip_ptr,  # [B, PIXELS, C2]
    pixel,  # int64, the image's first
    channels,  # [BLOCK_C] of x and skip side by side
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[BLOCK_C] fp32: the first value of each channel's group."""
    first = channels // WIDTH * WIDTH
    pivot = tl.load(x_ptr + pixel * C1 + first, mask=first < C1, other=0.0).to(tl.float32)
    if C2 > 0:
        beyond = first - C1
        in_skip = (beyond >= 0) & (beyond < C2)
        pivot += tl.load(skip_ptr + pixel * C2 + beyond, mask=in_skip, other=0.0).to(tl.float32)
    return pivot


@triton.jit
def inside_tile(
    pixels,  # [BLOCK_P] counted from the tile's first
    left,  # pixels of the chunk from there on
    columns,  # [BLOCK_C]
    C: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_P, BLOCK_C]; a constant, which the compiler drops, where tiles fill the tensor."""
    inside = tl.full((BLOCK_P, BLOCK_C), True, tl.int1)
    if not EVEN:
        inside &= (pixels < left)[:, None]
    if C % BLOCK_C != 0:
        inside &= (columns < C)[None, :]
    return inside


@triton.jit
def chunk_statistics(
    tile_ptr,  # [B, PIXELS, C]: x or skip
    x_ptr,  # [B, PIXELS, C1]
    skip_ptr,  # [B, PIXELS, C2]
    partials_ptr,  # [B, CHUNKS, 2, C1 + C2] fp32
    column,  # the tile's first
    PIXELS,
    STEPS,
    C: tl.constexpr,  # of tile_ptr
    C_OFFS: tl.constexpr,  # of tile_ptr's first channel
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Welford's update in each element of the tile, so that nothing crosses lanes before the end; then one merge over pixels."""
    chunk, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixels, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_C)
    offs = pixels[:, None] * C + columns[None, :]
    pivot = pivot_of(x_ptr, skip_ptr, image * PIXELS, C_OFFS + columns, C1, C2, WIDTH)
    start = chunk * STEPS * BLOCK_P
    size = tl.minimum(PIXELS - start, STEPS * BLOCK_P)

    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(tl.cdiv(size, BLOCK_P)):
        done = step * BLOCK_P
        inside = inside_tile(pixels, size - done, columns, C, EVEN, BLOCK_P, BLOCK_C)
        x = tl.load(tile_ptr + (image * PIXELS + start + done) * C + offs, mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, x - pivot[None, :] - mean, 0.0)
        weight = 1.0 / (step + 1)
        mean += delta * weight
        m2 += delta * delta * (1.0 - weight)

    count = tl.maximum((size - pixels + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    chunk_mean = tl.sum(mean * count, axis=0) / size
    delta = mean - chunk_mean[None, :]
    chunk_m2 = tl.sum(m2 + delta * delta * count, axis=0)

    here_ptr = partials_ptr + (image * tl.num_programs(1) + chunk) * (2 * (C1 + C2)) + C_OFFS + columns
    tl.store(here_ptr, chunk_mean, mask=columns < C)
    tl.store(here_ptr + (C1 + C2), chunk_m2, mask=columns < C)


@triton.jit
def statistics_kernel(
    x_ptr,  # [B, PIXELS, C1]
    skip_ptr,  # [B, PIXELS, C2], unread if C2 = 0
    partials_ptr,  # [B, CHUNKS, 2, C1 + C2] fp32: mean − pivot, M2
    PIXELS,
    STEPS,
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    EVEN: tl.constexpr,  # PIXELS % BLOCK_P == 0
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    X_TILES: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    if tile < X_TILES:
        chunk_statistics(
            x_ptr, x_ptr, skip_ptr, partials_ptr, tile * BLOCK_C, PIXELS, STEPS,
            C1, 0, C1, C2, WIDTH, EVEN, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    elif C2 > 0:
        chunk_statistics(
            skip_ptr, x_ptr, skip_ptr, partials_ptr, (tile - X_TILES) * BLOCK_C, PIXELS, STEPS,
            C2, C1, C1, C2, WIDTH, EVEN, BLOCK_P, BLOCK_C,
        )  # fmt: skip


@triton.jit
def merge(
    partials_ptr,  # [CHUNKS, 2, C] fp32 of one image
    first_group,
    PIXELS,
    CHUNK,  # pixels of a chunk
    CHUNKS,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,  # chunks merged at once
):
    """Mean − pivot and variance [TILE_GROUPS] of the groups from first_group on."""
    groups = first_group + tl.arange(0, TILE_GROUPS)
    lanes = tl.arange(0, BLOCK_K * BLOCK_W)
    within, chunk_of = lanes % BLOCK_W, lanes // BLOCK_W
    channels = groups[:, None] * WIDTH + within[None, :]
    known = (within < WIDTH)[None, :] & (channels < C)
    mean = tl.zeros((TILE_GROUPS,), tl.float32)
    m2 = tl.zeros((TILE_GROUPS,), tl.float32)
    for first in range(0, CHUNKS, BLOCK_K):
        chunks = first + chunk_of
        inside = known & (chunks < CHUNKS)[None, :]
        offs = chunks[None, :] * (2 * C) + channels
        part_mean = tl.load(partials_ptr + offs, mask=inside, other=0.0)
        part_m2 = tl.load(partials_ptr + offs + C, mask=inside, other=0.0)
        # Counts as floats: the elements of a group may pass 2³¹ where the pixels of an image do not.
        size = tl.where(inside, tl.minimum(PIXELS - chunks * CHUNK, CHUNK)[None, :], 0).to(tl.float32)
        before = first * CHUNK
        seen = 1.0 * WIDTH * before
        fresh = 1.0 * WIDTH * tl.minimum(PIXELS - before, BLOCK_K * CHUNK)
        new_mean = tl.sum(part_mean * size, axis=1) / fresh
        spread = part_mean - new_mean[:, None]
        new_m2 = tl.sum(part_m2 + spread * spread * size, axis=1)
        delta = new_mean - mean
        share = fresh / (seen + fresh)
        mean += delta * share
        m2 += new_m2 + delta * delta * (seen * share)
    return mean, m2 / (1.0 * WIDTH * PIXELS)


@triton.jit
def apply_to_chunk(
    tile_ptr,  # [B, PIXELS, C]: x or skip
    x_ptr,  # [B, PIXELS, C1]
    skip_ptr,  # [B, PIXELS, C2]
    w_ptr,  # [C1 + C2]
    b_ptr,  # [C1 + C2]
    partials_ptr,  # [B, CHUNKS, 2, C1 + C2] fp32
    out_ptr,  # [B, PIXELS, C1 + C2]
    column,  # the tile's first
    PIXELS,
    STEPS,
    eps,
    C: tl.constexpr,  # of tile_ptr
    C_OFFS: tl.constexpr,  # of tile_ptr's first channel
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    chunk, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    OUT_C: tl.constexpr = C1 + C2
    pixels, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_C)
    channels = C_OFFS + columns
    first_group = (C_OFFS + column) // WIDTH
    image_ptr = partials_ptr + image * chunks * (2 * OUT_C)
    mean, var = merge(
        image_ptr, first_group, PIXELS, STEPS * BLOCK_P, chunks, OUT_C, WIDTH, TILE_GROUPS, BLOCK_W, BLOCK_K
    )

    # From groups to channels: a group's number is picked out of a one-hot row.
    own = (channels // WIDTH - first_group)[:, None] == tl.arange(0, TILE_GROUPS)[None, :]
    mean = tl.sum(tl.where(own, mean[None, :], 0.0), axis=1)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.where(own, var[None, :], 0.0), axis=1) + eps)
    scale = rstd * tl.load(w_ptr + channels, mask=columns < C, other=0.0).to(tl.float32)
    # The mean of x as a sum of two numbers: x − centre is exact near it, be the pivot good or not, and rest is what centre lacks.
    pivot = pivot_of(x_ptr, skip_ptr, image * PIXELS, channels, C1, C2, WIDTH)
    centre = pivot + mean
    rest = mean - (centre - pivot)
    shift = tl.load(b_ptr + channels, mask=columns < C, other=0.0).to(tl.float32) - rest * scale

    start = chunk * STEPS * BLOCK_P
    size = tl.minimum(PIXELS - start, STEPS * BLOCK_P)
    for step in range(tl.cdiv(size, BLOCK_P)):
        done = step * BLOCK_P
        inside = inside_tile(pixels, size - done, columns, C, EVEN, BLOCK_P, BLOCK_C)
        pixel = image * PIXELS + start + done
        offs = pixels[:, None] * C + columns[None, :]
        x = tl.load(tile_ptr + pixel * C + offs, mask=inside, other=0.0).to(tl.float32)
        y = (x - centre[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        offs = pixels[:, None] * OUT_C + channels[None, :]
        tl.store(out_ptr + pixel * OUT_C + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def apply_kernel(
    x_ptr,  # [B, PIXELS, C1]
    skip_ptr,  # [B, PIXELS, C2], unread if C2 = 0
    w_ptr,  # [C1 + C2]
    b_ptr,  # [C1 + C2]
    partials_ptr,  # [B, CHUNKS, 2, C1 + C2] fp32: mean − pivot, M2
    out_ptr,  # [B, PIXELS, C1 + C2]
    PIXELS,
    STEPS,
    eps,
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    SILU: tl.constexpr,
    EVEN: tl.constexpr,  # PIXELS % BLOCK_P == 0
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_GROUPS: tl.constexpr,  # groups that a tile may touch
    BLOCK_W: tl.constexpr,  # ≥ WIDTH
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    X_TILES: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    if tile < X_TILES:
        apply_to_chunk(
            x_ptr, x_ptr, skip_ptr, w_ptr, b_ptr, partials_ptr, out_ptr, tile * BLOCK_C, PIXELS, STEPS, eps,
            C1, 0, C1, C2, WIDTH, SILU, EVEN, BLOCK_P, BLOCK_C, TILE_GROUPS, BLOCK_W, BLOCK_K,
        )  # fmt: skip
    elif C2 > 0:
        apply_to_chunk(
            skip_ptr, x_ptr, skip_ptr, w_ptr, b_ptr, partials_ptr, out_ptr, (tile - X_TILES) * BLOCK_C, PIXELS, STEPS, eps,
            C2, C1, C1, C2, WIDTH, SILU, EVEN, BLOCK_P, BLOCK_C, TILE_GROUPS, BLOCK_W, BLOCK_K,
        )  # fmt: skip


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
    """The two launches of `group_norm` into out [B, H, W, C+C₂]."""
    batch, height, width, c1 = x.shape
    c2 = 0 if skip is None else skip.shape[-1]
    pixels, group = height * width, (c1 + c2) // groups
    config = config or choose_config(batch, pixels, c1, c2)
    chunks = triton.cdiv(triton.cdiv(pixels, config.block_pixels), config.steps)
    tiles = triton.cdiv(c1, config.block_channels) + triton.cdiv(c2, config.block_channels)
    grid = (tiles, chunks, batch)

    partials = torch.empty(batch, chunks, 2, c1 + c2, dtype=torch.float32, device=x.device)
    inputs: dict[str, Tensor | int | float] = {"x_ptr": x, "skip_ptr": x if skip is None else skip}
    sizes: dict[str, Tensor | int | float] = {"PIXELS": pixels, "STEPS": config.steps}
    geometry = {
        "C1": c1,
        "C2": c2,
        "WIDTH": group,
        "EVEN": pixels % config.block_pixels == 0,
        "BLOCK_P": config.block_pixels,
        "BLOCK_C": config.block_channels,
    }
    # A tile begins at a multiple of `step` channels, at worst one step before the end of a group.
    step = gcd(config.block_channels, group, c1)
    tile_groups = triton.next_power_of_2(triton.cdiv(config.block_channels + group - step, group))
    block_w = triton.next_power_of_2(group)
    # 1024 partials at once are 8 a thread, all in flight together; 2048 spill on sm_100.
    block_k = max(1, min(triton.next_power_of_2(chunks), 1024 // (tile_groups * block_w)))
    merging = {"TILE_GROUPS": tile_groups, "BLOCK_W": block_w, "BLOCK_K": block_k}
    return [
        Launch(statistics_kernel, grid, inputs | {"partials_ptr": partials} | sizes, geometry, config.num_warps),
        Launch(
            apply_kernel,
            grid,
            inputs | {"w_ptr": w, "b_ptr": b, "partials_ptr": partials, "out_ptr": out} | sizes | {"eps": float(eps)},
            geometry | {"SILU": silu} | merging,
            config.num_warps,
        ),
    ]


def group_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    out: Tensor | None = None,
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
    for launch in plan_group_norm(x, w, b, groups, eps, silu, skip, out):
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
