"""Convolution, NHWC, as one matrix product: y = Σ_taps x(shifted)·w_tapᵀ + b, with all that follows it in the epilogue.

Reads B·H·W·C (from memory once, from L2 once a tap) and O·R·R·C, writes M·O elements, M = B·H'·W'; 2·M·O·R·R·C operations.
A window's pixels outside the image are masked loads: that is the padding, whatever its sides; in an image that wraps they are
the pixels at its other edge. A resnet's 1×1 shortcut is more depth of the same product. Few pixels (8×8, 16×16) split the depth
over CTAs into fp32 partial sums, which a second kernel adds; nothing is added atomically.

Nearest ×2 and a 3×3 convolution are four 2×2 ones, one for each parity of the output's row and column, whose weights are sums
of the 3×3's: 2.25 times fewer operations, and the enlarged image is never made.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastsd.kernels.conv2d_kernels import add_parts_kernel, conv_kernel
from fastsd.kernels.gemm import Config, plan_linear
from fastsd.kernels.launch import Launch, arch_of, check_operands
from fastsd.kernels.packing import PackedWeights

Pad = tuple[int, int, int, int]  # left, right, top, bottom
Wrap = tuple[bool, bool]  # horizontally, vertically

Shortcut = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""x [B, H', W', C₁], skip [B, H', W', C₂], w [O, C₁+C₂, 1, 1], b [O]: w·(x beside skip) + b, to be added."""


def pack(w: Tensor) -> Tensor:
    """[O, C, R, R] → [O, R, R, C]: what one column of the product needs lies together."""
    return w.permute(0, 2, 3, 1).contiguous()


def pack_phases(w: Tensor) -> Tensor:
    """[O, C, 3, 3] → [4, O, 2, 2, C]: phase 2·(row % 2) + column % 2; summed in fp32.

    An even output row sees the input rows above (tap 0) and at (taps 1 and 2) its source, an odd one at (0 and 1) and below (2).
    """

    def halves(w: Tensor, axis: int) -> list[Tensor]:
        first, middle, last = w.unbind(axis)
        return [torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)]

    phases = [column for row in halves(w.float(), 2) for column in halves(row, 3)]
    return torch.stack(phases).permute(0, 1, 3, 4, 2).contiguous().to(w.dtype)


def choose_config(m: int, n: int, c: int, taps: int, phases: int, dtype: torch.dtype, arch: int) -> Config:
    """m: output pixels of a phase, n: output channels, c: input channels. Starting tiles, not yet tuned on a device.

    320 columns are five tiles of 64 exactly, and three of 128 with a sixth wasted. Up to 512 pixels (8x8 and 16x16 of two
    images) the depth is split until each of 132 SMs has two CTAs. See `gemm.choose_config` for the depth of a block.
    """
    if dtype == torch.float32:
        return Config(32, 32, 32 if c >= 32 else 16, 4, 2)
    depth = min(32 if arch in (86, 89) else 64, max(16, triton.next_power_of_2(c)))
    block_n = 128 if n % 128 == 0 or n > 512 else max(16, min(64, triton.next_power_of_2(n)))
    block_m = 64 if m <= 512 else 128
    ctas = triton.cdiv(m, block_m) * triton.cdiv(n, block_n) * phases
    split_k = max(1, min(264 // ctas, taps * c // 512, 16)) if m <= 512 else 1
    return Config(block_m, block_n, depth, 8 if block_m * block_n >= 128 * 128 else 4, 3, split_k)


def candidates(m: int, n: int, c: int, taps: int, phases: int, dtype: torch.dtype, arch: int) -> list[Config]:
    """What to time for a shape, `choose_config`'s own pick first. 128x256 beside a residual spills: a tuner must see that."""
    first = choose_config(m, n, c, taps, phases, dtype, arch)
    if dtype == torch.float32:
        return [first]
    tiles = [(128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4)]
    tiles += [(128, 128, 4)] if arch < 90 else [(128, 256, 8), (256, 128, 8)]
    found = [first]
    for block_m, block_n, warps in tiles:
        ctas = triton.cdiv(m, block_m) * triton.cdiv(n, block_n) * phases
        splits = {1} if ctas >= 132 else {1, 264 // ctas, 132 // ctas}
        found += [
            first._replace(block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, split_k=split)
            for split in sorted(splits)
            if split <= max(1, taps * c // 512)
            for stages in ((3, 4) if arch in (80, 90, 100) and block_m * block_n <= 128 * 128 else (3,))
        ]
    return list(dict.fromkeys(config for config in found if config.block_n <= max(64, triton.next_power_of_2(n))))


class Epilogue(NamedTuple):
    """What follows the product, before the one rounding."""

    b: Tensor | None = None
    """[O]"""
    channel_bias: Tensor | None = None
    """[B, O], any row stride"""
    residual: Tensor | None = None
    """[B, H', W', O]"""
    shortcut: Shortcut | None = None
    partials: Tensor | None = None
    """[B·chunks, 2, O] fp32, filled with (mean, M2) of each channel of each `statistics_chunk` of an image's pixels."""


def statistics_chunk(config: Config, n: int) -> int:
    """Pixels that one CTA finishes: the statistics of an image need them to divide its pixels."""
    return config.block_m if config.split_k == 1 else _adding_tile(n)[0]


def _adding_tile(n: int) -> tuple[int, int]:
    """Pixels and channels of a CTA that adds the parts of a split."""
    block_n = min(64, triton.next_power_of_2(n))
    return 1024 // block_n, block_n


def plan_conv2d(
    x: Tensor,
    w: Tensor,
    stride: int,
    pad: Pad,
    epilogue: Epilogue,
    out: Tensor,
    arch: int,
    config: Config | None = None,
    wrap: Wrap = (False, False),
) -> list[Launch]:
    """The launches of `conv2d` into out [B, H', W', O] on a compute capability; w packed [O, R, R, C].

    A 1×1 convolution that has nothing of a convolution's is a linear layer of the pixels.
    """
    b, channel_bias, residual, shortcut, partials = epilogue
    if w.shape[1] == stride == 1 and not any(pad) and channel_bias is shortcut is partials is None:
        return plan_linear(x, w[:, 0, 0], b, residual, None, out, arch, config)
    wraps_x, wraps_y = (bool(wrap[axis] and pad[2 * axis] == pad[2 * axis + 1] > 0) for axis in range(2))
    geometry = {
        **{"STRIDE": stride, "PAD_TOP": pad[2], "PAD_LEFT": pad[0], "PHASES": 1, "UPSAMPLE": False},
        **{"WRAP_X": wraps_x, "WRAP_Y": wraps_y},
    }
    return _plan(x, w, epilogue, out, (out.shape[1], out.shape[2]), geometry, arch, config)


def plan_upsample_conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    out: Tensor,
    arch: int,
    config: Config | None = None,
    wrap: Wrap = (False, False),
) -> list[Launch]:
    """The launches of `upsample_conv2d` into out [B, H', W', O]; w is [4, O, 2, 2, C] from `pack_phases`, or [O, 3, 3, C]
    from `pack` where out is not exactly twice x: its last row or column then has no neighbour to be summed with."""
    phases = w.ndim == 5
    geometry = {
        **{"STRIDE": 1, "PAD_TOP": 1, "PAD_LEFT": 1, "PHASES": 4 if phases else 1, "UPSAMPLE": not phases},
        **{"WRAP_X": wrap[0], "WRAP_Y": wrap[1]},
    }
    windows = (x.shape[1], x.shape[2]) if phases else (out.shape[1], out.shape[2])
    return _plan(x, w, Epilogue(b), out, windows, geometry, arch, config)


def _plan(
    x: Tensor,
    w: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    windows: tuple[int, int],  # of a phase
    geometry: dict[str, int],
    arch: int,
    config: Config | None,
) -> list[Launch]:
    batch, height, width, c = x.shape
    n, r = w.shape[-4], w.shape[-2]
    phases, pixels = geometry["PHASES"], windows[0] * windows[1]
    m = batch * pixels
    config = config or choose_config(m, n, c, r * r, phases, x.dtype, arch)
    split = config.split_k
    parts = out if split == 1 else torch.empty((split, *out.shape), dtype=torch.float32, device=x.device)
    b, channel_bias, residual, shortcut, partials = epilogue
    more_x, more_skip, more_w, more_b = shortcut or (None, None, None, None)
    c1, c2 = (0 if tensor is None else tensor.shape[-1] for tensor in (more_x, more_skip))
    present = {
        "HAS_BIAS": b is not None,
        "HAS_CHANNEL_BIAS": channel_bias is not None,
        "HAS_RESIDUAL": residual is not None,
    }

    def pointers(**tensors: Tensor | None) -> dict[str, Tensor | int | float]:
        return {f"{name}_ptr": x if tensor is None else tensor for name, tensor in tensors.items()}  # unread if absent

    added = pointers(b=b, more_b=more_b, channel_bias=channel_bias, residual=residual, partials=partials)
    stride = {"channel_bias_stride": n if channel_bias is None else channel_bias.stride(0)}
    multiply = Launch(
        conv_kernel,
        (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), split, phases),
        pointers(x=x, w=w, more_x=more_x, more_skip=more_skip, more_w=more_w, out=parts)
        | added
        | {"M": m, "H": height, "W": width, "OUT_H": windows[0], "OUT_W": windows[1]}
        | stride,
        {
            **{"C": c, "N": n, "C1": c1, "C2": c2, "R": r, **geometry, **present},
            **{"STATISTICS": partials is not None and split == 1, "ONE_IMAGE": pixels % config.block_m == 0},
            **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "SPLIT_K": split},
        },
        config.num_warps,
        config.num_stages,
    )
    if split == 1:
        return [multiply]
    m, pixels = m * phases, pixels * phases
    block_m, block_n = _adding_tile(n)
    add = Launch(
        add_parts_kernel,
        (triton.cdiv(m, block_m), triton.cdiv(n, block_n)),
        pointers(parts=parts, out=out) | added | {"M": m, "PIXELS": pixels} | stride,
        {
            **{"N": n, **present, "HAS_SHORTCUT": c1 > 0, "STATISTICS": partials is not None},
            **{"ONE_IMAGE": pixels % block_m == 0, "SPLIT_K": split, "BLOCK_M": block_m, "BLOCK_N": block_n},
        },
        num_warps=4,
    )
    return [multiply, add]


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: int = 1,
    pad: Pad = (0, 0, 0, 0),
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Shortcut | None = None,
    wrap: Wrap = (False, False),
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """2-D convolution + b + channel_bias + residual + shortcut. x [B, H, W, C], w [O, C, R, R], b [O] → [B, H', W', O].

    pad (left, right, top, bottom) is of zeros, or where an image wraps (horizontally, vertically) and both sides are padded
    alike, of its other edge; channel_bias [B, O], residual [B, H', W', O]. ValueError for what the kernel does not serve: other
    dtypes, tensors that are not contiguous, that do not fit, or of 2³¹ elements an image, images that wrap more than once.
    """
    if x.ndim != 4 or w.ndim != 4 or w.shape[2] != w.shape[3] or not x.numel() or stride < 1 or min(pad) < 0:
        raise ValueError(f"x must be [B, H, W, C] and w [O, C, R, R], not {list(x.shape)} and {list(w.shape)}")
    left, right, top, bottom = pad
    n, r = w.shape[0], w.shape[2]
    height = (x.shape[1] + top + bottom - r) // stride + 1
    width = (x.shape[2] + left + right - r) // stride + 1
    if min(height, width) < 1:
        raise ValueError(f"a {r}x{r} window does not fit into {list(x.shape)} padded by {pad}")
    if (wrap[0] and left == right > x.shape[2]) or (wrap[1] and top == bottom > x.shape[1]):
        raise ValueError(f"{list(x.shape)} padded by {pad} would wrap more than once")
    shape = (x.shape[0], height, width, n)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    epilogue = Epilogue(b, channel_bias, residual, shortcut)
    check(x, w, epilogue, out, shape)
    arch = arch_of(x.device)
    for launch in plan_conv2d(x, pack_cached(w), stride, pad, epilogue, out, arch, config, wrap):
        launch.run()
    return out


def upsample_conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    size: tuple[int, int] | None = None,
    wrap: Wrap = (False, False),
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Nearest ×2, then a 3×3 convolution with padding 1. x [B, H, W, C], w [O, C, 3, 3], b [O] → [B, 2H, 2W, O].

    size (H', W') may be one less than twice the input's, either way; wrap as in `conv2d`. ValueError for others, and as there.
    """
    check_3x3(x, w)
    batch, height, width, _ = x.shape
    twice = (2 * height, 2 * width)
    target = twice if size is None else (size[0], size[1])
    if any(not 0 <= full - wanted <= 1 for full, wanted in zip(twice, target, strict=True)):
        raise ValueError(f"size {target} is neither twice {(height, width)} nor one less")
    shape = (batch, *target, w.shape[0])
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    check(x, w, Epilogue(b), out, shape)
    packed = (_packed_phases if target == twice else _packed).get(w)
    for launch in plan_upsample_conv2d(x, packed, b, out, arch_of(x.device), config, wrap):
        launch.run()
    return out


def check_3x3(x: Tensor, w: Tensor) -> None:
    """ValueError unless x is [B, H, W, C] with elements and w [O, C, 3, 3]."""
    if x.ndim != 4 or w.ndim != 4 or w.shape[2:] != (3, 3) or not x.numel():
        raise ValueError(f"x must be [B, H, W, C] and w [O, C, 3, 3], not {list(x.shape)} and {list(w.shape)}")


def check(x: Tensor, w: Tensor, epilogue: Epilogue, out: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless all are of x's dtype and device, contiguous, not too large, and fit an output of this shape."""
    n = shape[-1]
    weight = w if w.is_contiguous() else w.permute(0, 2, 3, 1)  # as nn.Module.to(memory_format=channels_last) leaves it
    fits = (n, x.shape[-1], *w.shape[2:]) if weight is w else (n, *w.shape[2:], x.shape[-1])
    operands = {"x": (x, x.shape), "w": (weight, fits), "out": (out, shape)}
    optional = {"b": (epilogue.b, (n,)), "residual": (epilogue.residual, shape)}
    if epilogue.shortcut is not None:
        more_x, more_skip, more_w, more_b = epilogue.shortcut
        c1, c2 = more_x.shape[-1], 0 if more_skip is None else more_skip.shape[-1]
        optional |= {
            "the shortcut's x": (more_x, (*shape[:3], c1)),
            "the shortcut's skip": (more_skip, (*shape[:3], c2)),
        }
        optional |= {"the shortcut's w": (more_w, (n, c1 + c2, 1, 1)), "the shortcut's b": (more_b, (n,))}
    bias = epilogue.channel_bias
    if bias is not None:  # a slice of all time projections: only its rows are contiguous
        if bias.shape != (shape[0], n) or (bias.stride(1) != 1 and n > 1):
            raise ValueError(f"channel_bias must be {[shape[0], n]} with contiguous rows, not {list(bias.shape)}")
        optional |= {"channel_bias": (bias[0], (n,))}
    operands |= {name: (tensor, size) for name, (tensor, size) in optional.items() if tensor is not None}
    check_operands(operands)
    for name, (tensor, _) in operands.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x, not {tensor.dtype}")
        if tensor[0].numel() >= 2**31:
            raise ValueError(f"{name} has 2^31 elements or more an image")


def pack_cached(w: Tensor) -> Tensor:
    """`pack`, once for each weight as long as it does not change."""
    return _packed.get(w)


_packed = PackedWeights(pack)
_packed_phases = PackedWeights(pack_phases)
