"""Layers that the nets share. Parameters are torch.nn's, named as in diffusers' checkpoints; the arithmetic is `ops`'s.

Activations are NHWC [B, H, W, C]; tokens [B, L, C] with L = H·W are a view of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Generic, TypeVar, cast

from torch import Tensor, nn

from fastsd.ops import Activation, Ops, Pad, Shortcut, upsample

M = TypeVar("M", bound=nn.Module)
A = TypeVar("A", bound=nn.Module)

SAME: Pad = (1, 1, 1, 1)


class Linear(nn.Linear):
    """x·Wᵀ + b, with what follows it: an activation, then a residual."""

    def __init__(self, ops: Ops, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.ops = ops

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:  # [..., K] → [..., N]
        return self.ops.linear(input, self.weight, self.bias, residual, activation)


class GEGLU(nn.Module):
    """The gated half of a transformer's feed-forward (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, ops: Ops, in_features: int, out_features: int) -> None:
        super().__init__()
        self.ops = ops
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, K] → [B, L, N]
        return self.ops.geglu(x, self.proj.weight, self.proj.bias)


class LayerNorm(nn.LayerNorm):
    def __init__(self, ops: Ops, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.ops = ops

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.layer_norm(input, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    def __init__(self, ops: Ops, groups: int, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.ops = ops
        self.silu = silu

    def forward(self, input: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.ops.group_norm(input, self.weight, self.bias, self.num_groups, self.eps, self.silu, skip)


class Conv2d(nn.Conv2d):
    """A convolution with what follows it: a bias a channel and image, a residual or a shortcut."""

    def __init__(
        self,
        ops: Ops,
        in_channels: int,
        out_channels: int,
        kernel: int,
        pad: Pad,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, bias=bias)
        self.ops = ops
        self.pad = pad

    def forward(
        self,
        input: Tensor,
        channel_bias: Tensor | None = None,
        residual: Tensor | None = None,
        shortcut: Shortcut | None = None,
    ) -> Tensor:  # [B, H, W, C] → [B, H', W', O]
        return self.ops.conv2d(
            input, self.weight, self.bias, self.stride[0], self.pad, channel_bias, residual, shortcut
        )


def conv3x3(ops: Ops, in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(ops, in_channels, out_channels, 3, SAME)


def conv1x1(ops: Ops, in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(ops, in_channels, out_channels, 1, (0, 0, 0, 0))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, + time; GroupNorm, SiLU, conv, + input (He et al. 2016, as in Ho et al. 2020, appendix B).

    time_width: width of the time embedding it projects from; None in the VAE, which has no time.
    """

    def __init__(
        self, ops: Ops, in_channels: int, out_channels: int, groups: int, eps: float, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = GroupNorm(ops, groups, in_channels, eps, silu=True)
        self.conv1 = conv3x3(ops, in_channels, out_channels)
        self.time_emb_proj = None if time_width is None else Linear(ops, time_width, out_channels)
        self.norm2 = GroupNorm(ops, groups, out_channels, eps, silu=True)
        self.conv2 = conv3x3(ops, out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else conv1x1(ops, in_channels, out_channels)

    def forward(self, x: Tensor, time_bias: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x [B, H, W, C] (+ skip [B, H, W, C₂] beside it), time_bias [B, O] = time_emb_proj(SiLU(time)) → [B, H, W, O]."""
        conv, norm = self.conv1, self.norm2
        h = self.norm1(x, skip)
        h = self.ops.conv2d_norm(
            h, conv.weight, conv.bias, time_bias, norm.weight, norm.bias, norm.num_groups, norm.eps
        )  # [B, H, W, O]
        if self.conv_shortcut is None:
            return self.conv2(h, residual=x)
        assert self.conv_shortcut.bias is not None
        return self.conv2(h, shortcut=Shortcut(x, skip, self.conv_shortcut.weight, self.conv_shortcut.bias))


class Downsample(nn.Module):
    """Half the height and width: a stride-2 convolution, or average pooling where the autoencoder's config says so."""

    def __init__(self, ops: Ops, channels: int, pad: Pad, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = Conv2d(ops, channels, channels, 3, pad, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] → [B, H/2, W/2, C]
        if self.conv is None:
            batch, height, width, channels = x.shape
            x = x[:, : height // 2 * 2, : width // 2 * 2]  # an odd last row or column has no partner
            return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest, then a convolution unless the config leaves it out."""

    def __init__(self, ops: Ops, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.ops = ops
        self.conv = nn.Conv2d(channels, channels, 3) if with_conv else None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # [B, H, W, C] → [B, 2H, 2W, C]
        if self.conv is None:
            return upsample(x, size)
        return self.ops.upsample_conv2d(x, self.conv.weight, self.conv.bias, size)


class Level(nn.Module, Generic[A]):
    """ResBlocks, each followed by an attention as far as there are any, and a change of size."""

    def __init__(self, resnets: Iterable[ResBlock], attentions: Iterable[A] = ()) -> None:
        super().__init__()
        self.attentions = module_list(attentions)
        self.resnets = module_list(resnets)
        self.downsamplers: list[Downsample] | None = None
        self.upsamplers: list[Upsample] | None = None

    def layers(self) -> Iterator[tuple[ResBlock, A | None]]:
        yield from zip_longest(self.resnets, self.attentions)


def module_list(modules: Iterable[M]) -> list[M]:
    """nn.ModuleList, typed by what it holds: the type checker takes the items of a plain one for bare Modules."""
    return cast(list[M], nn.ModuleList(modules))


def project_heads(ops: Ops, x: Tensor, layers: Sequence[Linear], heads: int) -> tuple[Tensor, ...]:
    """The linear layers of one input, their outputs in heads. x [B, L, K] → each [B, L, N, D], or as wide as `ops` stores D."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return ops.project_heads(x, [layer.weight for layer in layers], biases or None, heads)
