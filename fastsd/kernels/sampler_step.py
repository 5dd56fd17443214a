"""One step of any sampler: guidance, then one row of each image's table. All fp32.

    guided = uncond + g·(cond − uncond);  state_s ← Σ_k update[s, k] · (state_0 … state_{S−1}, guided, noise)_k

Reads S + 1 to S + 3 and writes S latents of 4 bytes an element: bound by memory, and small. A step counter on the device picks
the row, so that a captured graph walks the whole table.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.launch import Launch


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
def sampler_step_kernel(
    state_ptr,  # [S, B, SIZE] fp32
    out_ptr,  # [B, SIZE], or [2B, SIZE] if GUIDED; any float type
    noise_ptr,  # [B, SIZE] fp32, if HAS_NOISE
    update_ptr,  # [n, B, S, S+2] fp32, of the given strides
    guidance_ptr,  # [B] fp32
    step_ptr,  # [1] int32: the row
    new_ptr,  # [S, B, SIZE] fp32
    B,
    SIZE,  # elements of one latent
    update_step_stride,
    update_image_stride,
    S: tl.constexpr,
    GUIDED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    here = image * SIZE + offs
    row_ptr = update_ptr + tl.load(step_ptr).to(tl.int64) * update_step_stride + image * update_image_stride
    out = tl.load(out_ptr + here, mask=inside).to(tl.float32)
    if GUIDED:
        cond = tl.load(out_ptr + (image + B) * SIZE + offs, mask=inside).to(tl.float32)
        out += tl.load(guidance_ptr + image) * (cond - out)
    for new in tl.static_range(S):
        y = tl.load(row_ptr + new * (S + 2) + S) * out
        for old in tl.static_range(S):
            y += tl.load(row_ptr + new * (S + 2) + old) * tl.load(state_ptr + old * B * SIZE + here, mask=inside)
        if HAS_NOISE:
            y += tl.load(row_ptr + new * (S + 2) + S + 1) * tl.load(noise_ptr + here, mask=inside)
        tl.store(new_ptr + new * B * SIZE + here, y, mask=inside)


def plan_sampler_step(
    state: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    guidance: Tensor,
    step: Tensor,
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
                "step_ptr": step,
                "new_ptr": new,
                "B": batch,
                "SIZE": size,
                "update_step_stride": table.stride(0),
                "update_image_stride": table.stride(1),
            },
            {"S": slots, "GUIDED": out.shape[0] == 2 * batch, "HAS_NOISE": noise is not None, "BLOCK": config.block},
            config.num_warps,
        )
    ]


def sampler_step(
    state: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    guidance: Tensor,
    step: Tensor,
    new: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """state [S, B, …] fp32, out [B or 2B, …], noise [B, …] fp32 or None, table [n, B, S, S+2] fp32, guidance [B] fp32 and step
    [1] int32 (the row, on the device) → the new state [S, B, …].

    ValueError for tensors of other shapes or dtypes, or that are not contiguous (the table may be expanded over B).
    """
    slots, batch = state.shape[:2]
    latent = state.shape[2:]
    new = torch.empty_like(state) if new is None else new
    fp32 = {"state": (state, state.shape), "new": (new, state.shape), "guidance": (guidance, (batch,))}
    fp32 |= {} if noise is None else {"noise": (noise, (batch, *latent))}
    for name, (tensor, shape) in fp32.items():
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous fp32 {list(shape)}")
    if out.shape[1:] != latent or out.shape[0] not in (batch, 2 * batch) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, {batch} or {2 * batch} of {list(latent)}")
    if (
        table.shape[1:] != (batch, slots, slots + 2)
        or table.dtype != torch.float32
        or table.stride()[2:] != (slots + 2, 1)
    ):
        raise ValueError(f"table must be fp32 [n, {batch}, {slots}, {slots + 2}] with contiguous rows")
    if step.shape != (1,) or step.dtype != torch.int32:
        raise ValueError("step must be one int32")
    for launch in plan_sampler_step(state, out, noise, table, guidance, step, new, config):
        launch.run()
    return new
