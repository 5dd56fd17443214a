"""What flash attention does with one tile of keys, and how rows of a width that is no power of two are loaded and stored.

A width is a main part and a tail (48 = 32 + 16, see flash_attn.split), each a tile of its own: `total` and `total_tail` are the
columns [0, D_MAIN) and [D_MAIN, D) of the same sums.
"""

# mypy: disable-error-code="assignment, misc"
# A tuple that grows in an unrolled loop has a new type each time, which Triton follows and mypy does not.

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rows, STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of the rows, 0 from D on."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = None if FIRST + WIDTH <= D else columns[None, :] < D
    return tl.load(ptr + rows[:, None] * STRIDE + columns[None, :], mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(ptr, x, rows, left, STRIDE: tl.constexpr, FIRST: tl.constexpr, last):
    """x into columns FIRST, FIRST + 1, … of the rows below left, none from column `last` on."""
    columns = FIRST + tl.arange(0, x.shape[1])
    inside = (rows[:, None] < left) & (columns[None, :] < last)
    tl.store(ptr + rows[:, None] * STRIDE + columns[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def scores(
    q,  # [BLOCK_M, D_MAIN]
    q_tail,  # [BLOCK_M, D_TAIL], if D > D_MAIN
    k_ptr,  # [M - start, D]: the tile's keys first
    mask_ptrs,  # [BLOCK_M] the mask's rows, if MASK
    rows,  # [BLOCK_M] queries
    start,  # first key of the tile
    M,
    K_STRIDE: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    MASK_KEY_STRIDE: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    RAGGED: tl.constexpr,  # the tile may pass M
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
):
    """q·kᵀ, -inf where a query may not attend; with an additive mask in units of log2 already. fp32 [BLOCK_M, KEYS]."""
    offs = tl.arange(0, KEYS)
    if RAGGED:
        offs = tl.minimum(offs, M - 1 - start)  # keys past the end repeat the last, and are masked below
    s = tl.dot(q, tl.trans(load_rows(k_ptr, offs, K_STRIDE, 0, q.shape[1], D)), input_precision="ieee")
    if q.shape[1] < D:
        k_tail = load_rows(k_ptr, offs, K_STRIDE, q.shape[1], q_tail.shape[1], D)
        s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision="ieee")
    if MASK is not None:
        mask = tl.load(mask_ptrs[:, None] + (start + offs)[None, :] * MASK_KEY_STRIDE)
        if MASK == "boolean":
            s = tl.where(mask != 0, s, float("-inf"))
        else:
            # Rounded to q's dtype, as in the reference. The lowest fp32 must stay finite in units of log2: it is no -inf.
            mask = mask.to(q.dtype).to(tl.float32)
            s = s * LOG2_SCALE + tl.maximum(mask, -2e38) * 1.4426950408889634
            s = tl.where(mask == float("-inf"), mask, s)
    keys = start + tl.arange(0, KEYS)
    if RAGGED:
        s = tl.where(keys[None, :] < M, s, float("-inf"))
    if CAUSAL:
        s = tl.where(keys[None, :] <= rows[:, None], s, float("-inf"))
    return s


@triton.jit
def finite(top, MASK: tl.constexpr):
    """A row that may attend nowhere has the largest score -inf, and -inf - -inf is NaN: 0 instead."""
    return top if MASK is None else tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_values(
    total,  # [BLOCK_M, V_MAIN]
    total_tail,  # [BLOCK_M, D_TAIL], if D > D_MAIN
    p,  # [BLOCK_M, KEYS], 0 for keys past the end
    v_ptr,  # [M - start, D]: the tile's keys first
    start,
    M,
    V_STRIDE: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """total + p·v."""
    offs = tl.arange(0, p.shape[1])
    if RAGGED:
        offs = tl.minimum(offs, M - 1 - start)
    p = p.to(v_ptr.dtype.element_ty)
    total = tl.dot(p, load_rows(v_ptr, offs, V_STRIDE, 0, total.shape[1], D), total, input_precision="ieee")
    if D > D_MAIN:
        v_tail = load_rows(v_ptr, offs, V_STRIDE, D_MAIN, total_tail.shape[1], D)
        total_tail = tl.dot(p, v_tail, total_tail, input_precision="ieee")
    return total, total_tail


@triton.jit
def advance(
    total,
    total_tail,
    top,  # [BLOCK_M] largest score so far, in units of log2
    norm,  # [BLOCK_M] sum of exp2(score - top) so far
    s,  # [BLOCK_M, KEYS] scores of the tile
    v_ptr,
    start,
    M,
    V_STRIDE: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    MASK: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One tile of the online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    new_top = tl.maximum(top, tl.max(s, 1) * UNIT)
    base = finite(new_top, MASK)
    fade = tl.exp2(top - base)
    p = tl.exp2(s * UNIT - base[:, None])
    norm = norm * fade + tl.sum(p, 1)
    total *= fade[:, None]
    if D > D_MAIN:
        total_tail *= fade[:, None]
    total, total_tail = add_values(total, total_tail, p, v_ptr, start, M, V_STRIDE, D, D_MAIN, RAGGED)
    return total, total_tail, new_top, norm


# fmt: off
@triton.jit
def at_once(
    q, q_tail, total, total_tail, k_ptr, v_ptr, mask_ptrs, rows, M,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr,
    MASK: tl.constexpr, MASK_KEY_STRIDE: tl.constexpr, LOG2_SCALE: tl.constexpr, UNIT: tl.constexpr,
    RAGGED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, TAIL_N: tl.constexpr,
):
    """All keys: TILES tiles of BLOCK_N and one of TAIL_N (if any), whose scores stay in registers, so nothing is rescaled.

    Tiles of few keys: a tile of k or v passes through registers on its way to shared memory.
    """
    s = ()
    for i in tl.static_range(TILES):
        s += (scores(
            q, q_tail, k_ptr + i * BLOCK_N * K_STRIDE, mask_ptrs, rows, i * BLOCK_N, M, K_STRIDE, D, MASK, MASK_KEY_STRIDE,
            LOG2_SCALE, (RAGGED and TAIL_N == 0) and i == TILES - 1, CAUSAL, BLOCK_N,
        ),)
    if TAIL_N > 0:
        s += (scores(
            q, q_tail, k_ptr + TILES * BLOCK_N * K_STRIDE, mask_ptrs, rows, TILES * BLOCK_N, M, K_STRIDE, D, MASK,
            MASK_KEY_STRIDE, LOG2_SCALE, RAGGED, CAUSAL, TAIL_N,
        ),)
    top = tl.max(s[0], 1)
    for i in tl.static_range(1, len(s)):
        top = tl.maximum(top, tl.max(s[i], 1))
    top = finite(top * UNIT, MASK)
    norm = tl.zeros_like(top)
    p = ()
    for i in tl.static_range(len(s)):
        p_tile = tl.exp2(s[i] * UNIT - top[:, None])
        norm += tl.sum(p_tile, 1)
        p += (p_tile.to(v_ptr.dtype.element_ty),)  # half the registers, before the sums take theirs
    for i in tl.static_range(len(p)):
        total, total_tail = add_values(
            total, total_tail, p[i], v_ptr + i * BLOCK_N * V_STRIDE, i * BLOCK_N, M, V_STRIDE, D, D_MAIN,
            RAGGED and i == len(p) - 1,
        )
    return total, total_tail, norm
# fmt: on
