"""The autoencoder of latent diffusion: images ↔ latents.

Esser et al. 2021 (arXiv 2012.09841) and Rombach et al. 2022 (arXiv 2112.10752); the attribute names are diffusers'
AutoencoderKL's. Images lie in [−1, 1]; latents are scaled to about unit variance, as the UNet sees them.
The sizes in the comments are Stable Diffusion's (f8, 4 channels); the family reaches from f2 to f32, and its other half, with
a codebook, is in vq.py. Latent diffusion's residual blocks could take a time embedding, and dropout: no autoencoder it
released has a time, and dropout is for training, so neither is here.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from fastsd.config import VAEConfig
from fastsd.models.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    Level,
    Linear,
    ResBlock,
    Upsample,
    conv1x1,
    conv3x3,
    module_list,
    project_heads,
)
from fastsd.ops import REFERENCE, Ops, Pad

EPS = 1e-6
RIGHT_AND_BOTTOM: Pad = (0, 1, 0, 1)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config = config
        latents, coded = config.latent_channels, config.coded_channels
        self.encoder = Encoder(config, ops, 2 * coded)
        self.decoder = Decoder(config, ops)
        self.quant_conv = conv1x1(ops, 2 * coded, 2 * latents) if config.use_quant_conv else None
        self.post_quant_conv = conv1x1(ops, latents, coded) if config.use_post_quant_conv else None

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, unscaled. image [B, H, W, 3] in [−1, 1] → two of [B, H/8, W/8, 4].

        The log-variance is clamped to [−30, 20].
        """
        h = self.encoder(image)
        h = h if self.quant_conv is None else self.quant_conv(h)
        mean, logvar = h.chunk(2, dim=-1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(mean + exp(½ logvar) · noise − shift) · scaling_factor; without noise, the mean.

        image [B, H, W, 3] in [−1, 1], noise unit Gaussian [B, H/8, W/8, 4] → latents [B, H/8, W/8, 4].
        """
        mean, logvar = self.moments(image)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, H, W, 4] as `encode` gives them → image [B, 8H, 8W, 3], about [−1, 1], not clamped."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, ops: Ops, out_channels: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = conv3x3(ops, config.in_channels, channels[0])
        self.down_blocks = module_list(down_blocks(config, ops))
        self.mid_block = mid_block(config, ops)
        self.conv_norm_out = GroupNorm(ops, config.norm_num_groups, channels[-1], EPS, silu=True)
        self.conv_out = conv3x3(ops, channels[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, 3] → [B, H/8, W/8, 8]
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
        h = self.mid_block(h)
        return self.conv_out(self.conv_norm_out(h))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, ops: Ops) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = conv3x3(ops, config.coded_channels, channels[-1])
        self.mid_block = mid_block(config, ops)
        self.up_blocks = module_list(up_blocks(config, ops))
        self.conv_norm_out = GroupNorm(ops, config.norm_num_groups, channels[0], EPS, silu=True)
        self.conv_out = conv3x3(ops, channels[0], config.out_channels)

    def forward(self, z: Tensor) -> Tensor:  # [B, H, W, 4] → [B, 8H, 8W, 3]
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
            if block.upsamplers is not None:
                h = block.upsamplers[0](h)
        return self.conv_out(self.conv_norm_out(h))


class Block(Level["Attention"]):
    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] → [B, H, W, O]
        for resnet, attention in self.layers():
            x = resnet(x)
            x = x if attention is None else attention(x)
        return x


def down_blocks(config: VAEConfig, ops: Ops) -> Iterator[Block]:
    channels = config.block_out_channels
    width = channels[0]
    for level, out in enumerate(channels):
        block = _level(config, ops, width, out, config.layers_per_block, config.down_attention[level])
        if level < len(channels) - 1:
            downsample = Downsample(ops, out, RIGHT_AND_BOTTOM, with_conv=config.resamp_with_conv)
            block.downsamplers = module_list([downsample])
        width = out
        yield block


def mid_block(config: VAEConfig, ops: Ops) -> Block:
    width, groups = config.block_out_channels[-1], config.norm_num_groups
    attentions = [Attention(ops, width, groups)] if config.mid_block_add_attention else []
    return Block([ResBlock(ops, width, width, groups, EPS) for _ in range(2)], attentions)


def up_blocks(config: VAEConfig, ops: Ops) -> Iterator[Block]:
    channels = config.block_out_channels[::-1]
    width = channels[0]
    for level, out in enumerate(channels):
        block = _level(config, ops, width, out, config.layers_per_block + 1, config.up_attention[level])
        if level < len(channels) - 1:
            block.upsamplers = module_list([Upsample(ops, out, with_conv=config.resamp_with_conv)])
        width = out
        yield block


def _level(config: VAEConfig, ops: Ops, in_channels: int, out_channels: int, layers: int, attention: bool) -> Block:
    groups = config.norm_num_groups
    widths = [in_channels, *[out_channels] * (layers - 1)]
    resnets = [_resnet(config, ops, width, out_channels) for width in widths]
    return Block(resnets, [Attention(ops, out_channels, groups) for _ in widths] if attention else ())


def _resnet(config: VAEConfig, ops: Ops, in_channels: int, out_channels: int) -> ResBlock:
    wide = config.use_conv_shortcut and in_channels != out_channels
    return (WideShortcut if wide else ResBlock)(ops, in_channels, out_channels, config.norm_num_groups, EPS)


class WideShortcut(ResBlock):
    """A ResBlock whose input is brought to the new width by a 3×3 convolution (latent diffusion's use_conv_shortcut)."""

    def __init__(self, ops: Ops, in_channels: int, out_channels: int, groups: int, eps: float) -> None:
        super().__init__(ops, in_channels, out_channels, groups, eps)
        self.conv_shortcut: Conv2d = conv3x3(ops, in_channels, out_channels)

    def forward(self, x: Tensor, time_bias: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        assert time_bias is None  # an autoencoder has no time
        assert skip is None
        h = self.norm2(self.conv1(self.norm1(x)))
        return self.conv2(h, residual=self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over the H·W tokens, behind a GroupNorm and beside a residual."""

    def __init__(self, ops: Ops, channels: int, groups: int) -> None:
        super().__init__()
        self.ops = ops
        self.group_norm = GroupNorm(ops, groups, channels, EPS)
        self.to_q = Linear(ops, channels, channels)
        self.to_k = Linear(ops, channels, channels)
        self.to_v = Linear(ops, channels, channels)
        self.to_out = module_list([Linear(ops, channels, channels)])

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        tokens = self.group_norm(x).flatten(1, 2)  # [B, H·W, C]
        q, k, v = project_heads(self.ops, tokens, (self.to_q, self.to_k, self.to_v), heads=1)  # [B, H·W, 1, C]
        h = self.ops.attention(q, k, v, head_dim=x.shape[-1]).flatten(2).unflatten(1, x.shape[1:3])  # [B, H, W, C]
        return self.to_out[0](h, residual=x)
