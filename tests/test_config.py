"""What config.json files may say of the three nets: limits, and settings that fastsd would have to ignore."""

import time
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import transformers

from fastsd.config import CLIPConfig, UNetConfig, VAEConfig
from fastsd.errors import CheckpointError

NETS = {"text_encoder": CLIPConfig, "unet": UNetConfig, "vae": VAEConfig}
HUGE = 10**400  # JSON's integers have no end; a float's do

REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    # depths that took 33 s to build before the weights were found to be missing
    ("unet", {"layers_per_block": 2000}, "layers_per_block = 2000: must be a positive integer, at most 64"),
    ("unet", {"layers_per_block": [2, 2, 2, 65]}, "layers_per_block"),
    ("unet", {"transformer_layers_per_block": 2000}, "transformer_layers_per_block"),
    ("unet", {"transformer_layers_per_block": [1, 1, 1, 65]}, "transformer_layers_per_block"),
    ("unet", {"layers_per_block": 64, "transformer_layers_per_block": 64}, "layers_per_block .* over 512 blocks"),
    ("vae", {"layers_per_block": 65}, "layers_per_block"),
    ("text_encoder", {"num_hidden_layers": 3000}, "num_hidden_layers = 3000: must be a positive integer, at most 64"),
    # numbers that a net would divide by, or take the root of
    ("unet", {"norm_eps": 0}, "norm_eps = 0: must be a finite number above 0"),
    ("unet", {"norm_eps": -1e-5}, "norm_eps"),
    ("text_encoder", {"layer_norm_eps": 0.0}, "layer_norm_eps = 0.0: must be a finite number above 0"),
    ("vae", {"scaling_factor": 0}, "scaling_factor = 0: must not be 0"),
    ("vae", {"scaling_factor": 0.0}, "scaling_factor = 0.0: must not be 0"),
    ("unet", {"freq_shift": 160}, "freq_shift = 160: must not be half of"),
    ("unet", {"freq_shift": 32.0, "block_out_channels": [64] * 4}, "freq_shift = 32.0"),
    ("unet", {"norm_eps": HUGE}, "norm_eps"),
    ("vae", {"shift_factor": HUGE}, "shift_factor"),
    ("text_encoder", {"hidden_size": HUGE}, "hidden_size"),
    ("unet", {"in_channels": 10**5000}, "in_channels = a huge int: must be a positive integer"),
    # sizes
    ("unet", {"sample_size": [64, 96]}, r"sample_size = \[64, 96\]: .*square"),
    ("unet", {"sample_size": [64]}, "sample_size = .*a height and a width"),
    ("unet", {"sample_size": [64, True]}, "sample_size"),
    ("unet", {"sample_size": []}, "sample_size"),
    ("unet", {"sample_size": 0}, "sample_size"),
    # settings that would change the result
    ("text_encoder", {"use_attention_mask": True}, "use_attention_mask = True: fastsd does not run"),
    ("text_encoder", {"text_config": {"hidden_size": 768}}, "text_config"),
    ("text_encoder", {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ("unet", {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ("vae", {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    # a value is shown, but not whole
    ("text_encoder", {"hidden_act": "x" * 100_000}, "hidden_act = 'xxx"),
    ("unet", {"down_block_types": ["x\n" * 100_000] * 4}, "down_block_types = .*unknown block type"),
]


@pytest.mark.parametrize(
    ("net", "json", "says"), REFUSED, ids=[f"{net}-{index}" for index, (net, *_) in enumerate(REFUSED)]
)
def test_what_cannot_run_is_refused_at_once(net: str, json: Mapping[str, Any], says: str) -> None:
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"^{net}/config.json: {says}") as error:
        NETS[net].from_json(json)
    assert time.perf_counter() - start < 1
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [[96, 96], (96, 96), 96])
def test_sample_size_may_be_a_height_and_a_width(size: object) -> None:
    assert UNetConfig.from_json({"sample_size": size}).sample_size == 96


def test_null_is_the_default_where_the_writers_mean_it() -> None:
    assert UNetConfig.from_json({"sample_size": None, "num_attention_heads": None}) == UNetConfig.from_json({})
    assert VAEConfig.from_json({"shift_factor": None}) == VAEConfig.from_json({})
    assert CLIPConfig.from_json({"use_attention_mask": False}) == CLIPConfig.from_json({"use_attention_mask": None})
    with pytest.raises(CheckpointError, match="norm_num_groups"):  # no normalisation, in diffusers
        UNetConfig.from_json({"norm_num_groups": None})


def test_what_a_file_leaves_out_has_its_writers_default() -> None:
    """A CLIP of 8 heads and one of 12 have weights of the same shapes, so nothing later would notice a wrong guess."""
    ours, theirs = CLIPConfig.from_json({}), transformers.CLIPTextConfig()
    for name in vars(ours):
        assert getattr(ours, name) == getattr(theirs, name), name
    unet, reference = UNetConfig.from_json({}), diffusers.UNet2DConditionModel.__init__
    defaults = dict(
        zip(reference.__wrapped__.__code__.co_varnames[1:], reference.__wrapped__.__defaults__, strict=False)
    )
    for name in (
        "block_out_channels",
        "cross_attention_dim",
        "norm_eps",
        "norm_num_groups",
        "flip_sin_to_cos",
        "freq_shift",
    ):
        assert getattr(unet, name) == defaults[name], name
    assert set(unet.num_attention_heads) == {defaults["attention_head_dim"]}


def test_the_deepest_models_in_use_are_within_the_limits() -> None:
    CLIPConfig.from_json({"num_hidden_layers": 32, "hidden_size": 1280, "num_attention_heads": 20})  # OpenCLIP bigG
    deep = UNetConfig.from_json({"layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10, 10]})  # as SDXL
    assert deep.transformer_layers_per_block == (1, 2, 10, 10)
