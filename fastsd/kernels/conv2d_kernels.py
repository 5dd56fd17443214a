"""What a convolution's launches run: one tile of the product, and the sum of a split's parts. See `conv2d`."""

import triton
import triton.language as tl

from fastsd.kernels.gemm import tile_of


@triton.jit
def place(corner, tap, size, WRAP: tl.constexpr):
    """The tap's row or column; if it WRAPs, in [0, size), from at most size outside."""
    index = corner + tap
    if WRAP:
        index = tl.where(index < 0, index + size, tl.where(index >= size, index - size, index))
    return index


@triton.jit
def add_window(
    total,  # [BLOCK_M, BLOCK_N] fp32
    x_ptr,  # [B, H, W, C]
    w_ptr,  # [O, W_STRIDE], from the column of the window's first tap on
    image,  # [BLOCK_M] int64
    top,  # [BLOCK_M] row of the window's corner, of the enlarged image if UPSAMPLE; may lie outside
    left,  # [BLOCK_M] its column
    columns,  # [BLOCK_N] output channels, all below O
    start,  # first block of the depth: taps × channels
    stop,  # last one + 1
    H,
    W,
    LIMIT_H,  # rows below which a window's pixel exists: H, or the enlarged image's
    LIMIT_W,
    C: tl.constexpr,
    W_STRIDE: tl.constexpr,
    R: tl.constexpr,
    PADDED: tl.constexpr,  # a window may pass the border
    UPSAMPLE: tl.constexpr,
    WRAP_X: tl.constexpr,  # what a window passes is the other edge
    WRAP_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total + the blocks [start, stop) of the product."""
    BLOCK_M: tl.constexpr = total.shape[0]
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (image * H * W * C)[:, None] + depth[None, :]
    w_ptrs = w_ptr + columns.to(tl.int64)[None, :] * W_STRIDE + depth[:, None]
    corner = top * W + left
    for block in range(start, stop):
        tap = block // C_BLOCKS
        c = block % C_BLOCKS * BLOCK_K
        row, column = tap // R, tap % R
        pixel = corner + row * W + column
        if UPSAMPLE:
            pixel = place(top, row, LIMIT_H, WRAP_Y) // 2 * W + place(left, column, LIMIT_W, WRAP_X) // 2
        elif WRAP_X or WRAP_Y:
            pixel = place(top, row, LIMIT_H, WRAP_Y) * W + place(left, column, LIMIT_W, WRAP_X)
        x_here = x_ptrs + (pixel * C + c)[:, None]
        w_here = w_ptrs + tap * C + c
        seen = tl.full((BLOCK_M, BLOCK_K), True, tl.int1)  # the compiler drops what stays constant
        if PADDED and not (WRAP_X and WRAP_Y):
            y, x = 0 if WRAP_Y else top + row, 0 if WRAP_X else left + column  # what wraps is always inside
            seen &= ((y >= 0) & (y < LIMIT_H) & (x >= 0) & (x < LIMIT_W))[:, None]
        if C % BLOCK_K != 0:
            seen &= (depth < C - c)[None, :]
        a = tl.load(x_here, mask=seen, other=0.0)
        w = tl.load(w_here) if C % BLOCK_K == 0 else tl.load(w_here, mask=(depth < C - c)[:, None], other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
    return total


@triton.jit
def finish(
    y,  # [BLOCK_M, BLOCK_N] fp32
    b_ptr,  # [N], if HAS_BIAS
    more_b_ptr,  # [N] the shortcut's, if HAS_SHORTCUT
    channel_bias_ptr,  # [B, N] of the given row stride, if HAS_CHANNEL_BIAS
    residual_ptr,  # [M, N], if HAS_RESIDUAL
    image,  # [BLOCK_M] int64
    offs,  # [BLOCK_M, BLOCK_N] int64, in the output
    columns,  # [BLOCK_N]
    inside,  # [BLOCK_M, BLOCK_N]
    channel_bias_stride,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    HAS_CHANNEL_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ONE_IMAGE: tl.constexpr,  # the tile lies in one image
):
    known = columns < N
    row = tl.zeros((columns.shape[0],), tl.float32)
    if HAS_BIAS:
        row += tl.load(b_ptr + columns, mask=known, other=0.0).to(tl.float32)
    if HAS_SHORTCUT:
        row += tl.load(more_b_ptr + columns, mask=known, other=0.0).to(tl.float32)
    if HAS_CHANNEL_BIAS and ONE_IMAGE:
        row += tl.load(channel_bias_ptr + tl.min(image, 0) * channel_bias_stride + columns, mask=known, other=0.0).to(
            tl.float32
        )
    y += row[None, :]
    if HAS_CHANNEL_BIAS and not ONE_IMAGE:
        rows_ptr = channel_bias_ptr + image[:, None] * channel_bias_stride
        y += tl.load(rows_ptr + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def store_statistics(y, partials_ptr, tile, columns, N: tl.constexpr):
    """Mean of each channel over the tile's pixels, and M2, the sum of the squares of the deviations from it.

    y [BLOCK_M, BLOCK_N] fp32, its pixels all of one image: the tiles of an image follow each other.
    """
    mean = tl.sum(y, 0) / y.shape[0]
    delta = y - mean[None, :]
    here_ptr = partials_ptr + tile.to(tl.int64) * (2 * N) + columns
    tl.store(here_ptr, mean, mask=columns < N)
    tl.store(here_ptr + N, tl.sum(delta * delta, 0), mask=columns < N)


@triton.jit
def conv_kernel(
    x_ptr,  # [B, H, W, C]
    w_ptr,  # [PHASES, N, R, R, C]
    b_ptr,  # [N], if HAS_BIAS
    channel_bias_ptr,  # [B, N] of the given row stride, if HAS_CHANNEL_BIAS
    residual_ptr,  # [M, N], if HAS_RESIDUAL
    more_x_ptr,  # [M, C1], if C1
    more_skip_ptr,  # [M, C2], if C2
    more_w_ptr,  # [N, C1 + C2], if C1
    more_b_ptr,  # [N], if C1
    out_ptr,  # [M, N]; with SPLIT_K > 1 fp32 partial sums [SPLIT_K, M, N]
    partials_ptr,  # [M / BLOCK_M, 2, N] fp32, if STATISTICS
    M,  # windows of a phase: output pixels of all images
    H,
    W,
    OUT_H,  # windows of a phase
    OUT_W,
    channel_bias_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    PHASES: tl.constexpr,  # 4: the phase convolutions of an upsampling
    UPSAMPLE: tl.constexpr,
    WRAP_X: tl.constexpr,
    WRAP_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CHANNEL_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    part, phase = tl.program_id(1), tl.program_id(2)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    window = tl.minimum(rows, M - 1)  # rows and columns past the end repeat the last, and are not stored
    channels = tl.minimum(columns, N - 1)
    pixels = OUT_H * OUT_W
    image = (window // pixels).to(tl.int64)
    out_y, out_x = window % pixels // OUT_W, window % OUT_W
    top, left = out_y * STRIDE - PAD_TOP, out_x * STRIDE - PAD_LEFT
    if PHASES > 1:
        top += phase // 2
        left += phase % 2

    # The depth, in blocks: the window's, then those of the shortcut's two inputs; this part's share of it.
    DEPTH: tl.constexpr = R * R * ((C + BLOCK_K - 1) // BLOCK_K)
    DEPTH1: tl.constexpr = (C1 + BLOCK_K - 1) // BLOCK_K
    DEPTH2: tl.constexpr = (C2 + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (DEPTH + DEPTH1 + DEPTH2 + SPLIT_K - 1) // SPLIT_K
    start, stop = part * SHARE, (part + 1) * SHARE
    limit_h, limit_w = H, W
    if UPSAMPLE:
        limit_h, limit_w = OUT_H, OUT_W
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = add_window(
        y, x_ptr, w_ptr + phase.to(tl.int64) * (N * R * R * C), image, top, left, channels,
        start, tl.minimum(stop, DEPTH), H, W, limit_h, limit_w, C, R * R * C, R, R > 1, UPSAMPLE,
        WRAP_X, WRAP_Y, BLOCK_K,
    )  # fmt: skip
    if C1 > 0:
        y = add_window(
            y, more_x_ptr, more_w_ptr, image, out_y, out_x, channels,
            tl.maximum(start - DEPTH, 0), tl.minimum(stop - DEPTH, DEPTH1),
            OUT_H, OUT_W, OUT_H, OUT_W, C1, C1 + C2, 1, False, False, False, False, BLOCK_K,
        )  # fmt: skip
    if C2 > 0:
        y = add_window(
            y, more_skip_ptr, more_w_ptr + C1, image, out_y, out_x, channels,
            tl.maximum(start - DEPTH - DEPTH1, 0), tl.minimum(stop - DEPTH - DEPTH1, DEPTH2),
            OUT_H, OUT_W, OUT_H, OUT_W, C2, C1 + C2, 1, False, False, False, False, BLOCK_K,
        )  # fmt: skip

    pixel = rows.to(tl.int64)
    if PHASES > 1:
        pixel = image * (4 * pixels) + (2 * out_y + phase // 2) * (2 * OUT_W) + 2 * out_x + phase % 2
    offs = pixel[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if SPLIT_K == 1:
        y = finish(
            y, b_ptr, more_b_ptr, channel_bias_ptr, residual_ptr, image, offs, columns, inside,
            channel_bias_stride, N, HAS_BIAS, C1 > 0, HAS_CHANNEL_BIAS, HAS_RESIDUAL, ONE_IMAGE,
        )  # fmt: skip
        if STATISTICS:
            store_statistics(y, partials_ptr, m, columns, N)
    else:
        offs += part.to(tl.int64) * PHASES * M * N
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts_kernel(
    parts_ptr,  # [SPLIT_K, M, N] fp32
    b_ptr,  # [N], if HAS_BIAS
    more_b_ptr,  # [N], if HAS_SHORTCUT
    channel_bias_ptr,  # [B, N] of the given row stride, if HAS_CHANNEL_BIAS
    residual_ptr,  # [M, N], if HAS_RESIDUAL
    out_ptr,  # [M, N]
    partials_ptr,  # [M / BLOCK_M, 2, N] fp32, if STATISTICS
    M,
    PIXELS,  # of an image
    channel_bias_stride,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    HAS_CHANNEL_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (tl.minimum(rows, M - 1) // PIXELS).to(tl.int64)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offs = rows.to(tl.int64)[:, None] * N + columns[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT_K):
        y += tl.load(parts_ptr + part * tl.cast(M, tl.int64) * N + offs, mask=inside, other=0.0)
    y = finish(
        y, b_ptr, more_b_ptr, channel_bias_ptr, residual_ptr, image, offs, columns, inside,
        channel_bias_stride, N, HAS_BIAS, HAS_SHORTCUT, HAS_CHANNEL_BIAS, HAS_RESIDUAL, ONE_IMAGE,
    )  # fmt: skip
    if STATISTICS:
        store_statistics(y, partials_ptr, tl.program_id(0), columns, N)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=inside)
