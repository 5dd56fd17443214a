"""Layer norm over the last axis: y = (x − mean) / √(var + eps) · w + b (Ba et al. 2016, arXiv 1607.06450).

Reads and writes M·C elements once, and w and b from L2: bound by memory. A row stays in registers from its only load to its
only store, so the variance is taken in a second pass, from the deviations.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.launch import Launch, check_operands

MAX_WIDTH = 16384  # 8 warps hold a row of 16,384 in 64 registers a thread


class Config(NamedTuple):
    block_rows: int
    block_columns: int
    num_warps: int


def choose_config(rows: int, width: int) -> Config:
    """Up to 8 rows a CTA as long as 264 CTAs (two for each of 132 SMs) remain; about 16 elements a thread.

    A width that is no power of two is one masked block, not a main part and a tail: masked lanes fetch nothing, the kernel waits
    for memory, and one layout means that no row sum is converted between two. Untuned, for want of a device.
    """
    block_columns = triton.next_power_of_2(width)
    block_rows = 8
    while block_rows > 1 and (triton.cdiv(rows, block_rows) < 264 or block_rows * block_columns > 4096):
        block_rows //= 2
    num_warps = min(8, max(1, block_rows * block_columns // 512))
    return Config(block_rows, block_columns, num_warps)


def candidates(rows: int, width: int) -> list[Config]:
    """What a tuner should time, `choose_config`'s pick first: 1 to 16 rows a CTA, 8 to 32 elements a thread."""
    first = choose_config(rows, width)
    columns = first.block_columns
    configs = [
        Config(block_rows, columns, num_warps)
        for block_rows in (1, 2, 4, 8, 16)
        for num_warps in (1, 2, 4, 8)
        if 8 <= block_rows * columns // (32 * num_warps) <= 32
    ]
    return list(dict.fromkeys([first, *configs]))


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [M, C]
    w_ptr,  # [C]
    b_ptr,  # [C]
    out_ptr,  # [M, C]
    M,
    eps,
    C: tl.constexpr,
    EVEN_M: tl.constexpr,  # M % BLOCK_M == 0
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    inside = tl.full((BLOCK_M, BLOCK_C), True, tl.int1)
    if not EVEN_M:
        inside &= (first + rows < M)[:, None]
    if C != BLOCK_C:
        inside &= (columns < C)[None, :]
    offs = rows[:, None] * C + columns[None, :]

    x = tl.load(x_ptr + first * C + offs, mask=inside, other=0.0).to(tl.float32)
    # The mean is rounded to its own size, which a small deviation may not be: the second round takes off what the first left.
    for _ in tl.static_range(2):
        x -= (tl.sum(x, axis=1) / C)[:, None]
        x = tl.where(inside, x, 0.0)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / C + eps))[:, None]
    w = tl.load(w_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    y = y * w[None, :] + b[None, :]
    tl.store(out_ptr + first * C + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan_layer_norm(
    x: Tensor, w: Tensor, b: Tensor, eps: float, out: Tensor, config: Config | None = None
) -> list[Launch]:
    """The launch of `layer_norm` into out, of x's shape."""
    width = x.shape[-1]
    rows = x.numel() // width
    config = config or choose_config(rows, width)
    return [
        Launch(
            layer_norm_kernel,
            (triton.cdiv(rows, config.block_rows),),
            {"x_ptr": x, "w_ptr": w, "b_ptr": b, "out_ptr": out, "M": rows, "eps": float(eps)},
            {
                "C": width,
                "EVEN_M": rows % config.block_rows == 0,
                "BLOCK_M": config.block_rows,
                "BLOCK_C": config.block_columns,
            },
            config.num_warps,
        )
    ]


def layer_norm(
    x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5, out: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """Layer norm over the last axis. x [..., C], w b [C] → x's shape and dtype.

    ValueError for what the kernel does not serve: other dtypes, tensors that are not contiguous or on several devices, no
    elements, C above 16,384.
    """
    out = torch.empty_like(x) if out is None else out
    _check(x, w, b, out)
    for launch in plan_layer_norm(x, w, b, eps, out, config):
        launch.run()
    return out


def _check(x: Tensor, w: Tensor, b: Tensor, out: Tensor) -> None:
    if x.dim() < 1 or x.numel() == 0 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x must be [..., C] with 1 <= C <= {MAX_WIDTH} and elements, not {list(x.shape)}")
    width = x.shape[-1]
    check_operands({"x": (x, x.shape), "w": (w, (width,)), "b": (b, (width,)), "out": (out, x.shape)})
    if out.dtype != x.dtype:
        raise ValueError(f"out must be {x.dtype} as x, not {out.dtype}")
