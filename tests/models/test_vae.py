"""The VAE against diffusers' AutoencoderKL with the same weights."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D

from fastsd.config import VAEConfig
from fastsd.models.vae import VAE
from tests import oracle
from tests.tolerances import NET

CONFIGS = {
    "sd": oracle.SD_VAE,
    "attention at two levels": {
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 3,
        "scaling_factor": 0.5,
    },
    "bare": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5,
        "shift_factor": 0.1,
    },
}
SIZES = {"square": (32, 32), "tall": (48, 16)}


@pytest.fixture(scope="module", params=CONFIGS)
def nets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[diffusers.AutoencoderKL, VAE]:
    theirs = oracle.vae(CONFIGS[request.param])
    with torch.device("meta"):
        ours = VAE(VAEConfig.from_json(dict(theirs.config)))
    return theirs, oracle.load(ours, theirs, "vae", tmp_path_factory.mktemp("vae"))


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.inference_mode()
def test_moments_equal_diffusers(nets: tuple[diffusers.AutoencoderKL, VAE], size: tuple[int, int]) -> None:
    theirs, ours = nets
    expected = theirs.encode(images(size)).latent_dist
    mean, logvar = ours.moments(oracle.nhwc(images(size)))
    oracle.assert_close(oracle.nchw(mean), expected.mean, NET, "mean")
    oracle.assert_close(oracle.nchw(logvar), expected.logvar, NET, "log-variance")


@torch.inference_mode()
def test_encode_scales_a_sample(nets: tuple[diffusers.AutoencoderKL, VAE]) -> None:
    theirs, ours = nets
    distribution = theirs.encode(images((32, 32))).latent_dist
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(9))
    sample = distribution.mean + distribution.std * noise
    expected = (sample - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor
    encoded = ours.encode(oracle.nhwc(images((32, 32))), oracle.nhwc(noise))
    oracle.assert_close(oracle.nchw(encoded), expected, NET, "latents")


@pytest.mark.parametrize("size", [(4, 4), (6, 3)])
@torch.inference_mode()
def test_decode_equals_diffusers(nets: tuple[diffusers.AutoencoderKL, VAE], size: tuple[int, int]) -> None:
    theirs, ours = nets
    latents = torch.randn(2, ours.config.latent_channels, *size, generator=torch.Generator().manual_seed(4))
    expected = theirs.decode(latents / ours.config.scaling_factor + ours.config.shift_factor).sample
    oracle.assert_close(oracle.nchw(ours.decode(oracle.nhwc(latents))), expected, NET, "image")


@torch.inference_mode()
def test_log_variance_is_clamped() -> None:
    """Weights that drive the log-variance far out of range: exp must not overflow."""
    theirs = oracle.vae(oracle.SD_VAE)
    theirs.quant_conv.weight.mul_(1e4)
    ours = VAE(VAEConfig.from_json(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    _, logvar = ours.moments(oracle.nhwc(images((32, 32))))
    assert logvar.min() == -30.0
    assert logvar.max() == 20.0
    torch.testing.assert_close(oracle.nchw(logvar), theirs.encode(images((32, 32))).latent_dist.logvar)


@torch.inference_mode()
def test_average_pooling_and_bare_upsampling_equal_diffusers_layers(tmp_path: Path) -> None:
    """`resamp_with_conv: false`, as latent diffusion's autoencoder configs may ask. diffusers has the layers, not the switch."""
    theirs = oracle.vae(oracle.SD_VAE)
    for block in theirs.encoder.down_blocks[:-1]:
        block.downsamplers[0] = Downsample2D(block.downsamplers[0].channels, use_conv=False, padding=0)
    for block in theirs.decoder.up_blocks[:-1]:
        block.upsamplers[0] = Upsample2D(block.upsamplers[0].channels, use_conv=False)
    with torch.device("meta"):
        ours = VAE(VAEConfig.from_json(dict(theirs.config) | {"resamp_with_conv": False}))
    oracle.load(ours, theirs, "vae", tmp_path)
    mean, _ = ours.moments(oracle.nhwc(images((32, 32))))
    oracle.assert_close(oracle.nchw(mean), theirs.encode(images((32, 32))).latent_dist.mean, NET, "pooled mean")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    expected = theirs.decode(latents / ours.config.scaling_factor).sample
    oracle.assert_close(oracle.nchw(ours.decode(oracle.nhwc(latents))), expected, NET, "image without up convolutions")
