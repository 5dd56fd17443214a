"""The VAE in tiles against diffusers' AutoencoderKL with enable_tiling and the same weights."""

from dataclasses import replace

import diffusers
import pytest
import torch

from fastsd.config import VAEConfig
from fastsd.models.vae import VAE
from fastsd.ops import REFERENCE
from fastsd.vae_tiles import tiled
from tests import oracle
from tests.tolerances import NET

SIDE, UNIT = 8, 4  # of a tile, in latents; pixels a latent
SIZES = {"one tile": (8, 8), "one more than a tile": (9, 5), "odd, last tiles of one latent": (13, 19)}


@pytest.fixture(scope="module")
def nets() -> tuple[diffusers.AutoencoderKL, VAE]:
    config = oracle.SD_VAE | {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": SIDE * UNIT,
    }
    theirs = oracle.vae(config)
    theirs.enable_tiling()
    assert theirs.tile_latent_min_size == SIDE
    ours = VAE(VAEConfig.from_json(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def inputs(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.inference_mode()
def test_decode_equals_diffusers(nets: tuple[diffusers.AutoencoderKL, VAE], size: tuple[int, int]) -> None:
    theirs, ours = nets
    latents = inputs(4, *size)
    expected = theirs.decode(latents / ours.config.scaling_factor).sample
    decoded = tiled(ours, SIDE).decode(oracle.nhwc(latents))
    oracle.assert_close(oracle.nchw(decoded), expected, NET, "image")
    whole = ours.decode(oracle.nhwc(latents))
    assert (decoded - whole).abs().max() > 1e-2 or max(size) <= SIDE, "it was not cut into tiles"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.inference_mode()
def test_a_sample_of_the_encoded_equals_diffusers(
    nets: tuple[diffusers.AutoencoderKL, VAE], size: tuple[int, int]
) -> None:
    """Also that mean and log-variance are tiled before the sample is drawn: noise must not be blended."""
    theirs, ours = nets
    image = inputs(3, size[0] * UNIT, size[1] * UNIT)
    distribution = theirs.encode(image).latent_dist
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(9))
    tiles = tiled(ours, SIDE)
    mean, logvar = tiles.moments(oracle.nhwc(image))
    oracle.assert_close(oracle.nchw(mean), distribution.mean, NET, "mean")
    oracle.assert_close(oracle.nchw(logvar), distribution.logvar, NET, "log-variance")
    expected = (distribution.mean + distribution.std * noise) * theirs.config.scaling_factor
    encoded = tiles.encode(oracle.nhwc(image), oracle.nhwc(noise))
    oracle.assert_close(oracle.nchw(encoded), expected, NET, "latents")


@torch.inference_mode()
def test_log_variance_is_clamped_after_the_blending(nets: tuple[diffusers.AutoencoderKL, VAE]) -> None:
    """Log-variances out of range on one side of a seam: the clamped ones, blended, would be others."""
    theirs = oracle.vae(dict(nets[0].config))
    theirs.quant_conv.weight.mul_(100)
    theirs.enable_tiling()
    ours = VAE(nets[1].config)
    ours.load_state_dict(theirs.state_dict())
    image = inputs(3, 13 * UNIT, 8 * UNIT)
    expected = theirs.encode(image).latent_dist.logvar
    assert (expected == -30).any()
    assert (expected == 20).any()
    _, logvar = tiled(ours, SIDE).moments(oracle.nhwc(image))
    torch.testing.assert_close(oracle.nchw(logvar), expected, rtol=NET, atol=NET)


@torch.inference_mode()
def test_tiles_use_the_same_weights_and_ops(nets: tuple[diffusers.AutoencoderKL, VAE]) -> None:
    """A weight that changes in place is seen, the VAE itself stays whole, and the ops it was made with are what is run."""
    sides: list[int] = []

    def conv2d(x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        assert x.is_contiguous(), "kernels read contiguous tensors"
        sides.append(max(x.shape[1:3]))
        return REFERENCE.conv2d(x, *arguments, **options)

    ours = VAE(nets[1].config, replace(REFERENCE, conv2d=conv2d))
    ours.load_state_dict(nets[1].state_dict())
    latents = oracle.nhwc(inputs(4, 8, 17))
    tiles = tiled(ours, SIDE)
    before = tiles.decode(latents)
    assert max(sides) == SIDE * UNIT, f"convolutions over {max(sides)} pixels"
    assert {id(p) for p in tiles.parameters()} == {id(p) for p in ours.parameters()}
    ours.decoder.conv_out.bias.add_(1.0)
    torch.testing.assert_close(tiles.decode(latents), before + 1.0)
    torch.testing.assert_close(ours.decode(latents), nets[1].decode(latents) + 1.0)
