"""Group norm in one launch: a CTA takes one group of one image, alone. For small images, whose second launch costs as much as
its work; and for a convolution whose depth was split, which ends in the norm instead of in a sum. See `groupnorm_silu`."""

import triton
import triton.language as tl

from fastsd.kernels.groupnorm_kernels import inside_tile


@triton.jit
def load_group(
    x_ptr,  # [PIXELS, C1] of one image
    skip_ptr,  # [PIXELS, C2]
    pixels,  # [BLOCK_P]
    channels,  # [BLOCK_W] of x and skip side by side
    inside,  # [BLOCK_P, BLOCK_W]
    C1: tl.constexpr,
    C2: tl.constexpr,
):
    """[BLOCK_P, BLOCK_W] fp32; a group may lie in both."""
    in_x = inside & (channels < C1)[None, :]
    x = tl.load(x_ptr + pixels[:, None] * C1 + channels[None, :], mask=in_x, other=0.0).to(tl.float32)
    if C2 > 0:
        in_skip = inside & (channels >= C1)[None, :]
        x += tl.load(skip_ptr + pixels[:, None] * C2 + (channels - C1)[None, :], mask=in_skip, other=0.0).to(tl.float32)
    return x


@triton.jit
def whole_kernel(
    x_ptr,  # [B, PIXELS, C1]
    skip_ptr,  # [B, PIXELS, C2], unread if C2 = 0
    w_ptr,  # [C1 + C2]
    b_ptr,  # [C1 + C2]
    out_ptr,  # [B, PIXELS, C1 + C2]
    PIXELS,
    eps,
    C1: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    SILU: tl.constexpr,
    EVEN: tl.constexpr,  # PIXELS % BLOCK_P == 0
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,  # ≥ WIDTH
):
    """Three walks over the group, of which the second and third find it in the SM's cache: mean, variance, result."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    OUT_C: tl.constexpr = C1 + C2
    within = tl.arange(0, BLOCK_W)
    channels = group * WIDTH + within
    known = within < WIDTH
    x_ptr += image * PIXELS * C1
    skip_ptr += image * PIXELS * C2
    size = 1.0 * WIDTH * PIXELS

    first = group * WIDTH
    pivot = tl.load(x_ptr + first, mask=first < C1, other=0.0).to(tl.float32)
    if C2 > 0:
        pivot += tl.load(skip_ptr + first - C1, mask=first >= C1, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        pixels = start + tl.arange(0, BLOCK_P)
        inside = inside_tile(pixels, PIXELS, within, WIDTH, EVEN, BLOCK_P, BLOCK_W)
        total += tl.where(inside, load_group(x_ptr, skip_ptr, pixels, channels, inside, C1, C2) - pivot, 0.0)
    mean = tl.sum(total) / size
    # The mean of x as a sum of two numbers: x − centre is exact near it, be the pivot good or not, and rest is what centre lacks.
    centre = pivot + mean
    rest = mean - (centre - pivot)

    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        pixels = start + tl.arange(0, BLOCK_P)
        inside = inside_tile(pixels, PIXELS, within, WIDTH, EVEN, BLOCK_P, BLOCK_W)
        delta = load_group(x_ptr, skip_ptr, pixels, channels, inside, C1, C2) - centre - rest
        total += tl.where(inside, delta * delta, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(total) / size + eps)
    scale = rstd * tl.load(w_ptr + channels, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(b_ptr + channels, mask=known, other=0.0).to(tl.float32) - rest * scale

    out_ptr += image * PIXELS * OUT_C
    for start in range(0, PIXELS, BLOCK_P):
        pixels = start + tl.arange(0, BLOCK_P)
        inside = inside_tile(pixels, PIXELS, within, WIDTH, EVEN, BLOCK_P, BLOCK_W)
        y = load_group(x_ptr, skip_ptr, pixels, channels, inside, C1, C2) - centre
        y = y * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_ptr + pixels[:, None] * OUT_C + channels[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts_norm_kernel(
    parts_ptr,  # [SPLIT_K, B, PIXELS, N] fp32
    b_ptr,  # [N]
    channel_bias_ptr,  # [B, N] of the given row stride, if HAS_CHANNEL_BIAS
    norm_w_ptr,  # [N]
    norm_b_ptr,  # [N]
    out_ptr,  # [B, PIXELS, N]
    PIXELS,
    channel_bias_stride,
    eps,
    N: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    HAS_CHANNEL_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr,  # PIXELS == BLOCK_P
    BLOCK_P: tl.constexpr,  # ≥ PIXELS
    BLOCK_W: tl.constexpr,  # ≥ WIDTH
):
    """silu(group_norm(sum of the parts + bias + channel_bias)); the group stays in registers."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels, within = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    channels = group * WIDTH + within
    known = within < WIDTH
    inside = inside_tile(pixels, PIXELS, within, WIDTH, EVEN, BLOCK_P, BLOCK_W)
    offs = (image * PIXELS + pixels)[:, None] * N + channels[None, :]
    part_size = tl.num_programs(1).to(tl.int64) * PIXELS * N
    y = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for part in tl.static_range(SPLIT_K):
        y += tl.load(parts_ptr + part * part_size + offs, mask=inside, other=0.0)
    row = tl.load(b_ptr + channels, mask=known, other=0.0).to(tl.float32)
    if HAS_CHANNEL_BIAS:
        bias_ptr = channel_bias_ptr + image * channel_bias_stride + channels
        row += tl.load(bias_ptr, mask=known, other=0.0).to(tl.float32)
    y += row[None, :]

    size = 1.0 * WIDTH * PIXELS
    delta = tl.where(inside, y - tl.sum(tl.where(inside, y, 0.0)) / size, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(delta * delta) / size + eps)
    scale = rstd * tl.load(norm_w_ptr + channels, mask=known, other=0.0).to(tl.float32)
    y = delta * scale[None, :] + tl.load(norm_b_ptr + channels, mask=known, other=0.0).to(tl.float32)[None, :]
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=inside)
