"""What a group norm's launches run: statistics of chunks, their merging, and what is done with them. See `groupnorm_silu`."""

import triton
import triton.language as tl


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
    partials_ptr,  # [B, STAT_CHUNKS, 2, C1 + C2] fp32
    out_ptr,  # [B, PIXELS, C1 + C2]
    column,  # the tile's first
    PIXELS,
    STEPS,
    STAT_PIXELS,
    STAT_CHUNKS,
    eps,
    C: tl.constexpr,  # of tile_ptr
    C_OFFS: tl.constexpr,  # of tile_ptr's first channel
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,
    PIVOTED: tl.constexpr,
    SILU: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    chunk, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    OUT_C: tl.constexpr = C1 + C2
    pixels, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_C)
    channels = C_OFFS + columns
    first_group = (C_OFFS + column) // WIDTH
    image_ptr = partials_ptr + image * STAT_CHUNKS * (2 * OUT_C)
    mean, var = merge(
        image_ptr, first_group, PIXELS, STAT_PIXELS, STAT_CHUNKS, OUT_C, WIDTH, TILE_GROUPS, BLOCK_W, BLOCK_K
    )

    # From groups to channels: a group's number is picked out of a one-hot row.
    own = (channels // WIDTH - first_group)[:, None] == tl.arange(0, TILE_GROUPS)[None, :]
    mean = tl.sum(tl.where(own, mean[None, :], 0.0), axis=1)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.where(own, var[None, :], 0.0), axis=1) + eps)
    scale = rstd * tl.load(w_ptr + channels, mask=columns < C, other=0.0).to(tl.float32)
    # The mean of x as a sum of two numbers: x − centre is exact near it, be the pivot good or not, and rest is what centre lacks.
    pivot = tl.zeros((BLOCK_C,), tl.float32)
    if PIVOTED:
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
    partials_ptr,  # [B, STAT_CHUNKS, 2, C1 + C2] fp32: mean − pivot, M2
    out_ptr,  # [B, PIXELS, C1 + C2]
    PIXELS,
    STEPS,
    STAT_PIXELS,  # pixels of a chunk of partials
    STAT_CHUNKS,
    eps,
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    PIVOTED: tl.constexpr,  # the partials are of x − pivot, not of x
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
            x_ptr, x_ptr, skip_ptr, w_ptr, b_ptr, partials_ptr, out_ptr, tile * BLOCK_C,
            PIXELS, STEPS, STAT_PIXELS, STAT_CHUNKS, eps,
            C1, 0, C1, C2, WIDTH, PIVOTED, SILU, EVEN, BLOCK_P, BLOCK_C, TILE_GROUPS, BLOCK_W, BLOCK_K,
        )  # fmt: skip
    elif C2 > 0:
        apply_to_chunk(
            skip_ptr, x_ptr, skip_ptr, w_ptr, b_ptr, partials_ptr, out_ptr, (tile - X_TILES) * BLOCK_C,
            PIXELS, STEPS, STAT_PIXELS, STAT_CHUNKS, eps,
            C2, C1, C1, C2, WIDTH, PIVOTED, SILU, EVEN, BLOCK_P, BLOCK_C, TILE_GROUPS, BLOCK_W, BLOCK_K,
        )  # fmt: skip


@triton.jit
def condense_kernel(
    partials_ptr,  # [B, CHUNKS, 2, C] fp32: mean, M2, all of chunks of STAT_PIXELS
    out_ptr,  # [B, CHUNKS / FOLD, 2, C] fp32
    STAT_PIXELS,
    C: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Every FOLD chunks become one: what each CTA of `apply_kernel` merges stays small, however large the image."""
    chunk = tl.program_id(1).to(tl.int64)  # of out, of all images
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    chunks = chunk * FOLD + tl.arange(0, FOLD)
    offs = chunks[:, None] * (2 * C) + columns[None, :]
    inside = (columns < C)[None, :]
    means = tl.load(partials_ptr + offs, mask=inside, other=0.0)
    m2 = tl.load(partials_ptr + offs + C, mask=inside, other=0.0)
    mean = tl.sum(means, 0) / FOLD
    spread = means - mean[None, :]
    here_ptr = out_ptr + chunk * (2 * C) + columns
    tl.store(here_ptr, mean, mask=columns < C)
    tl.store(here_ptr + C, tl.sum(m2 + spread * spread * STAT_PIXELS, 0), mask=columns < C)
