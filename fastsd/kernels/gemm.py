"""Linear layers: y = activation(x·wᵀ + b) + residual, fp32 accumulators, one rounding at the end.

Reads (M·K + N·K) and writes M·N elements (and reads M·N more for a residual); 2·M·N·K operations. Where M is small, the
K axis is split over CTAs into fp32 partial sums, and a second kernel adds them and applies the epilogue: nothing is added
atomically, so the bits are always the same. Tiles in the order of Triton's matrix-multiplication tutorial (grouped for L2).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.launch import FLOATS, Launch, arch_of, shared_memory

ACTIVATIONS = (None, "silu", "gelu", "quick_gelu")


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


MAX_CANDIDATES = 16


def choose_config(m: int, n: int, k: int, dtype: torch.dtype, arch: int) -> Config:
    """Starting tiles, not yet tuned on a device. fp32 takes small ones: it does not run on tensor cores.

    sm_86 and sm_89 have 99 KB of shared memory a CTA where sm_80 has 163 and sm_90 227: three stages of half the depth.
    """
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2)
    depth = 32 if arch in (86, 89) else 64
    if m <= 64:
        return Config(64, 64, depth, 4, 3, split_k=_split(m, n, k, 64, 64))
    if m <= 512:
        return Config(64, 128, depth, 4, 3, split_k=_split(m, n, k, 64, 128))
    return Config(128, 128, depth, 8, 3)  # 128x256 spills beside a residual


def _split(m: int, n: int, k: int, block_m: int, block_n: int) -> int:
    """Parts of K that bring the CTAs of a 132-SM GPU near one wave, each part at least 256 deep.

    One part below 2048: adding the parts takes a second launch, as long as some 16 blocks of the depth take.
    """
    if k < 2048:
        return 1
    ctas = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    return max(1, min(132 // ctas, k // 256, 16))


def candidates(
    m: int, n: int, k: int, dtype: torch.dtype, arch: int, residual: bool = True, activation: str | None = "gelu"
) -> list[Config]:
    """What a tuner should time, `choose_config`'s pick first. No tile spills: compiled ahead of time for sm_80 to sm_100.

    Where 128x128 tiles leave SMs idle, K is split as well: up to two CTAs an SM, parts at least 256 deep. fp32, which no GPU
    is asked for, has nothing to time.
    """
    first = choose_config(m, n, k, dtype, arch)
    if dtype == torch.float32:
        return [first]
    tiles = [(128, 128, 8), (128, 64, 4), (64, 128, 4)]
    tiles += [(64, 64, 4)] if arch in (80, 90) else []
    if triton.cdiv(m, 128) * triton.cdiv(n, 128) >= 132:
        tiles += [(256, 64, 8), (64, 256, 8)]
        tiles += [(128, 256, 8)] if arch == 90 and not residual and activation is None else []
    configs = [Config(bm, bn, first.block_k, warps, 3) for bm, bn, warps in tiles]
    configs += [
        config._replace(split_k=parts)
        for config in configs
        for parts in (2, 4, 8, 16)
        if parts * 256 <= k and parts * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) <= 264
    ]
    configs += [config._replace(num_stages=4) for config in configs if config.split_k == 1]
    return fitting([first, *configs], m, n, dtype, arch)


def fitting(configs: list[Config], m: int, n: int, dtype: torch.dtype, arch: int) -> list[Config]:
    """The first MAX_CANDIDATES different ones, without those whose stages exceed shared memory or that are wider than needed.

    The first of all stays: it is the chooser's.
    """
    first, *others = configs
    rows, columns = (max(64, triton.next_power_of_2(size)) for size in (m, n))

    def fits(config: Config) -> bool:
        stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        small = config.block_m <= rows and config.block_n <= columns
        return small and stage * config.num_stages <= shared_memory(arch)

    return list(dict.fromkeys([first, *filter(fits, others)]))[:MAX_CANDIDATES]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x fp32."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        x = x / (1.0 + tl.exp(-1.702 * x))
    return x


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, so that neighbours in time share their columns of w in L2."""
    width = GROUP_M * num_n
    first = pid // width * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    return first + pid % width % height, pid % width // height


@triton.jit
def accumulate(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    rows,  # [BLOCK_M] rows of x
    columns,  # [BLOCK_N] rows of w
    start,  # first k
    stop,  # last k + 1
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """x·wᵀ of one tile over k in [start, stop), fp32 [BLOCK_M, BLOCK_N]. Rows past the end repeat the last: nothing to mask."""
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + depth[None, :]
    w_ptrs = w_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(start, stop, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k)
            w = tl.load(w_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=depth[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs + k, mask=depth[:, None] < K - k, other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def linear_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    b_ptr,  # [N], if HAS_BIAS
    residual_ptr,  # [M, N], if HAS_RESIDUAL
    out_ptr,  # [M, N]; with SPLIT_K > 1 fp32 partial sums [SPLIT_K, M, N]
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    part = tl.program_id(1)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    DEPTH: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K  # of one part
    start = part * DEPTH
    stop = tl.minimum(start + DEPTH, K)
    y = accumulate(x_ptr, w_ptr, rows, columns, start, stop, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, K % BLOCK_K == 0)

    inside = (rows[:, None] < M) & (columns[None, :] < N)
    offs = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SPLIT_K == 1:
        if HAS_BIAS:
            y += tl.load(b_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        y = activate(y, ACTIVATION)
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    else:
        offs += part.to(tl.int64) * M * N
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts_kernel(
    parts_ptr,  # [SPLIT_K, M, N] fp32
    b_ptr,  # [N], if HAS_BIAS
    residual_ptr,  # [M, N], if HAS_RESIDUAL
    out_ptr,  # [M, N]
    SIZE,  # M·N
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        y += tl.load(parts_ptr + part * tl.cast(SIZE, tl.int64) + offs, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(b_ptr + offs % N, mask=inside, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out: Tensor,
    arch: int,
    config: Config | None = None,
) -> list[Launch]:
    """The launches of `linear` into out [..., N] on a compute capability."""
    k, n = w.shape[1], w.shape[0]
    m = x.numel() // k
    config = config or choose_config(m, n, k, x.dtype, arch)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    epilogue = {"HAS_BIAS": b is not None, "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation}
    tensors = {"b_ptr": x if b is None else b, "residual_ptr": x if residual is None else residual}  # unread if absent
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    split = {"SPLIT_K": config.split_k}
    whole = config.split_k == 1
    target = out if whole else torch.empty((config.split_k, m, n), dtype=torch.float32, device=x.device)
    multiply = Launch(
        linear_kernel,
        (tiles, config.split_k),
        {"x_ptr": x, "w_ptr": w, **tensors, "out_ptr": target, "M": m},
        {"N": n, "K": k, **epilogue, **blocks, **split},
        config.num_warps,
        config.num_stages,
    )
    if whole:
        return [multiply]
    add = Launch(
        add_parts_kernel,
        (triton.cdiv(m * n, 1024),),
        {"parts_ptr": target, **tensors, "out_ptr": out, "SIZE": m * n},
        {"N": n, **epilogue, **split, "BLOCK": 1024},
        num_warps=4,
    )
    return [multiply, add]


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """activation(x·wᵀ + b) + residual. x [..., K], w [N, K], b [N], residual [..., N] → [..., N].

    ValueError for what the kernel does not serve: other dtypes, tensors that are not contiguous, no elements.
    """
    check(x, w, b)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")
    shape = (*x.shape[:-1], w.shape[0])
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    for name, tensor in {"residual": residual, "out": out}.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous {list(shape)} of {x.dtype}")
    for launch in plan_linear(x, w, b, residual, activation, out, arch_of(x.device), config):
        launch.run()
    return out


def check(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    """ValueError unless x [..., K], w [N, K] and b [N] are contiguous, of one dtype and not empty."""
    if x.dtype not in FLOATS or w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
        raise ValueError(f"x, w and b must all be fp16, bf16 or fp32, not {x.dtype} and {w.dtype}")
    if w.ndim != 2 or x.shape[-1] != w.shape[1] or (b is not None and b.shape != w.shape[:1]):
        raise ValueError(f"x [..., K], w [N, K] and b [N] do not fit: {list(x.shape)} and {list(w.shape)}")
    if not (x.is_contiguous() and w.is_contiguous() and (b is None or b.is_contiguous())):
        raise ValueError("x, w and b must be contiguous")
    if not x.numel():
        raise ValueError("x has no elements")
