"""The seam between the nets and whatever computes them.

`Ops` is handed to every model at construction: `UNet(config, ops=REFERENCE)`. There is no global switch and no silent fallback;
`dataclasses.replace(ops, geglu=REFERENCE.geglu)` swaps one op, which is how an error is bisected.

The reference ops below are the specification. They are plain PyTorch, run on any device in any floating dtype, and are
differentiable. Letters: B batch, H W height and width, C O channels in and out, L tokens, N heads, D head dim, S sampler state.
Activations are NHWC throughout, so tokens [B, H·W, C] are a view of an image [B, H, W, C].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "quick_gelu"]
Pad = tuple[int, int, int, int]
"""Padding (left, right, top, bottom). The VAE's downsample is (0, 1, 0, 1), the UNet's (1, 1, 1, 1)."""
Wrap = tuple[bool, bool]
"""(horizontally, vertically): whether the padding is the picture's other edge. Else, and where two sides differ, it is zeros."""
Affine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x·wᵀ + b; what `linear` and `geglu` are built round."""
Convolve = Callable[[Tensor, Tensor, Tensor | None, int, Pad], Tensor]
"""`convolve`, or another that computes the same; what `conv2d` and `upsample_conv2d` are built round."""


class StepRow(NamedTuple):
    """One row of a sampler's table for each image of a batch: what `sampler_step` needs beside the tensors."""

    update: Tensor
    """[B, S, S+2] fp32: state ← update · (state, guided output, noise). With a step, [n, B, S, S+2]: the whole table."""
    guidance: Tensor
    """[B] fp32 guidance scale g: guided = uncond + g · (cond − uncond). Unused when the UNet ran without guidance."""
    rescale: Tensor | None = None
    """[B] fp32 guidance_rescale φ in [0, 1] (Lin et al. 2024, arXiv 2305.08891, eq. 15–16); None: off."""
    counter: Tensor | None = None
    """[2 + B] int32 on the device, moved on by the op: which row of the table it is; 0, the kernel's own; and for each image the
    first row whose latents were not finite, until then any number beyond the last. None: update is one row."""


class Shortcut(NamedTuple):
    """A 1×1 convolution to be added where a ResBlock changes the number of channels: w·(x beside skip) + b."""

    x: Tensor
    """[B, H, W, C]"""
    skip: Tensor | None
    """[B, H, W, C₂]"""
    w: Tensor
    """[O, C+C₂, 1, 1]"""
    b: Tensor
    """[O]"""


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    affine: Affine = F.linear,
) -> Tensor:
    """activation(x·wᵀ + b) + residual. x [..., K], w [N, K], b [N], residual [..., N]."""
    y = affine(x, w, b)
    y = y if activation is None else _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def geglu(x: Tensor, w: Tensor, b: Tensor, affine: Affine = F.linear) -> Tensor:
    """value · gelu_erf(gate), (value, gate) the halves of x·wᵀ + b. x [..., K], w [2N, K], b [2N] → [..., N]. Shazeer 2020."""
    value, gate = affine(x, w, b).chunk(2, dim=-1)
    return value * F.gelu(gate)


def project_heads(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, heads: int, affine: Affine = F.linear
) -> tuple[Tensor, ...]:
    """x·wᵀ + b in heads, for each weight. x [B, L, K], w [N·D, K], b [N·D] → each [B, L, N, D].

    Other op sets may return heads stored wider, [B, L, N, D′], with zeros from D on; `attention` takes them.
    """
    added = [None] * len(weights) if biases is None else biases
    return tuple(affine(x, w, b).unflatten(-1, (heads, -1)) for w, b in zip(weights, added, strict=True))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    head_dim: int | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√D + mask)·v a head. q [B, L, N, D], k v [B, M, N, D] → [B, L, N, D]; scores and softmax in fp32.

    mask, broadcastable to [B, N, L, M], is boolean (True: attend) or additive. A row that may attend nowhere gives 0.
    head_dim: D, where heads are stored wider (see `project_heads`).
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    q, k, v = (t[..., :head_dim].transpose(1, 2) for t in (q, k, v))  # [B, N, L, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis. x [..., C], w b [C]."""
    return F.layer_norm(x, (x.shape[-1],), w, b, eps)


def group_norm(
    x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, silu: bool = False, skip: Tensor | None = None
) -> Tensor:
    """Group norm, then SiLU if asked. x [B, H, W, C] → same; with a skip [B, H, W, C₂] laid beside x: [B, H, W, C+C₂]."""
    x = _beside(x, skip)
    if x.dtype == torch.float32:
        # PyTorch's NHWC kernel for CPUs takes the variance as E[x²] − E[x]²: 1e-3 off where the mean is 100 times the
        # deviation. Without the mean there is nothing to cancel; half precision has coarser errors of its own.
        x = x - _group_mean(x, groups)
    y = _nhwc(F.group_norm(_nchw(x), groups, w, b, eps))
    return F.silu(y) if silu else y


def convolve(x: Tensor, w: Tensor, b: Tensor | None, stride: int, pad: Pad) -> Tensor:
    """The convolution alone, padded by zeros. x [B, H, W, C] → [B, H', W', O]."""
    left, right, top, bottom = pad
    if (left, top) == (right, bottom):
        return _nhwc(F.conv2d(_nchw(x), w, b, stride, (top, left)))
    return _nhwc(F.conv2d(F.pad(_nchw(x), pad), w, b, stride))


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
    convolve: Convolve = convolve,
) -> Tensor:
    """2-D convolution + b + channel_bias + residual + shortcut. x [B, H, W, C], w [O, C, R, R], b [O] → [B, H', W', O].

    channel_bias [B, O] is a ResBlock's time projection; residual [B, H', W', O] or shortcut its other branch; wrap: see `Wrap`.
    """
    x, pad = _wrapped(x, pad, wrap)
    y = convolve(x, w, b, stride, pad)
    y = y if channel_bias is None else y + channel_bias[:, None, None, :]
    y = y if shortcut is None else y + convolve(_beside(shortcut.x, shortcut.skip), *shortcut[2:], 1, (0, 0, 0, 0))
    return y if residual is None else y + residual


def upsample_conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    size: tuple[int, int] | None = None,
    wrap: Wrap = (False, False),
    convolve: Convolve = convolve,
) -> Tensor:
    """Nearest ×2, then a 3×3 convolution with padding 1. x [B, H, W, C], w [O, C, 3, 3] → [B, 2H, 2W, O].

    size (H', W') is what to enlarge to instead: beside a skip of odd height 2H−1 there is one row less.
    """
    return conv2d(upsample(x, size), w, b, 1, (1, 1, 1, 1), wrap=wrap, convolve=convolve)


def conv2d_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    channel_bias: Tensor | None,
    norm_w: Tensor,
    norm_b: Tensor,
    groups: int,
    eps: float,
    wrap: Wrap = (False, False),
    convolve: Convolve = convolve,
) -> Tensor:
    """3×3 convolution, padding 1, + b + channel_bias; group norm; SiLU: the middle of a ResBlock, whose sum none else reads.

    x [B, H, W, C], w [O, C, 3, 3], b norm_w norm_b [O], channel_bias [B, O] → [B, H, W, O].
    """
    y = conv2d(x, w, b, 1, (1, 1, 1, 1), channel_bias, wrap=wrap, convolve=convolve)
    return group_norm(y, norm_w, norm_b, groups, eps, silu=True)


def step_input(
    state: Tensor, weights: Tensor, time_bias: Tensor, time_rows: Tensor, counter: Tensor, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """What the UNet is given at the counter's row: Σ_s weights[row, b, s]·state_s and time_bias[time_rows[row, b]], copied.

    state [S, B, H, W, C] and weights [n, B, S] fp32; time_bias, the time's projections, [m, T]; time_rows [n, B] and counter
    int32, the row first → x [copies·B, H, W, C] and [copies·B, T], both in time_bias's dtype.
    """
    row = counter[:1]
    x = torch.einsum("bs,sbhwc->bhwc", weights.index_select(0, row)[0], state).to(time_bias.dtype)
    time = time_bias.index_select(0, time_rows.index_select(0, row)[0])
    return torch.cat([x] * copies), torch.cat([time] * copies)


def sampler_step(state: Tensor, out: Tensor, noise: Tensor | None, row: StepRow, new: Tensor | None = None) -> Tensor:
    """Guidance and one row of each image's sampler table, in the state's fp32.

    state [S, B, H, W, C]; out [B, H, W, C], or [2B, H, W, C] = (unconditional, conditional) to be guided;
    noise [B, H, W, C] unit Gaussian, None where the row's noise column is 0 → new state [S, B, H, W, C], written to `new` if
    given, which may be the state itself.
    """
    out = out.to(state.dtype)
    out = guide(out, row) if out.shape[0] == 2 * state.shape[1] else out
    update = row.update if row.counter is None else row.update.index_select(0, row.counter[:1])[0]
    update = update if noise is not None else update[..., :-1]
    basis = [*state, out] if noise is None else [*state, out, noise]
    result = torch.einsum("bsk,kbhwc->sbhwc", update, torch.stack(basis))
    if row.counter is not None:
        step, first_bad = row.counter[:1], row.counter[2:]
        finite = result[0].flatten(1).isfinite().all(1)
        first_bad.copy_(torch.where(finite, first_bad, torch.minimum(first_bad, step)))
        step.add_(1)
    return result if new is None else new.copy_(result)


def guide(out: Tensor, row: StepRow) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), rescaled where row.rescale asks. out [2B, H, W, C] → [B, H, W, C]."""
    uncond, cond = out.chunk(2)
    guided = torch.lerp(uncond, cond, row.guidance.view(-1, 1, 1, 1))
    if row.rescale is None:
        return guided
    std = [t.flatten(1).std(1).view(-1, 1, 1, 1) for t in (cond, guided)]
    return torch.lerp(guided, guided * (std[0] / std[1]), row.rescale.view(-1, 1, 1, 1))


def upsample(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Nearest neighbour to size (H', W'), by default twice the height and width. [B, H, W, C] → [B, H', W', C]."""
    return _nhwc(F.interpolate(_nchw(x), size=size or (2 * x.shape[1], 2 * x.shape[2]), mode="nearest"))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": _quick_gelu}


def _nchw(x: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W] in channels_last memory: a view."""
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _group_mean(x: Tensor, groups: int) -> Tensor:
    """Mean of each group, repeated for its channels. [B, H, W, C] → [B, 1, 1, C]."""
    mean = x.mean((1, 2)).unflatten(-1, (groups, -1))
    return mean.mean(-1, keepdim=True).expand_as(mean).flatten(1)[:, None, None]


def _wrapped(x: Tensor, pad: Pad, wrap: Wrap) -> tuple[Tensor, Pad]:
    """x with its other edges laid round it where they are the padding, and the padding that is left."""
    left, right, top, bottom = pad
    beside = left if wrap[0] and left == right else 0
    above = top if wrap[1] and top == bottom else 0
    if beside or above:
        x = F.pad(x[:, None], (0, 0, beside, beside, above, above), mode="circular")[:, 0]
    return x, (left - beside, right - beside, top - above, bottom - above)


def _beside(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat((x, skip), dim=-1)


@dataclass(frozen=True)
class Ops:
    """The operations a net is made of; each field has the signature of the reference function of its name."""

    name: str
    linear: Callable[..., Tensor]
    geglu: Callable[..., Tensor]
    project_heads: Callable[..., tuple[Tensor, ...]]
    attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    group_norm: Callable[..., Tensor]
    conv2d: Callable[..., Tensor]
    conv2d_norm: Callable[..., Tensor]
    upsample_conv2d: Callable[..., Tensor]
    step_input: Callable[..., tuple[Tensor, Tensor]]
    sampler_step: Callable[..., Tensor]


REFERENCE = Ops(
    name="reference",
    linear=linear,
    geglu=geglu,
    project_heads=project_heads,
    attention=attention,
    layer_norm=layer_norm,
    group_norm=group_norm,
    conv2d=conv2d,
    conv2d_norm=conv2d_norm,
    upsample_conv2d=upsample_conv2d,
    step_input=step_input,
    sampler_step=sampler_step,
)
