"""Attention, softmax(q·kᵀ/√D + mask)·v a head, without the L×M scores in memory (FlashAttention-2, Dao 2023, arXiv 2307.08691).

Reads (L + 2M)·N·D and writes L·N·D elements an image, k and v once more for each tile of queries, mostly from L2;
4·L·M·N·D operations. Scores, softmax and sums are fp32; 1/√D·log₂e is folded into exp2 and the division comes last.
An axis that is no power of two is a main part and a tail (40 = 32 + 8 in 16, 77 keys = 64 + 13 in 16), never the next power.
Keys whose scores fit registers (77, 154, 231) are one pass: nothing is rescaled. Programs share the value columns of a head
of 512 (VAE).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.attention_tiles import advance, at_once, load_rows, scores, store_rows
from fastsd.kernels.launch import FLOATS, SHARED_MEMORY, Launch

SMALLEST_SHARED = min(SHARED_MEMORY.values())
"""Bytes of shared memory a program may have on sm_86 and sm_89, the least of the GPUs served."""
SM80_SHARED = SHARED_MEMORY[80]
"""The same on sm_80; sm_90 and sm_100 have 232448."""
LOG2E = 1.4426950408889634


class Config(NamedTuple):
    block_m: int
    """Queries a program."""
    block_n: int
    """Keys a tile."""
    num_warps: int
    num_stages: int
    tail_n: int = 0
    """Keys of the last tile if one_pass, where no more are left."""
    one_pass: bool = False
    """The scores of all keys stay in registers: nothing is rescaled. Else the keys come tile by tile, any number of them."""
    value_columns: int = 0
    """Columns of v a program, if not all."""


def split(width: int) -> tuple[int, int]:
    """A main part and a tail, powers of two ≥ 16 (or no tail, 0) that hold width: 40 → 32 + 16, 80 → 64 + 16, 24 → 32."""
    whole = max(16, triton.next_power_of_2(width))
    main = whole // 2
    tail = max(16, triton.next_power_of_2(max(width - main, 1)))
    return (main, tail) if main < width and main >= 16 and main + tail < whole else (whole, 0)


def choose_config(
    length: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    shared: int = SMALLEST_SHARED,
    masked: bool = False,
    causal: bool = False,
) -> Config:
    """For half precision: one pass if its registers suffice, else the first of the starting tiles of shared/KERNELS.md that
    fits `shared` bytes of shared memory. Not yet tuned on a device. head_dim: columns of q, k and v as stored.

    One pass holds up to 240 keys, but above a head of 80 on sm_8x only 160: there 231 keys at 160 spill 48 bytes by 64 queries
    (sm_80, Triton 3.9), 24 to 64 by 128 (Triton 3.6). 256 keys spill 8 bytes at 40 and 48 to 56 at 160. A mask takes registers
    of its own: masked, 231 keys at 160 spill 152 bytes on sm_90, causal 8; so a causal pass holds 160 keys, a masked one 160,
    or 80 above a head of 80. All that is more comes tile by tile; masked by 32 keys, since 64 spill up to 560 bytes at 48;
    at 64 and 80 by 64, since there 32 spill.

    fp32 takes small tiles: it does not run on tensor cores.
    """
    if dtype == torch.float32:
        if head_dim == 512:
            return Config(16, 16, 4, 1, value_columns=128)
        return Config(32, 32, 4, 1) if head_dim <= 80 else Config(16, 16, 4, 1)
    whole = _one_pass(length, keys, head_dim, shared, masked, causal)
    if whole is not None:
        return whole
    loops = [Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2)]
    if head_dim == 512:
        loops = [
            Config(bm, bn, 8, stages, value_columns=256) for bm, bn, stages in ((128, 32, 2), (64, 32, 2), (64, 16, 1))
        ]
    elif masked and not 64 <= head_dim <= 80:
        loops = [Config(64, 32, 4, 2)]
    elif masked or length <= 256:
        loops = [Config(64, 64, 4, 2), Config(64, 32, 4, 2)]
    elif head_dim > 128:
        loops = [Config(128, 64, 8, 2), Config(128, 32, 8, 2)]
    return next(config for config in loops if shared_bytes(config, head_dim, masked=masked) <= shared)


def _one_pass(length: int, keys: int, width: int, shared: int, masked: bool, causal: bool) -> Config | None:
    """A tile of k or v passes through registers on its way to shared memory: where the scores leave few, it is small."""
    wide = width > 80
    if width > 160 or keys > 240:
        return None
    if keys <= (80 if wide and masked else 160):
        block_n = 64 if wide else 128
        return in_one_pass(128 if length > 256 else 64, block_n // 2 if masked else block_n, keys)
    if masked or causal or (wide and shared <= SM80_SHARED):
        return None
    return in_one_pass(128 if 64 <= width <= 80 else 64, 32 if wide else 64, keys)


def in_one_pass(block_m: int, block_n: int, keys: int) -> Config:
    """Tiles of at most block_n keys and, where it spares some, a smaller last one: 77 → 64 + 16, 231 by 32 → 7·32 + 16."""
    block_n = min(block_n, split(keys)[0])
    tail_n = max(16, triton.next_power_of_2(keys % block_n)) if keys % block_n else 0
    return Config(block_m, block_n, block_m // 16, 1, tail_n if tail_n < block_n else 0, one_pass=True)


def candidates(length: int, keys: int, head_dim: int, dtype: torch.dtype, shared: int) -> list[Config]:
    """At most 12 configs worth timing on a device of `shared` bytes of shared memory a program; choose_config's comes first."""
    configs = [choose_config(length, keys, head_dim, dtype, shared)]
    sizes = (64, 128) if length > 64 else (64,)
    if dtype == torch.float32:
        parts = 128 if head_dim == 512 else 0
        configs += [Config(bm, bn, 4, 1, value_columns=parts) for bm, bn in ((16, 16), (32, 16), (16, 32), (32, 32))]
    elif head_dim == 512:
        shapes = ((64, 16, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 1), (128, 32, 8, 2), (128, 64, 8, 1))
        configs += [Config(*shape, value_columns=256) for shape in shapes]
        configs += [Config(*shape, value_columns=128) for shape in ((64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2))]
    else:
        if keys <= 320:
            wide = head_dim > 80
            configs += [in_one_pass(bm, bn, keys) for bm in sizes for bn in ((32, 64) if wide else (64, 128))]
        loops = [(64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 3), (128, 128, 8, 3)]
        loops += [(64, 128, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3), (128, 64, 4, 2)]
        configs += [Config(*shape) for shape in loops if shape[0] in sizes]
    fitting = [config for config in dict.fromkeys(configs) if shared_bytes(config, head_dim, dtype.itemsize) <= shared]
    return fitting[:12]


def tiles(config: Config, keys: int) -> tuple[int, int]:
    """How many tiles of block_n keys are kept in registers, and the keys of the last, smaller one; (0, 0) tile by tile."""
    if not config.one_pass:
        return 0, 0
    if 0 < keys % config.block_n <= config.tail_n:
        return keys // config.block_n, config.tail_n
    return triton.cdiv(keys, config.block_n), 0


def shared_bytes(config: Config, width: int, itemsize: int = 2, masked: bool = False) -> int:
    """What a config takes at most: the queries, then each stage's keys and values; in one pass, one tile of either at a time.
    A mask is counted in fp32, and comes a stage later than the keys."""
    columns = sum(split(width))
    stages = columns if config.one_pass else config.num_stages * (columns + (config.value_columns or columns))
    mask = 4 * config.block_m * config.block_n * max(1, config.num_stages - 1) if masked else 0
    return itemsize * (config.block_m * columns + config.block_n * stages) + mask + 1024


# fmt: off
@triton.jit
def attention_kernel(
    q_ptr,  # [B, L, N, D]
    k_ptr,  # [B, M, N, D]
    v_ptr,  # [B, M, N, D]
    mask_ptr,  # [B, N, L, M] of any strides, if MASK
    out_ptr,  # [B, L, N, HEAD_DIM]
    L, M,
    q_batch_stride, k_batch_stride, v_batch_stride, out_batch_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,  # of a token
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr, OUT_HEAD_STRIDE: tl.constexpr,
    MASK_KEY_STRIDE: tl.constexpr,
    MASK: tl.constexpr,  # None, "boolean" (uint8) or "additive"
    LOG2_SCALE: tl.constexpr,  # log2(e) / sqrt(HEAD_DIM)
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,  # the last tile of keys is not full
    TILES: tl.constexpr,  # of BLOCK_N keys, all in registers, and then one of TAIL_N; 0: tile by tile
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,  # q, k and v are 0 in the columns from here to D
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

    if TILES > 0:
        total, total_tail, norm = at_once(
            q, q_tail, total, total_tail, k_ptr, v_ptr, mask_ptrs, rows, M,
            K_STRIDE, V_STRIDE, D, D_MAIN, MASK, MASK_KEY_STRIDE, LOG2_SCALE, UNIT, RAGGED, CAUSAL, BLOCK_N, TILES, TAIL_N,
        )
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
    store_rows(out_ptr, total / norm[:, None], offs, left, OUT_STRIDE, 0, HEAD_DIM - part * V_MAIN)
    if D_TAIL > 0:
        store_rows(out_ptr, total_tail / norm[:, None], offs, left, OUT_STRIDE, D_MAIN, HEAD_DIM)
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
    head_dim: int | None = None,
) -> list[Launch]:
    """The launch of `attention` into out [B, L, N, head_dim]. shared: bytes of shared memory a program may have, by default the
    device's, or the least of all GPUs' for tensors that are on none. ValueError for value_columns that do not divide D."""
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    head_dim = width if head_dim is None else head_dim
    if config is None:
        config = choose_config(length, keys, width, q.dtype, shared or _shared(q.device), mask is not None, causal)
    main, tail = split(width)
    if config.value_columns and (tail or main % config.value_columns):
        raise ValueError(f"value_columns {config.value_columns} do not divide a head of {width} columns")
    full, tail_n = tiles(config, keys)
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
                "RAGGED": keys != full * config.block_n + tail_n if config.one_pass else keys % config.block_n != 0,
                "TILES": full,
                "D": width,
                "D_MAIN": main,
                "D_TAIL": tail,
                "HEAD_DIM": head_dim,
                "V_PARTS": parts,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "TAIL_N": tail_n,
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
    head_dim: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√head_dim + mask)·v a head. q [B, L, N, D], k v [B, M, N, D] → [B, L, N, head_dim]; D in 8 … 160, or 512.

    head_dim, by default D, may be less where q, k and v are 0 from that column on: 40 stored as 48 needs no masked loads.
    mask, broadcastable to [B, N, L, M], is boolean (True: attend) or additive. A row that may attend nowhere gives 0.
    Any strides but the last axis', which must be 1. config overrides choose_config's. ValueError for what is not served.
    """
    head_dim = q.shape[-1] if head_dim is None else head_dim
    out = torch.empty((*q.shape[:3], head_dim), dtype=q.dtype, device=q.device) if out is None else out
    _check_tensors({"q": q, "k": k, "v": v, "out": out}, head_dim)
    if mask is not None:
        _check_mask(mask, q, k, causal)
    for launch in plan_attention(q, k, v, mask, causal, out, config, head_dim=head_dim):
        launch.run()
    return out


def _check_tensors(tensors: dict[str, Tensor], head_dim: int) -> None:
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
    batch, length, heads, width = q.shape
    if not (8 <= width <= 160 or width == 512):
        raise ValueError(f"head dim {width} is not served: only 8 to 160, and 512")
    if not 8 <= head_dim <= width:
        raise ValueError(f"head_dim {head_dim} must be from 8 to the {width} columns of q")
    for name, tensor in tensors.items():
        shape = (batch, k.shape[1] if name in ("k", "v") else length, heads, head_dim if name == "out" else width)
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, but beside q and k it must be {list(shape)}")
        if not tensor.numel():
            raise ValueError(f"{name} has no elements")
        if tensor.stride(3) != 1:
            raise ValueError(f"the last axis of {name} must be contiguous; its stride is {tensor.stride(3)}")
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
