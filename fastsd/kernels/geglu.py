"""GEGLU: value · gelu_erf(gate), where (value, gate) are the halves of x·wᵀ + b (Shazeer 2020, arXiv 2002.05202).

Reads M·K + 2N·K, writes M·N elements; 4·M·N·K operations. The rows of w are interleaved when it is packed (value 0, gate 0,
value 1, gate 1, …): one GEMM, and the two halves of a column lie beside each other in the accumulator, in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.gemm import Config, accumulate, check, fitting, tile_of
from fastsd.kernels.launch import Launch, arch_of
from fastsd.kernels.packing import PackedWeights


def pack(w: Tensor) -> Tensor:
    """Checkpoint order (all values, then all gates) → interleaved. w [2N, K] or b [2N]."""
    value, gate = w.chunk(2)
    return torch.stack((value, gate), dim=1).flatten(0, 1).contiguous()


def choose_config(m: int, n: int, dtype: torch.dtype, arch: int) -> Config:
    """n: columns before gating, 2N. Starting tiles, not yet tuned on a device; see `gemm.choose_config`.

    128x256 fits the registers of sm_90 alone, where wgmma reads both operands from shared memory.
    """
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2)
    depth = 32 if arch in (86, 89) else 64
    if m <= 128:
        return Config(64, 128, depth, 4, 3)
    return Config(128, 128, depth, 8, 3) if m <= 2048 or arch != 90 else Config(128, 256, depth, 8, 3)


def candidates(m: int, n: int, dtype: torch.dtype, arch: int) -> list[Config]:
    """What a tuner should time, `choose_config`'s pick first; see `gemm.candidates`."""
    first = choose_config(m, n, dtype, arch)
    if dtype == torch.float32:
        return [first]
    tiles = [(128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (256, 64, 8), (64, 256, 8)]
    tiles += [(128, 256, 8)] if arch == 90 else []
    configs = [Config(bm, bn, first.block_k, warps, stages) for stages in (3, 4) for bm, bn, warps in tiles]
    return fitting([first, *configs], m, n, dtype, arch)


@triton.jit
def geglu_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N2, K] interleaved
    b_ptr,  # [N2] interleaved
    out_ptr,  # [M, N2 / 2]
    M,
    N2: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N2, BLOCK_N), 8)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = accumulate(x_ptr, w_ptr, rows, columns, 0, K, M, N2, K, BLOCK_M, BLOCK_N, BLOCK_K, K % BLOCK_K == 0)
    y += tl.load(b_ptr + columns, mask=columns < N2, other=0.0).to(tl.float32)[None, :]
    value, gate = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
    y = value * (0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)))

    N: tl.constexpr = N2 // 2
    columns = n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    offs = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


def plan_geglu(x: Tensor, w: Tensor, b: Tensor, out: Tensor, arch: int, config: Config | None = None) -> list[Launch]:
    """The launch of `geglu` into out [..., N] on a compute capability; w and b interleaved."""
    n, k = w.shape
    m = x.numel() // k
    config = config or choose_config(m, n, x.dtype, arch)
    return [
        Launch(
            geglu_kernel,
            (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),),
            {"x_ptr": x, "w_ptr": w, "b_ptr": b, "out_ptr": out, "M": m},
            {"N2": n, "K": k, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
            config.num_warps,
            config.num_stages,
        )
    ]


def geglu(x: Tensor, w: Tensor, b: Tensor, out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """value · gelu_erf(gate). x [..., K], w [2N, K] and b [2N] as in the checkpoint → [..., N].

    ValueError for what the kernel does not serve: other dtypes, tensors that are not contiguous, no elements, an odd 2N.
    """
    check(x, w, b)
    if w.shape[0] % 2:
        raise ValueError(f"w has {w.shape[0]} rows; values and gates must be as many")
    shape = (*x.shape[:-1], w.shape[0] // 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {list(shape)} of {x.dtype}")
    for launch in plan_geglu(x, _packed.get(w), _packed.get(b), out, arch_of(x.device), config):
        launch.run()
    return out


_packed = PackedWeights(pack)
