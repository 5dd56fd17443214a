"""3×3 convolution, group norm, SiLU: the middle of a ResBlock, with the norm's statistics taken where the convolution ends.

The convolution's epilogue holds each value in fp32 once: (mean, M2) of its tile costs no read, where `groupnorm_silu` reads
the whole image again. Writes and reads M·O elements once each beyond the convolution's own reads, and M·O for the result.

Where the convolution's depth is split and an image is small, one kernel adds the parts and normalises the sums: two launches.
"""

import torch
import triton
from torch import Tensor

from fastsd.kernels import conv2d, groupnorm_silu
from fastsd.kernels.gemm import Config
from fastsd.kernels.groupnorm_whole import add_parts_norm_kernel
from fastsd.kernels.launch import Launch, arch_of, check_operands

PAD = (1, 1, 1, 1)
MOST_VALUES = 16384
"""Of a group of an image that a CTA holds in registers: 64 a thread of 8 warps."""


def plan_conv2d_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    channel_bias: Tensor | None,
    norm_w: Tensor,
    norm_b: Tensor,
    groups: int,
    eps: float,
    out: Tensor,
    arch: int,
    config: Config | None = None,
    wrap: conv2d.Wrap = (False, False),
) -> list[Launch]:
    """The launches of `conv2d_norm` into out [B, H, W, O] on a compute capability; w packed [O, 3, 3, C].

    An image that the convolution's tiles do not divide is read again for its statistics.
    """
    batch, height, width, n = out.shape
    pixels = height * width
    config = config or conv2d.choose_config(batch * pixels, n, x.shape[-1], 9, 1, x.dtype, arch)
    block_p, block_w = triton.next_power_of_2(pixels), triton.next_power_of_2(n // groups)
    if config.split_k > 1 and block_p * block_w <= MOST_VALUES:
        multiply, _ = conv2d.plan_conv2d(x, w, 1, PAD, conv2d.Epilogue(b, channel_bias), out, arch, config, wrap)
        parts = multiply.arguments["out_ptr"]
        added = {"parts_ptr": parts, "b_ptr": b, "channel_bias_ptr": b if channel_bias is None else channel_bias}
        stride = {"channel_bias_stride": n if channel_bias is None else channel_bias.stride(0)}
        add = Launch(
            add_parts_norm_kernel,
            (groups, batch),
            added
            | {"norm_w_ptr": norm_w, "norm_b_ptr": norm_b, "out_ptr": out, "PIXELS": pixels, "eps": float(eps)}
            | stride,
            {
                **{"N": n, "WIDTH": n // groups, "HAS_CHANNEL_BIAS": channel_bias is not None},
                **{"SPLIT_K": config.split_k, "EVEN": pixels == block_p, "BLOCK_P": block_p, "BLOCK_W": block_w},
            },
            num_warps=8 if block_p * block_w > 4096 else 4,
        )
        return [multiply, add]
    y = torch.empty_like(out)
    chunk = conv2d.statistics_chunk(config, n)
    if pixels % chunk:
        launches = conv2d.plan_conv2d(x, w, 1, PAD, conv2d.Epilogue(b, channel_bias), y, arch, config, wrap)
        return launches + groupnorm_silu.plan_group_norm(y, norm_w, norm_b, groups, eps, True, None, out)
    partials = torch.empty(batch, triton.cdiv(pixels, chunk), 2, n, dtype=torch.float32, device=x.device)
    epilogue = conv2d.Epilogue(b, channel_bias, partials=partials)
    launches = conv2d.plan_conv2d(x, w, 1, PAD, epilogue, y, arch, config, wrap)
    statistics = groupnorm_silu.Statistics(partials, chunk, pivoted=False)
    return launches + groupnorm_silu.plan_apply(y, norm_w, norm_b, groups, eps, True, None, statistics, out)


def conv2d_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    channel_bias: Tensor | None,
    norm_w: Tensor,
    norm_b: Tensor,
    groups: int,
    eps: float,
    wrap: conv2d.Wrap = (False, False),
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """silu(group_norm(conv2d(x, w, b) + channel_bias)), padding 1. x [B, H, W, C], w [O, C, 3, 3], b norm_w norm_b [O],
    channel_bias [B, O] → [B, H, W, O]; wrap and ValueError as in `conv2d` and `group_norm`."""
    conv2d.check_3x3(x, w)
    n = w.shape[0]
    shape = (*x.shape[:3], n)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    conv2d.check(x, w, conv2d.Epilogue(b, channel_bias), out, shape)
    check_operands({"x": (x, x.shape), "norm_w": (norm_w, (n,)), "norm_b": (norm_b, (n,))})
    if groups < 1 or n % groups:
        raise ValueError(f"{n} channels are not divisible into {groups} groups")
    packed, arch = conv2d.pack_cached(w), arch_of(x.device)
    for launch in plan_conv2d_norm(x, packed, b, channel_bias, norm_w, norm_b, groups, eps, out, arch, config, wrap):
        launch.run()
    return out
