"""TAESD's decoder: latents → images by some 1.2 million weights and no attention, for previews.

Bohan's Tiny AutoEncoder for Stable Diffusion (github.com/madebyollin/taesd); the attribute names are those of the decoder in
diffusers' AutoencoderTiny. The original's are the same but for a first layer without weights, the clamp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.models.layers import SAME, Conv2d, conv3x3
from fastsd.ops import REFERENCE, Ops, upsample

WIDTH = 64
BLOCKS = 3  # a level; one on the last


class TAESDDecoder(nn.Module):
    def __init__(self, latent_channels: int = 4, levels: int = 4, ops: Ops = REFERENCE) -> None:
        """levels: of which each but the last doubles height and width."""
        super().__init__()
        layers = [conv3x3(ops, latent_channels, WIDTH), nn.ReLU()]
        for _ in range(levels - 1):
            layers += [Block(ops) for _ in range(BLOCKS)]
            layers += [Upsample(), Conv2d(ops, WIDTH, WIDTH, 3, SAME, bias=False)]
        self.layers = nn.Sequential(*layers, Block(ops), conv3x3(ops, WIDTH, 3))

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, H, W, 4] as the UNet sees them → image [B, 8H, 8W, 3], about [−1, 1], not clamped."""
        return 2 * self.layers(3 * torch.tanh(latents / 3)) - 1


class Block(nn.Module):
    """Three convolutions beside a residual, each followed by a ReLU."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        first, second, third = (conv3x3(ops, WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        return F.relu(self.conv(x) + x)


class Upsample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] → [B, 2H, 2W, C]
        return upsample(x)
