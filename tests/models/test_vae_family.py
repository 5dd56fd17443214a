"""Latent diffusion's KL autoencoders, from their YAML settings, against diffusers' AutoencoderKL with the same weights."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.convert_from_ckpt import (
    convert_ldm_vae_checkpoint,
    create_vae_diffusers_config,
)

from fastsd.checkpoints import ldm_keys
from fastsd.config import TINY, ModelConfig, VAEConfig, VQConfig
from fastsd.errors import CheckpointError
from fastsd.ldm_autoencoder import config_from_ldm
from fastsd.models.vae import VAE
from tests import oracle
from tests.tolerances import NET


def ldm_params(
    levels: tuple[int, ...], z_channels: int, attention: tuple[int, ...] = (), **more: Any
) -> dict[str, Any]:
    """As in the released YAML, but 32 wide instead of 128, with one residual block a level instead of two."""
    ddconfig = {
        "double_z": True,
        "z_channels": z_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": list(levels),
        "num_res_blocks": 1,
        "attn_resolutions": list(attention),
        "dropout": 0.0,
    }
    return {"embed_dim": z_channels, "monitor": "val/rec_loss", "ddconfig": ddconfig | more}


def diffusers_config(params: dict[str, Any]) -> dict[str, Any]:
    return create_vae_diffusers_config({"model": {"params": {"first_stage_config": {"params": params}}}}, 256)


FAMILY = {
    "two levels": ldm_params((1, 2), 2),
    "kl-f4": ldm_params((1, 2, 4), 3),
    "kl-f8": ldm_params((1, 2, 4, 4), 4),
    "kl-f16": ldm_params((1, 1, 2, 2, 4), 16, (16,)),
    "kl-f32": ldm_params((1, 1, 2, 2, 4, 4), 64, (16, 8)),
}


def assert_equal_nets(ours: VAE, theirs: diffusers.AutoencoderKL) -> None:
    """On an image whose height and width are odd at every level, and on latents; ours gets the oracle's weights."""
    ours.load_state_dict(theirs.state_dict())
    config, generator = ours.config, torch.Generator().manual_seed(3)
    size = (3 * config.downscale - 1, 2 * config.downscale - 1)
    image = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    expected = theirs.encode(image).latent_dist
    mean, logvar = ours.moments(oracle.nhwc(image))
    assert mean.shape == (1, 2, 1, config.latent_channels)
    oracle.assert_close(oracle.nchw(mean), expected.mean, NET, "mean")
    oracle.assert_close(oracle.nchw(logvar), expected.logvar, NET, "log-variance")
    latents = torch.randn(1, config.latent_channels, 3, 2, generator=generator)
    decoded = theirs.decode(latents / config.scaling_factor).sample
    oracle.assert_close(oracle.nchw(ours.decode(oracle.nhwc(latents))), decoded, NET, "image")


@pytest.mark.parametrize("params", FAMILY.values(), ids=FAMILY)
@torch.inference_mode()
def test_equals_diffusers_from_the_same_yaml(params: dict[str, Any]) -> None:
    theirs = oracle.vae(diffusers_config(params))
    config = config_from_ldm(params, scaling_factor=0.18215)
    assert config == VAEConfig.from_json(dict(theirs.config))
    assert type(config) is VAEConfig
    assert_equal_nets(VAE(config), theirs)


@torch.inference_mode()
def test_latents_of_another_width_than_the_nets() -> None:
    """embed_dim ≠ z_channels: the quant convs change the width. diffusers has no such setting, but takes other convs."""
    params = FAMILY["kl-f4"] | {"embed_dim": 5}
    theirs = diffusers.AutoencoderKL(**diffusers_config(params), scaling_factor=1.0)
    theirs.quant_conv, theirs.post_quant_conv = torch.nn.Conv2d(6, 10, 1), torch.nn.Conv2d(5, 3, 1)
    config = config_from_ldm(params)
    assert (config.latent_channels, config.z_channels) == (5, 3)
    assert config == VAEConfig.from_json(dict(theirs.config) | {"embed_dim": 5})
    assert_equal_nets(VAE(config), oracle.randomise(theirs))
    with pytest.raises(CheckpointError, match="embed_dim = 5: may differ from latent_channels only with both quant"):
        VAEConfig.from_json({"embed_dim": 5, "use_quant_conv": False})


@torch.inference_mode()
def test_shortcuts_of_three_by_three() -> None:
    """`use_conv_shortcut`, latent diffusion's other way to change the width. diffusers' block takes any module for it."""
    theirs = diffusers.AutoencoderKL(**diffusers_config(FAMILY["kl-f4"]))
    changed = [net for net in theirs.modules() if getattr(net, "conv_shortcut", None) is not None]
    assert len(changed) == 4
    for resnet in changed:
        resnet.conv_shortcut = torch.nn.Conv2d(resnet.in_channels, resnet.out_channels, 3, padding=1)
    config = VAEConfig.from_json(dict(theirs.config) | {"use_conv_shortcut": True})
    assert_equal_nets(VAE(config), oracle.randomise(theirs))


@torch.inference_mode()
def test_without_any_attention() -> None:
    """`attn_type: none`, as in vq-f4-noattn, also puts attn_resolutions out of force."""
    config = config_from_ldm(ldm_params((1, 2, 4), 3, (256, 64), attn_type="none"), scaling_factor=0.18215)
    theirs = oracle.vae(diffusers_config(FAMILY["kl-f4"]) | {"mid_block_add_attention": False})
    assert config == VAEConfig.from_json(dict(theirs.config))
    assert_equal_nets(VAE(config), theirs)


@pytest.mark.parametrize("name", ["kl-f4", "kl-f8"])  # diffusers' conversion knows no attention in the levels
def test_names_are_those_that_diffusers_converts_to(name: str) -> None:
    params = FAMILY[name]
    config = config_from_ldm(params)
    unet = replace(TINY.unet, in_channels=config.latent_channels, out_channels=config.latent_channels)
    to_ldm = ldm_keys.inverse(ldm_keys.tables(ModelConfig(TINY.text_encoder, unet, config), open_clip=False)["vae"])
    ours = VAE(config).state_dict()
    theirs = convert_ldm_vae_checkpoint(
        {ldm_keys.renamed(key, to_ldm): weight for key, weight in ours.items()}, diffusers_config(params)
    )
    assert {key: weight.shape for key, weight in theirs.items()} == {key: w.shape for key, w in ours.items()}
    assert all(torch.equal(weight, ours[key]) for key, weight in theirs.items())


def test_the_decoder_counts_resolutions_upwards() -> None:
    """250 is halved to 125, 62; 62 doubled to 124, 248: in latent diffusion the two halves then differ."""
    for resolution, down, up in (
        (62, (False, False, True), (True, False, False)),
        (125, (False, True, False), (False, False, False)),
        (124, (False, False, False), (False, True, False)),
    ):
        config = config_from_ldm(ldm_params((1, 2, 2), 3, (resolution,), resolution=250))
        assert (config.down_attention, config.up_attention) == (down, up), resolution


def test_defaults_are_latent_diffusions() -> None:
    params = ldm_params((1, 2, 4, 8), 4)
    params["embed_dim"] = None  # as left blank in the YAML of kl-f32
    for key in ("ch_mult", "double_z", "dropout"):
        del params["ddconfig"][key]
    config = config_from_ldm(params)
    assert config.block_out_channels == (32, 64, 128, 256)
    assert (config.latent_channels, config.z_channels, config.scaling_factor) == (4, None, 1.0)
    assert config.resamp_with_conv
    assert not config_from_ldm(ldm_params((1, 2), 2, resamp_with_conv=False)).resamp_with_conv


BASE = FAMILY["kl-f4"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ddconfig": BASE["ddconfig"] | {"double_z": False}}, r"ddconfig: double_z = False: must be false with n_embed"),
    ({"n_embed": 64}, r"ddconfig: double_z = True: must be false with n_embed"),
    ({"ddconfig": None}, r": ddconfig = None: must hold the nets' settings"),
    ({"embed_dim": 0}, r": embed_dim = 0: must be a positive integer"),
    ({"remap": "used.npy"}, r": remap = 'used.npy': fastsd does not run this autoencoder"),
]
REFUSED += [
    ({"ddconfig": BASE["ddconfig"] | {key: value}}, rf"\.ddconfig: {key} = {says}")
    for key, value, says in (
        ("attn_type", "linear", "'linear': fastsd does not run"),
        ("use_linear_attn", True, "True: fastsd does not run"),
        ("tanh_out", True, "True: fastsd does not run"),
        ("give_pre_end", True, "True: fastsd does not run"),
        ("ch", 48, "48: must be a multiple of 32"),
        ("ch", None, "None: must be a positive integer"),
        ("ch_mult", [2, 4], ".*: must be 1 to 8 multipliers, the first of them 1"),
        ("ch_mult", [1] * 9, ".*: must be 1 to 8 multipliers"),
        ("ch_mult", [], ".*: must be 1 to 8 multipliers"),
        ("ch_mult", [1, 0.5], ".*: must be a list of positive integers"),
        ("attn_resolutions", 16, "16: must be a list of positive integers"),
        ("num_res_blocks", 2000, "2000: must be a positive integer, at most 64"),
        ("z_channels", True, "True: must be a positive integer"),
        ("resolution", 10**9, "1000000000: must be a positive integer"),
    )
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_run_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^first_stage_config.*{says}") as error:
        config_from_ldm(BASE | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["ch", "num_res_blocks", "attn_resolutions", "in_channels", "out_ch", "resolution"])
def test_what_latent_diffusion_has_no_default_for_must_be_there(key: str) -> None:
    ddconfig = {name: value for name, value in BASE["ddconfig"].items() if name != key}
    with pytest.raises(CheckpointError, match=f"{key} = None: must be a"):
        config_from_ldm(BASE | {"ddconfig": ddconfig})


@pytest.mark.parametrize("factor", [0, 0.0, float("nan"), float("inf")])
def test_the_scaling_factor_is_a_finite_number_but_zero(factor: float) -> None:
    with pytest.raises(CheckpointError, match="first_stage_config: scale_factor = "):
        config_from_ldm(BASE, scaling_factor=factor)


def test_a_codebook_makes_it_vector_quantised() -> None:
    params = ldm_params((1, 2, 4), 3, double_z=False) | {"n_embed": 8192}
    config = config_from_ldm(params)
    assert isinstance(config, VQConfig)
    assert (config.num_vq_embeddings, config.latent_channels, config.downscale) == (8192, 3, 4)
