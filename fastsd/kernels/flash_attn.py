"""Attention, softmax(q·kᵀ/√D + mask)·v a head, without the L×M scores in memory (FlashAttention-2, Dao 2023, arXiv 2307.08691).

Reads (L + 2M)·N·D and writes L·N·D elements an image, k and v once more for each tile of queries, mostly from L2;
4·L·M·N·D operations. Scores, softmax and sums are fp32; 1/√D·log₂e is folded into exp2 and the division comes last.
An axis that is no power of two is a main part and a tail (40 = 32 + 8 in 16, 77 keys = 64 + 13 in 16), never the next power.
Keys that fit a tile (77, 154) are one pass: nothing is rescaled. Programs share the value columns of a head of 512 (VAE).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.launch import FLOATS, Launch

SMALLEST_SHARED = 101376
"""Bytes of shared memory a program may have on sm_86 and sm_89, the least of the GPUs served."""
LOG2E = 1.4426950408889634


class Config(NamedTuple):
    block_m: int
    """Queries a program."""
    block_n: int
    """Keys a tile."""
    num_warps: int
    num_stages: int
    tail_n: int = 0
    """Keys of the second tile, if one_pass."""
    one_pass: bool = False
    value_columns: int = 0
    """Columns of v a program, if not all."""


def split(width: int) -> tuple[int, int]:
    """A main part and a tail, powers of two ≥ 16 (or no tail, 0) that hold width: 40 → 32 + 16, 80 → 64 + 16, 24 → 32."""
    whole = max(16, triton.next_power_of_2(width))
    main = whole // 2
    tail = max(16, triton.next_power_of_2(max(width - main, 1)))
    return (main, tail) if main < width and main >= 16 and main + tail < whole else (whole, 0)


def choose_config(length: int, keys: int, head_dim: int, dtype: torch.dtype, shared: int = SMALLEST_SHARED) -> Config:
    """Starting tiles of shared/KERNELS.md, not yet tuned on a device: the first that fits `shared` bytes of shared memory.

    fp32 takes small tiles: it does not run on tensor cores.
    """
    if dtype == torch.float32:
        if head_dim == 512:
            return Config(16, 16, 4, 1, value_columns=128)
        return Config(32, 32, 4, 1) if head_dim <= 80 else Config(16, 16, 4, 1)
    loops = [Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2)]
    if head_dim == 512:
        loops = [
            Config(bm, bn, 8, stages, value_columns=256) for bm, bn, stages in ((128, 32, 2), (64, 32, 2), (64, 16, 1))
        ]
    elif length <= 256:
        loops = [Config(64, 64, 4, 2), Config(64, 32, 4, 2)]
    elif head_dim > 128:
        loops = [Config(128, 64, 8, 2), Config(128, 32, 8, 2)]
    block_n, tail_n = split(keys)
    if keys <= 160 and (block_n + tail_n) * sum(split(head_dim)) <= 12800:  # more spills registers on sm_8x
        block_m = 128 if length > 256 else 64
        loops.insert(0, Config(block_m, block_n, 8 if block_m == 128 or keys > 128 else 4, 1, tail_n, one_pass=True))
    return next(config for config in loops if shared_bytes(config, head_dim) <= shared)


def shared_bytes(config: Config, head_dim: int) -> int:
    """What a config takes in half precision: the queries, then each stage's keys and values; in one pass, either at a time."""
    width = sum(split(head_dim))
    keys = config.block_n + config.tail_n
    stages = width if config.one_pass else config.num_stages * (width + (config.value_columns or width))
    return 2 * (config.block_m * width + keys * stages) + 1024


@triton.jit
def load_rows(ptr, rows, STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of the rows, 0 from D on."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = None if FIRST + WIDTH <= D else columns[None, :] < D
    return tl.load(ptr + rows[:, None] * STRIDE + columns[None, :], mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(ptr, x, rows, left, STRIDE: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr):
    """x into columns FIRST, FIRST + 1, … of the rows below left, none from D on."""
    columns = FIRST + tl.arange(0, x.shape[1])
    inside = (rows[:, None] < left) & (columns[None, :] < D)
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
def attention_kernel(
    q_ptr,  # [B, L, N, D]
    k_ptr,  # [B, M, N, D]
    v_ptr,  # [B, M, N, D]
    mask_ptr,  # [B, N, L, M] of any strides, if MASK
    out_ptr,  # [B, L, N, D]
    L, M,
    q_batch_stride, k_batch_stride, v_batch_stride, out_batch_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,  # of a token
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr, OUT_HEAD_STRIDE: tl.constexpr,
    MASK_KEY_STRIDE: tl.constexpr,
    MASK: tl.constexpr,  # None, "boolean" (uint8) or "additive"
    LOG2_SCALE: tl.constexpr,  # log2(e) / sqrt(D)
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,  # the last tile of keys is not full
    ONE_PASS: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    V_PARTS: tl.constexpr,  # programs that share the columns of v
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
):
    tile = tl.program_id(0) // V_PARTS
    part = tl.program_id(0) % V_PARTS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    V_MAIN: tl.constexpr = D_MAIN // V_PARTS
    UNIT: tl.constexpr = 1.0 if MASK == "additive" else LOG2_SCALE  # of the scores, in log2
    first = tile.to(tl.int64) * BLOCK_M
    q_ptr += batch * q_batch_stride + head * Q_HEAD_STRIDE + first * Q_STRIDE
    k_ptr += batch * k_batch_stride + head * K_HEAD_STRIDE
    v_ptr += batch * v_batch_stride + head * V_HEAD_STRIDE + part * V_MAIN
    out_ptr += batch * out_batch_stride + head * OUT_HEAD_STRIDE + first * OUT_STRIDE + part * V_MAIN

    offs = tl.arange(0, BLOCK_M)
    left = L - tile * BLOCK_M
    q_offs = tl.minimum(offs, left - 1)  # queries past the end repeat the last, and are not stored
    rows = tile * BLOCK_M + q_offs
    mask_ptrs = rows
    if MASK is not None:
        mask_ptrs = mask_ptr + batch * mask_batch_stride + head * mask_head_stride + rows.to(tl.int64) * mask_row_stride
    q = load_rows(q_ptr, q_offs, Q_STRIDE, 0, D_MAIN, D)
    q_tail = q
    total = tl.zeros((BLOCK_M, V_MAIN), tl.float32)
    total_tail = tl.zeros((BLOCK_M, 16), tl.float32)  # unused without a tail
    if D_TAIL > 0:
        q_tail = load_rows(q_ptr, q_offs, Q_STRIDE, D_MAIN, D_TAIL, D)
        total_tail = tl.zeros((BLOCK_M, D_TAIL), tl.float32)

    if ONE_PASS:
        LAST: tl.constexpr = RAGGED and TAIL_N == 0
        s = scores(
            q, q_tail, k_ptr, mask_ptrs, rows, 0, M,
            K_STRIDE, D, MASK, MASK_KEY_STRIDE, LOG2_SCALE, LAST, CAUSAL, BLOCK_N,
        )
        top = tl.max(s, 1) * UNIT
        if TAIL_N > 0:
            s_tail = scores(
                q, q_tail, k_ptr + BLOCK_N * K_STRIDE, mask_ptrs, rows, BLOCK_N, M,
                K_STRIDE, D, MASK, MASK_KEY_STRIDE, LOG2_SCALE, RAGGED, CAUSAL, TAIL_N,
            )
            top = tl.maximum(top, tl.max(s_tail, 1) * UNIT)
        top = finite(top, MASK)
        p = tl.exp2(s * UNIT - top[:, None])
        norm = tl.sum(p, 1)
        total, total_tail = add_values(total, total_tail, p, v_ptr, 0, M, V_STRIDE, D, D_MAIN, LAST)
        if TAIL_N > 0:
            p = tl.exp2(s_tail * UNIT - top[:, None])
            norm += tl.sum(p, 1)
            v_ptr += BLOCK_N * V_STRIDE
            total, total_tail = add_values(total, total_tail, p, v_ptr, BLOCK_N, M, V_STRIDE, D, D_MAIN, RAGGED)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        norm = tl.zeros((BLOCK_M,), tl.float32)
        stop = M
        edge = M // BLOCK_N * BLOCK_N  # below it every key exists and, if CAUSAL, may be attended to
        if CAUSAL:
            stop = tl.minimum(M, (tile + 1) * BLOCK_M)
            edge = tl.minimum(M, tile * BLOCK_M) // BLOCK_N * BLOCK_N
        for start in range(0, edge, BLOCK_N):
            s = scores(
                q, q_tail, k_ptr, mask_ptrs, rows, start, M,
                K_STRIDE, D, MASK, MASK_KEY_STRIDE, LOG2_SCALE, False, False, BLOCK_N,
            )
            total, total_tail, top, norm = advance(
                total, total_tail, top, norm, s, v_ptr, start, M, V_STRIDE, D, D_MAIN, MASK, UNIT, False
            )
            k_ptr += BLOCK_N * K_STRIDE
            v_ptr += BLOCK_N * V_STRIDE
        if RAGGED or CAUSAL:
            for start in range(edge, stop, BLOCK_N):
                s = scores(
                    q, q_tail, k_ptr, mask_ptrs, rows, start, M,
                    K_STRIDE, D, MASK, MASK_KEY_STRIDE, LOG2_SCALE, RAGGED, CAUSAL, BLOCK_N,
                )
                total, total_tail, top, norm = advance(
                    total, total_tail, top, norm, s, v_ptr, start, M, V_STRIDE, D, D_MAIN, MASK, UNIT, RAGGED
                )
                k_ptr += BLOCK_N * K_STRIDE
                v_ptr += BLOCK_N * V_STRIDE

    if MASK is not None:
        norm = tl.where(norm == 0.0, 1.0, norm)  # attended nowhere: 0 / 1
    store_rows(out_ptr, total / norm[:, None], offs, left, OUT_STRIDE, 0, D)
    if D_TAIL > 0:
        store_rows(out_ptr, total_tail / norm[:, None], offs, left, OUT_STRIDE, D_MAIN, D)
# fmt: on


def plan_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    out: Tensor,
    config: Config | None = None,
    shared: int | None = None,
) -> list[Launch]:
    """The launch of `attention` into out [B, L, N, D]. shared: bytes of shared memory a program may have, by default the
    device's, or the least of all GPUs' for tensors that are on none."""
    batch, length, heads, head_dim = q.shape
    keys = k.shape[1]
    config = config or choose_config(length, keys, head_dim, q.dtype, shared or _shared(q.device))
    main, tail = split(head_dim)
    parts = main // (config.value_columns or main)
    tensors = {"q": q, "k": k, "v": v, "out": out}
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    kind, mask_tensor = None, q  # unread if absent
    if mask is not None:
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        mask_tensor = mask.view(torch.uint8) if kind == "boolean" else mask
        mask_strides = mask.expand(batch, heads, length, keys).stride()
    return [
        Launch(
            attention_kernel,
            (triton.cdiv(length, config.block_m) * parts, heads, batch),
            {
                **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
                "mask_ptr": mask_tensor,
                "L": length,
                "M": keys,
                **{f"{name}_batch_stride": tensor.stride(0) for name, tensor in tensors.items()},
                "mask_batch_stride": mask_strides[0],
                "mask_head_stride": mask_strides[1],
                "mask_row_stride": mask_strides[2],
            },
            {
                **{f"{name.upper()}_STRIDE": tensor.stride(1) for name, tensor in tensors.items()},
                **{f"{name.upper()}_HEAD_STRIDE": tensor.stride(2) for name, tensor in tensors.items()},
                "MASK_KEY_STRIDE": mask_strides[3],
                "MASK": kind,
                "LOG2_SCALE": LOG2E / math.sqrt(head_dim),
                "CAUSAL": causal,
                "RAGGED": keys % config.block_n != 0,
                "ONE_PASS": config.one_pass,
                "D": head_dim,
                "D_MAIN": main,
                "D_TAIL": tail,
                "V_PARTS": parts,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "TAIL_N": config.tail_n,
            },
            config.num_warps,
            config.num_stages,
        )
    ]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√D + mask)·v a head. q [B, L, N, D], k v [B, M, N, D] → [B, L, N, D]; D in 8 … 160, or 512.

    mask, broadcastable to [B, N, L, M], is boolean (True: attend) or additive. A row that may attend nowhere gives 0.
    Any strides but the last axis', which must be 1. ValueError for what the kernel does not serve.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check_tensors({"q": q, "k": k, "v": v, "out": out})
    if mask is not None:
        _check_mask(mask, q, k, causal)
    for launch in plan_attention(q, k, v, mask, causal, out):
        launch.run()
    return out


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    q, k = tensors["q"], tensors["k"]
    if q.dtype not in FLOATS or any(tensor.dtype != q.dtype for tensor in tensors.values()):
        raise ValueError(
            f"q, k, v and out must all be fp16, bf16 or fp32, not {[str(t.dtype) for t in tensors.values()]}"
        )
    if any(tensor.device != q.device for tensor in tensors.values()):
        raise ValueError("q, k, v and out must be on one device")
    if q.device.type != "cuda" and not (q.device.type == "cpu" and triton.knobs.runtime.interpret):
        raise ValueError(f"the kernel runs on CUDA, or on the CPU with TRITON_INTERPRET=1, not on {q.device}")
    if triton.knobs.runtime.interpret and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter cannot multiply bf16 matrices")
    if any(tensor.ndim != 4 for tensor in tensors.values()):
        raise ValueError("q, k, v and out must have 4 axes: [batch, tokens, heads, head dim]")
    batch, _, heads, head_dim = q.shape
    for name, tensor in tensors.items():
        shape = (batch, k.shape[1] if name in ("k", "v") else q.shape[1], heads, head_dim)
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, but beside q and k it must be {list(shape)}")
        if not tensor.numel():
            raise ValueError(f"{name} has no elements")
        if tensor.stride(3) != 1:
            raise ValueError(f"the last axis of {name} must be contiguous; its stride is {tensor.stride(3)}")
    if not (8 <= head_dim <= 160 or head_dim == 512):
        raise ValueError(f"head dim {head_dim} is not served: only 8 to 160, and 512")
    if batch > 65535 or heads > 65535:
        raise ValueError(f"batch {batch} or heads {heads} is above 65535, the largest CUDA grid")


def _check_mask(mask: Tensor, q: Tensor, k: Tensor, causal: bool) -> None:
    if causal:
        raise ValueError("mask and causal exclude each other; put the causal part into the mask")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise ValueError(f"mask must be boolean, fp16, bf16 or fp32, not {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, q on {q.device}")
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    sizes = mask.shape[::-1]
    if mask.ndim > 4 or any(size not in (1, full) for size, full in zip(sizes, shape[::-1], strict=False)):
        raise ValueError(f"mask {list(mask.shape)} does not broadcast to {list(shape)}")


def _shared(device: torch.device) -> int:
    if device.type != "cuda":
        return SMALLEST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED))
