"""The UNet of Stable Diffusion 1.x and 2.x: noisy latents, time and context → what the model predicts.

Rombach et al. 2022, arXiv 2112.10752; the attribute names are diffusers' UNet2DConditionModel's. What does not change from
step to step is not computed in a step: `project_context` once a prompt, `project_time` once a schedule.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastsd.config import UNetConfig
from fastsd.models.layers import (
    GEGLU,
    SAME,
    Downsample,
    GroupNorm,
    LayerNorm,
    Level,
    Linear,
    ResBlock,
    Upsample,
    conv1x1,
    conv3x3,
    module_list,
    project_heads,
)
from fastsd.ops import REFERENCE, Ops

KeyValue = tuple[Tensor, Tensor]
"""(k, v), each [B, L, N, D], or as wide as the ops store D: a context as one cross-attention reads it."""


class UNet(nn.Module):
    def __init__(self, config: UNetConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        time_width = 4 * channels[0]
        self.conv_in = conv3x3(ops, config.in_channels, channels[0])
        self.time_embedding = TimeEmbedding(ops, channels[0], time_width)
        self.down_blocks = module_list(down_blocks(config, ops, time_width))
        self.mid_block = mid_block(config, ops, time_width)
        self.up_blocks = module_list(up_blocks(config, ops, time_width))
        self.conv_norm_out = GroupNorm(ops, config.norm_num_groups, channels[0], config.norm_eps, silu=True)
        self.conv_out = conv3x3(ops, channels[0], config.out_channels)

    def forward(
        self, x: Tensor, time_bias: Tensor, context: Sequence[KeyValue], context_mask: Tensor | None = None
    ) -> Tensor:
        """One prediction.

        x [B, H, W, C] noisy latents; time_bias [B, T] rows of `project_time`; context from `project_context`;
        context_mask [B, 1, 1, L], boolean (True: attend) or additive → [B, H, W, C].
        """
        time = iter(time_bias.split(self.time_widths, dim=-1))
        keys = iter(context)

        h = self.conv_in(x)  # [B, H, W, 320]
        skips = [h]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                h = resnet(h, next(time))
                h = h if attention is None else attention(h, keys, context_mask)
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
                skips.append(h)

        for resnet, attention in self.mid_block.layers():
            h = resnet(h, next(time))
            h = h if attention is None else attention(h, keys, context_mask)

        for block in self.up_blocks:
            for resnet, attention in block.layers():
                h = resnet(h, next(time), skip=skips.pop())
                h = h if attention is None else attention(h, keys, context_mask)
            if block.upsamplers is not None:
                h = block.upsamplers[0](h, size=skips[-1].shape[1:3])

        return self.conv_out(self.conv_norm_out(h))

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Keys and values of every cross-attention, in the order they are read. context [B, L, C]; once a prompt."""
        return [block.attn2.project(context) for block in self.modules() if isinstance(block, TransformerBlock)]

    def project_time(self, timesteps: Tensor) -> Tensor:
        """Time embedding and every ResBlock's projection of it. timesteps [n] fp32 → [n, T]; once a schedule."""
        time = sinusoid(timesteps, self.time_embedding.width, self.config.flip_sin_to_cos, self.config.freq_shift)
        time = nn.functional.silu(self.time_embedding(time.to(self.conv_in.weight.dtype)))
        return torch.cat([project(time) for project in self._time_projections()], dim=-1)

    @property
    def time_widths(self) -> list[int]:
        """Widths of the ResBlocks' time projections, in the order they are read; their sum is T."""
        return [project.out_features for project in self._time_projections()]

    def _time_projections(self) -> Iterator[Linear]:
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for resnet in block.resnets:
                assert resnet.time_emb_proj is not None
                yield resnet.time_emb_proj


def down_blocks(config: UNetConfig, ops: Ops, time_width: int) -> Iterator[Level["Transformer"]]:
    channels = config.block_out_channels
    pad = SAME if config.downsample_padding else (0, 1, 0, 1)
    width = channels[0]
    for level, out in enumerate(channels):
        widths = [width, *[out] * (config.layers_per_block[level] - 1)]
        block = _level(config, ops, level, widths, config.down_attention[level], time_width)
        if level < len(channels) - 1:
            block.downsamplers = module_list([Downsample(ops, out, pad)])
        width = out
        yield block


def mid_block(config: UNetConfig, ops: Ops, time_width: int) -> Level["Transformer"]:
    width = config.block_out_channels[-1]
    resnets = [ResBlock(ops, width, width, config.norm_num_groups, config.norm_eps, time_width) for _ in range(2)]
    return Level(resnets, [_transformer(config, ops, len(config.block_out_channels) - 1)])


def up_blocks(config: UNetConfig, ops: Ops, time_width: int) -> Iterator[Level["Transformer"]]:
    channels = config.block_out_channels
    skips = _skip_widths(config)
    width = channels[-1]
    for index, level in enumerate(reversed(range(len(channels)))):
        out, count = channels[level], config.layers_per_block[level] + 1
        widths = [below + skips.pop() for below in (width, *[out] * (count - 1))]
        block = _level(config, ops, level, widths, config.up_attention[index], time_width)
        if level > 0:
            block.upsamplers = module_list([Upsample(ops, out)])
        width = out
        yield block


def _skip_widths(config: UNetConfig) -> list[int]:
    """Channels of the skips in the order the down path leaves them."""
    channels = config.block_out_channels
    widths = [channels[0]]
    for level, out in enumerate(channels):
        widths += [out] * config.layers_per_block[level]
        widths += [out] if level < len(channels) - 1 else []
    return widths


def _level(
    config: UNetConfig, ops: Ops, level: int, in_widths: Sequence[int], attention: bool, time_width: int
) -> Level["Transformer"]:
    out = config.block_out_channels[level]
    resnets = [ResBlock(ops, width, out, config.norm_num_groups, config.norm_eps, time_width) for width in in_widths]
    return Level(resnets, [_transformer(config, ops, level) for _ in resnets] if attention else ())


def _transformer(config: UNetConfig, ops: Ops, level: int) -> "Transformer":
    return Transformer(
        ops,
        channels=config.block_out_channels[level],
        heads=config.num_attention_heads[level],
        depth=config.transformer_layers_per_block[level],
        context_width=config.cross_attention_dim,
        groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
    )


class Transformer(nn.Module):
    """GroupNorm, projection in, transformer blocks over the H·W tokens, projection out, + input."""

    def __init__(
        self,
        ops: Ops,
        channels: int,
        heads: int,
        depth: int,
        context_width: int,
        groups: int,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        project = Linear if use_linear_projection else conv1x1  # the same sums, stored as [O, C] or as [O, C, 1, 1]
        self.norm = GroupNorm(ops, groups, channels, eps=1e-6)
        self.proj_in = project(ops, channels, channels)
        self.transformer_blocks = module_list(
            TransformerBlock(ops, channels, heads, context_width) for _ in range(depth)
        )
        self.proj_out = project(ops, channels, channels)

    def forward(self, x: Tensor, keys: Iterator[KeyValue], context_mask: Tensor | None = None) -> Tensor:
        size = x.shape[1:3]
        h = self.proj_in(self.norm(x)).flatten(1, 2)  # [B, H·W, C]
        for block in self.transformer_blocks:
            h = block(h, next(keys), context_mask)
        return self.proj_out(h.unflatten(1, size), residual=x)  # [B, H, W, C]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, gated feed-forward, each behind a LayerNorm and beside a residual."""

    def __init__(self, ops: Ops, channels: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(ops, channels)
        self.attn1 = Attention(ops, channels, heads, channels)
        self.norm2 = LayerNorm(ops, channels)
        self.attn2 = Attention(ops, channels, heads, context_width)
        self.norm3 = LayerNorm(ops, channels)
        self.ff = FeedForward(ops, channels)

    def forward(self, x: Tensor, context: KeyValue, context_mask: Tensor | None = None) -> Tensor:  # [B, L, C]
        x = self.attn1(self.norm1(x), None, residual=x)
        x = self.attn2(self.norm2(x), context, residual=x, mask=context_mask)
        return self.ff(self.norm3(x), residual=x)


class Attention(nn.Module):
    """softmax(q·kᵀ/√d)·v in heads (Vaswani et al. 2017); keys and values of x itself, or of a context."""

    def __init__(self, ops: Ops, channels: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.ops = ops
        self.heads = heads
        self.head_dim = channels // heads
        self.to_q = Linear(ops, channels, channels, bias=False)
        self.to_k = Linear(ops, context_width, channels, bias=False)
        self.to_v = Linear(ops, context_width, channels, bias=False)
        self.to_out = module_list([Linear(ops, channels, channels)])

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values of a context [B, L, C]."""
        key, value = project_heads(self.ops, context, (self.to_k, self.to_v), self.heads)
        return key, value

    def forward(self, x: Tensor, context: KeyValue | None, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, L, C], attending to a projected context, or to itself → [B, L, C]."""
        layers = (self.to_q,) if context else (self.to_q, self.to_k, self.to_v)
        q, *own = project_heads(self.ops, x, layers, self.heads)
        h = self.ops.attention(q, *(context or own), mask, head_dim=self.head_dim)  # [B, L, N, D]
        return self.to_out[0](h.flatten(2), residual)


class FeedForward(nn.Module):
    def __init__(self, ops: Ops, channels: int) -> None:
        super().__init__()
        # net.1 is a dropout where the checkpoints were trained: it has no weights, only a place.
        self.net = module_list([GEGLU(ops, channels, 4 * channels), nn.Identity(), Linear(ops, 4 * channels, channels)])

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # [B, L, C]
        return self.net[2](self.net[0](x), residual)


class TimeEmbedding(nn.Module):
    def __init__(self, ops: Ops, width: int, out_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = Linear(ops, width, out_width)
        self.linear_2 = Linear(ops, out_width, out_width)

    def forward(self, time: Tensor) -> Tensor:  # [n, 320] → [n, 1280]
        return self.linear_2(self.linear_1(time, activation="silu"))


def sinusoid(timesteps: Tensor, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """sin and cos of t·10000^(−i/(width/2 − freq_shift)), in fp32 whatever the net's dtype: bf16 is off by up to 2.

    timesteps [n], fractions allowed → [n, width], cosines first if flip_sin_to_cos. Vaswani et al. 2017, section 3.5.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angle = timesteps.float()[:, None] * torch.exp(index * (-math.log(10_000) / (half - freq_shift)))
    sin, cos = angle.sin(), angle.cos()
    return torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=-1)
