"""What lies round the UNet in a step of any sampler, in two launches. All fp32 but the UNet's own inputs and output.

    before:  x = Σ_k weights[row, k]·state_k, and a row of the time projections, each image's own
    after:   guided = uncond + g·(cond − uncond);  state_s ← Σ_k update[row, s, k]·(state_0 … state_{S−1}, guided, noise)_k

Reads S + 1 to S + 3 and writes S latents of 4 bytes an element: bound by memory, and small. The row is read from a counter on
the device, which the last CTA moves on, so that a captured graph walks the whole table without a host.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.launch import FLOATS, Launch


class Config(NamedTuple):
    block: int
    num_warps: int


def choose_config(size: int) -> Config:
    """size: elements of one latent. 16,384 of them (64x64x4) are 64 CTAs an image; not yet tuned on a device."""
    return Config(min(256, triton.next_power_of_2(size)), 4)


def candidates(size: int) -> list[Config]:
    """What to time, the chooser's own first."""
    blocks = [Config(block, warps) for block, warps in ((128, 4), (256, 2), (512, 4), (1024, 4), (1024, 8))]
    return list(dict.fromkeys([choose_config(size), *blocks]))


@triton.jit
def step_input_kernel(
    state_ptr,  # [S, B, SIZE] fp32
    weights_ptr,  # [n, B, S] fp32
    time_bias_ptr,  # [m, T]
    time_rows_ptr,  # [n, B] int32
    counter_ptr,  # int32, the row first
    x_ptr,  # [COPIES, B, SIZE]
    time_ptr,  # [COPIES, B, T]
    B,
    SIZE,  # elements of one latent
    X_BLOCKS,  # of BLOCK elements that a latent has; those beyond are of the time row
    T: tl.constexpr,
    S: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(counter_ptr).to(tl.int64) * B + image  # of the tables, laid out as [n·B, …]
    if block < X_BLOCKS:
        offs = block * BLOCK + tl.arange(0, BLOCK)
        inside = offs < SIZE
        here = image * SIZE + offs
        x = tl.zeros((BLOCK,), tl.float32)
        for slot in tl.static_range(S):
            x += tl.load(weights_ptr + row * S + slot) * tl.load(state_ptr + slot * B * SIZE + here, mask=inside)
        for copy in tl.static_range(COPIES):
            tl.store(x_ptr + copy * B * SIZE + here, x.to(x_ptr.dtype.element_ty), mask=inside)
    else:
        offs = (block - X_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < T
        time = tl.load(time_bias_ptr + tl.load(time_rows_ptr + row).to(tl.int64) * T + offs, mask=inside)
        for copy in tl.static_range(COPIES):
            tl.store(time_ptr + (copy * B + image) * T + offs, time, mask=inside)


@triton.jit
def sampler_step_kernel(
    state_ptr,  # [S, B, SIZE] fp32
    out_ptr,  # [B, SIZE], or [2B, SIZE] if GUIDED; any float type
    noise_ptr,  # [B, SIZE] fp32, if HAS_NOISE
    update_ptr,  # [n, B, S, S+2] fp32, of the given strides
    guidance_ptr,  # [B] fp32
    counter_ptr,  # [2 + B] int32: the row, CTAs that are through, each image's first row that gave what is not finite
    new_ptr,  # [S, B, SIZE] fp32; may be the state
    B,
    SIZE,  # elements of one latent
    update_step_stride,
    update_image_stride,
    S: tl.constexpr,
    SLOTS: tl.constexpr,  # ≥ S
    GUIDED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    here = image * SIZE + offs
    slots = tl.arange(0, SLOTS)
    row = tl.load(counter_ptr)
    row_ptr = update_ptr + row.to(tl.int64) * update_step_stride + image * update_image_stride
    old_ptrs = state_ptr + slots.to(tl.int64)[:, None] * B * SIZE + here[None, :]
    old = tl.load(old_ptrs, mask=(slots < S)[:, None] & inside[None, :], other=0.0)
    tl.debug_barrier()  # where new is the state, every thread has read before one writes
    out = tl.load(out_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        cond = tl.load(out_ptr + (image + B) * SIZE + offs, mask=inside, other=0.0).to(tl.float32)
        out += tl.load(guidance_ptr + image) * (cond - out)
    noise = tl.zeros((BLOCK,), tl.float32)
    if HAS_NOISE:
        noise = tl.load(noise_ptr + here, mask=inside, other=0.0)
    for new in tl.static_range(S):
        weights = tl.load(row_ptr + new * (S + 2) + slots, mask=slots < S, other=0.0)
        y = tl.sum(weights[:, None] * old, 0) + tl.load(row_ptr + new * (S + 2) + S) * out
        if HAS_NOISE:
            y += tl.load(row_ptr + new * (S + 2) + S + 1) * noise
        tl.store(new_ptr + new * B * SIZE + here, y, mask=inside)
        if new == 0:
            finite = tl.sum((inside & (tl.abs(y) < float("inf"))).to(tl.int32)) == tl.sum(inside.to(tl.int32))
            if not finite:
                tl.atomic_min(counter_ptr + 2 + image, row)
    # The last CTA to come by moves the counter on: by then every warp of all has read it.
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + 1, 1) == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(counter_ptr + 1, 0)
        tl.store(counter_ptr, row + 1)


def plan_step_input(
    state: Tensor,
    weights: Tensor,
    time_bias: Tensor,
    time_rows: Tensor,
    counter: Tensor,
    x: Tensor,
    time: Tensor,
    config: Config | None = None,
) -> list[Launch]:
    """The launch of `step_input` into x [copies·B, …] and time [copies·B, T]."""
    slots, batch = state.shape[:2]
    size, width = state[0, 0].numel(), time_bias.shape[1]
    config = config or choose_config(size)
    blocks = triton.cdiv(size, config.block)
    tables = {"weights_ptr": weights, "time_bias_ptr": time_bias, "time_rows_ptr": time_rows}
    tensors = {"state_ptr": state, **tables, "counter_ptr": counter}
    return [
        Launch(
            step_input_kernel,
            (blocks + triton.cdiv(width, config.block), batch),
            tensors | {"x_ptr": x, "time_ptr": time, "B": batch, "SIZE": size, "X_BLOCKS": blocks},
            {"T": width, "S": slots, "COPIES": x.shape[0] // batch, "BLOCK": config.block},
            config.num_warps,
        )
    ]


def plan_sampler_step(
    state: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    guidance: Tensor,
    counter: Tensor,
    new: Tensor,
    config: Config | None = None,
) -> list[Launch]:
    """The launch of `sampler_step` into new [S, B, …]."""
    slots, batch = state.shape[:2]
    size = state[0, 0].numel()
    config = config or choose_config(size)
    return [
        Launch(
            sampler_step_kernel,
            (triton.cdiv(size, config.block), batch),
            {
                "state_ptr": state,
                "out_ptr": out,
                "noise_ptr": state if noise is None else noise,  # unread if absent
                "update_ptr": table,
                "guidance_ptr": guidance,
                "counter_ptr": counter,
                "new_ptr": new,
                "B": batch,
                "SIZE": size,
                "update_step_stride": table.stride(0),
                "update_image_stride": table.stride(1),
            },
            {
                **{"S": slots, "SLOTS": triton.next_power_of_2(slots), "GUIDED": out.shape[0] == 2 * batch},
                **{"HAS_NOISE": noise is not None, "BLOCK": config.block},
            },
            config.num_warps,
        )
    ]


def step_input(
    state: Tensor,
    weights: Tensor,
    time_bias: Tensor,
    time_rows: Tensor,
    counter: Tensor,
    copies: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """state [S, B, …] fp32, weights [n, B, S] fp32, time_bias [m, T], time_rows [n, B] int32, counter [2 + B] int32, the row
    first → x [copies·B, …] and times [copies·B, T], both in time_bias's dtype.

    ValueError for tensors of other shapes or dtypes, or that are not contiguous.
    """
    slots, batch = state.shape[:2]
    _check_fp32({"state": (state, state.shape), "weights": (weights, (len(weights), batch, slots))})
    if time_bias.ndim != 2 or time_bias.dtype not in FLOATS or not time_bias.is_contiguous():
        raise ValueError(f"time_bias must be contiguous [m, T] in fp16, bf16 or fp32, not {list(time_bias.shape)}")
    _check_int32({"time_rows": (time_rows, (len(weights), batch)), "counter": (counter, (2 + batch,))})
    x = torch.empty((copies * batch, *state.shape[2:]), dtype=time_bias.dtype, device=state.device)
    time = torch.empty((copies * batch, time_bias.shape[1]), dtype=time_bias.dtype, device=state.device)
    for launch in plan_step_input(state, weights, time_bias, time_rows, counter, x, time, config):
        launch.run()
    return x, time


def sampler_step(
    state: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    guidance: Tensor,
    counter: Tensor,
    new: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """state [S, B, …] fp32, out [B or 2B, …], noise [B, …] fp32 or None, table [n, B, S, S+2] fp32, guidance [B] fp32 and counter
    [2 + B] int32 (see `ops.StepRow`) → the new state [S, B, …]; `new` may be the state.

    ValueError for tensors of other shapes or dtypes, or that are not contiguous (the table may be expanded over B).
    """
    slots, batch = state.shape[:2]
    latent = state.shape[2:]
    new = torch.empty_like(state) if new is None else new
    fp32 = {"state": (state, state.shape), "new": (new, state.shape), "guidance": (guidance, (batch,))}
    _check_fp32(fp32 | ({} if noise is None else {"noise": (noise, (batch, *latent))}))
    if out.shape[1:] != latent or out.shape[0] not in (batch, 2 * batch) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, {batch} or {2 * batch} of {list(latent)}")
    if (
        table.shape[1:] != (batch, slots, slots + 2)
        or table.dtype != torch.float32
        or table.stride()[2:] != (slots + 2, 1)
    ):
        raise ValueError(f"table must be fp32 [n, {batch}, {slots}, {slots + 2}] with contiguous rows")
    _check_int32({"counter": (counter, (2 + batch,))})
    for launch in plan_sampler_step(state, out, noise, table, guidance, counter, new, config):
        launch.run()
    return new


def _check(dtype: torch.dtype, tensors: Mapping[str, tuple[Tensor, Sequence[int]]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}")


_check_fp32, _check_int32 = partial(_check, torch.float32), partial(_check, torch.int32)
