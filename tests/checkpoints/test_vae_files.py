"""An autoencoder by itself: the folders and files it comes in, what its names and shapes tell, and what is refused."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import fastsd
from fastsd.checkpoints import AutoencoderFiles, ldm_keys, open_autoencoder, open_model
from fastsd.checkpoints.keys import module_shape
from fastsd.checkpoints.ldm_config import Shapes, autoencoder
from fastsd.config import VAEConfig, autoencoder_config
from fastsd.convert import convert
from fastsd.errors import CheckpointError, ParameterError
from fastsd.ldm_autoencoder import config_from_ldm
from fastsd.models import vq
from tests import oracle
from tests.checkpoints.checkpoint_builders import edit_json, small_model_state
from tests.checkpoints.single_files import AUTOENCODER, Model, assert_same_tensors, save
from tests.models.test_vae_family import FAMILY as KL
from tests.models.test_vae_family import ldm_params
from tests.models.test_vq import FAMILY as VQ
from tests.models.test_vq import vq_model
from tests.small_model import SMALL_MODEL

CPU = torch.device("cpu")
PREFIX = "first_stage_model."
SMALL = AUTOENCODER | {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def net() -> diffusers.AutoencoderKL:
    """Stable Diffusion's at small size: an attention in the middle, and all else twice or once."""
    return oracle.vae(SMALL, seed=5)


@pytest.fixture(scope="module")
def folder(net: diffusers.AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lone") / "sd-vae"
    net.save_pretrained(path)
    return path


def to_ldm(state: dict[str, Tensor], config: VAEConfig, start: str = "") -> dict[str, Tensor]:
    """Under latent diffusion's names, attention by 1×1 convolutions as there."""
    back = ldm_keys.inverse(ldm_keys.vae_table(config, start))
    named = {ldm_keys.renamed(name, back): tensor for name, tensor in state.items()}
    assert None not in named
    four = {name: tensor[:, :, None, None] for name, tensor in named.items() if ".attn" in name and tensor.ndim == 2}
    return {name: tensor.contiguous() for name, tensor in (named | four).items()}


@pytest.fixture(scope="module")
def bare(net: diffusers.AutoencoderKL) -> dict[str, Tensor]:
    return to_ldm(net.state_dict(), VAEConfig.from_json(dict(net.config)))


def loaded(source: AutoencoderFiles) -> dict[str, Tensor]:
    with torch.device("meta"):
        net = vq.autoencoder(autoencoder_config(source.vae))
    source.load_weights("vae", net, torch.float32, CPU)
    return net.state_dict()


def named(path: Path, rename: Callable[[str], str], state: dict[str, Tensor]) -> Path:
    return save(path, {rename(name): tensor.clone() for name, tensor in state.items()})


def old(name: str) -> str:
    """diffusers before 0.17."""
    for new, before in OLD_NAMES.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
    return name


def layouts(path: Path, net: diffusers.AutoencoderKL, folder: Path, bare: dict[str, Tensor]) -> dict[str, Path]:
    """One autoencoder in every way it is shared."""
    shutil.copytree(folder, path / "model/vae")
    (path / "ldm").mkdir()
    shutil.copytree(folder, path / "ldm/vqvae")
    torch.save({"state_dict": bare, "global_step": 840000, "epoch": 1}, path / "training.ckpt")
    whole = {"model.diffusion_model.out.2.bias": torch.ones(4), "cond_stage_model.x": torch.ones(2)}
    return {
        "folder": folder,
        "a pipeline's folder": path / "model",
        "latent diffusion's folder": path / "ldm",
        "diffusers' names": named(path / "diffusers.safetensors", str, net.state_dict()),
        "diffusers' older names": named(path / "old.safetensors", old, net.state_dict()),
        "LDM's names": save(path / "ldm.safetensors", bare),
        "within a whole checkpoint": named(path / "model.safetensors", lambda name: PREFIX + name, bare),
        "beside other parts": save(path / "x.safetensors", {PREFIX + k: v.clone() for k, v in bare.items()} | whole),
        "a training checkpoint": path / "training.ckpt",
    }


def test_the_same_autoencoder_however_it_is_shared(
    net: diffusers.AutoencoderKL, folder: Path, bare: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = VAEConfig.from_json(dict(net.config))
    for name, path in layouts(tmp_path, net, folder, bare).items():
        source = open_autoencoder(path, allow_pickle=True)
        assert autoencoder_config(source.vae) == expected, name
        assert_same_tensors(loaded(source), net.state_dict(), name)


def test_diffusers_makes_the_same_of_the_file(folder: Path, bare: dict[str, Tensor], tmp_path: Path) -> None:
    """Its own converter, from the file of bare LDM names, as vae-ft-mse-840000-ema-pruned.safetensors is."""
    path = save(tmp_path / "ldm.safetensors", bare | noise_of_training(bare))
    theirs = diffusers.AutoencoderKL.from_single_file(str(path), config=str(folder))
    assert_same_tensors(loaded(open_autoencoder(path)), theirs.state_dict(), "diffusers' loader")


def noise_of_training(bare: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the published autoencoders hold beside their weights."""
    return {
        "loss.logvar": torch.zeros(()),
        "loss.perceptual_loss.net.slice1.0.weight": torch.ones(2, 3, 3, 3),
        "loss.discriminator.main.0.bias": torch.ones(2),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(840000, dtype=torch.int32),
    }


@pytest.mark.parametrize("start", ["", PREFIX])
def test_the_moving_average(
    bare: dict[str, Tensor], net: diffusers.AutoencoderKL, tmp_path: Path, caplog: pytest.LogCaptureFixture, start: str
) -> None:
    own = {start + name: tensor.clone() for name, tensor in (bare | noise_of_training(bare)).items()}
    average = {f"{start}model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in bare.items()}
    path, without = save(tmp_path / "ema.safetensors", own | average), save(tmp_path / "own.safetensors", own)
    raised = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    assert_same_tensors(loaded(open_autoencoder(path)), net.state_dict(), "unasked")
    for asked in (True, None):
        assert_same_tensors(loaded(open_autoencoder(path, use_ema=asked)), raised, f"use_ema={asked}")
    assert not caplog.text
    assert_same_tensors(loaded(open_autoencoder(without, use_ema=None)), net.state_dict(), "where it is")
    assert "own.safetensors holds no moving average of the autoencoder; its own weights are read" in caplog.text
    count = len(bare)
    with pytest.raises(CheckpointError, match=f"use_ema: {count} of {count} averaged tensors are not in the file"):
        open_autoencoder(without, use_ema=True)
    average.popitem()
    for asked in (True, None):
        with pytest.raises(CheckpointError, match=f"use_ema: 1 of {count}"):
            open_autoencoder(save(path, own | average), use_ema=asked)


FAMILY = KL | VQ
FAMILY |= {
    "latents of another width": KL["kl-f4"] | {"embed_dim": 5},
    "pooled": ldm_params((1, 2, 2), 3, resamp_with_conv=False),
    "no attention": ldm_params((1, 2), 4, attn_type="none"),
    "codebook, no attention": ldm_params((1, 2), 4, attn_type="none", double_z=False) | {"n_embed": 9},
    "one level": ldm_params((1,), 4),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("diffusers_names", [False, True])
def test_names_and_shapes_tell_the_config(name: str, diffusers_names: bool, tmp_path: Path) -> None:
    config = config_from_ldm(FAMILY[name], scaling_factor=1.0 if "n_embed" in FAMILY[name] else 0.18215)
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in vq.autoencoder(config).state_dict().items()}
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
    source = open_autoencoder(save(tmp_path / "x.safetensors", state if diffusers_names else to_ldm(state, config)))
    assert autoencoder_config(source.vae) == config
    [file] = source.files
    assert {key: module_shape("vae", key, spec.shape) for key, spec in file.tensors.items()} == shapes


def test_wide_shortcuts_are_seen() -> None:
    config = VAEConfig(block_out_channels=(32, 64), down_attention=(False,) * 2, up_attention=(False,) * 2,
                       layers_per_block=1, use_conv_shortcut=True)  # fmt: skip
    with torch.device("meta"):
        state = vq.autoencoder(config).state_dict()
    names = to_ldm(state, config)
    assert tuple(names["encoder.down.1.block.0.conv_shortcut.weight"].shape) == (64, 32, 3, 3), "LDM's name for it"
    found = autoencoder(Shapes({name: tuple(tensor.shape) for name, tensor in names.items()}, "x"), "")
    assert autoencoder_config(found) == config


def test_the_published_file_is_recognised() -> None:
    """vae-ft-mse-840000-ema-pruned: 248 tensors of these names and shapes."""
    with torch.device("meta"):
        state = vq.autoencoder(VAEConfig()).state_dict()
    names = to_ldm(state, VAEConfig())
    expected = {
        "encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.bias": (512,),
        "decoder.norm_out.weight": (128,),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    }
    assert len(names) == 248
    assert {name: tuple(names[name].shape) for name in expected} == expected
    found = autoencoder(Shapes({name: tuple(tensor.shape) for name, tensor in names.items()}, "x"), "")
    assert autoencoder_config(found) == VAEConfig()


# In a Pipeline

DRAWING: dict[str, Any] = {"num_inference_steps": 3, "seed": 4, "output_type": "np"}
PLAIN = {"device": "cpu", "dtype": "float32", "backend": "reference"}
SMALL_VAE = json.loads((SMALL_MODEL / "vae/config.json").read_text())


def test_the_picture_is_that_of_diffusers_with_the_same_vae(small_model: Path, tmp_path: Path) -> None:
    """A folder that names its scaling factor; from an image, so that the encoder is the new one as well."""
    other = oracle.vae(SMALL_VAE | {"scaling_factor": 0.7, "norm_num_groups": 4}, seed=6)
    other.save_pretrained(tmp_path / "vae")
    components = oracle.load_pipeline(small_model).components | {"vae": other}
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    expected = theirs(
        "a red circle",
        image=torch.from_numpy(image).permute(2, 0, 1)[None],
        strength=0.5,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).images
    pipe = fastsd.Pipeline(small_model, vae=tmp_path / "vae", **PLAIN)
    found = pipe.generate("a red circle", image=image, strength=0.5, **DRAWING | {"num_inference_steps": 6}).images
    oracle.assert_same_picture(found, expected, "with another VAE")
    plain = fastsd.Pipeline(small_model, **PLAIN)
    own = plain.generate("a red circle", image=image, strength=0.5, **DRAWING | {"num_inference_steps": 6}).images
    assert np.abs(own - found).max() > 0.1, "the model's own VAE draws the same, so this compares nothing"


def test_unless_it_says_how_latents_are_scaled_the_model_does(
    net: diffusers.AutoencoderKL, bare: dict[str, Tensor], folder: Path, sd1: Model, small_model: Path, tmp_path: Path
) -> None:
    """The UNet has learnt latents of its model's scale: diffusers would read 0.18215 into a config that says nothing."""
    silent, file = tmp_path / "silent", save(tmp_path / "lone.safetensors", bare)
    shutil.copytree(folder, silent)
    config = json.loads((silent / "config.json").read_text())
    del config["scaling_factor"]
    (silent / "config.json").write_text(json.dumps(config))
    other = shutil.copytree(sd1.folder, tmp_path / "other")
    edit_json(other / "vae/config.json", scaling_factor=0.5, shift_factor=0.25)
    converted = convert(other, tmp_path / "other.safetensors")

    def scale(model: Path, vae: Path) -> tuple[float, float]:
        found = autoencoder_config(open_model(model, vae=vae).vae)
        return found.scaling_factor, found.shift_factor

    for model in (other, converted):
        assert scale(model, silent) == scale(model, file) == (0.5, 0.25)
        assert scale(model, folder) == (0.18215, 0.0), "a folder that names it"
    for model in (sd1.folder, sd1.file, small_model):
        assert scale(model, converted) == (0.5, 0.25), "a file that `fastsd convert` wrote names it"
        assert scale(model, other) == (0.5, 0.25)
    assert scale(sd1.file, file) == (0.18215, 0.0)


def test_in_folders_and_files_alike(
    net: diffusers.AutoencoderKL, bare: dict[str, Tensor], sd1: Model, tmp_path: Path
) -> None:
    file = save(tmp_path / "lone.safetensors", bare)
    drawn = []
    for pipe in (
        fastsd.Pipeline(sd1.folder, vae=str(file), **PLAIN),
        fastsd.Pipeline.from_single_file(sd1.file, vae=file, **PLAIN),
        fastsd.Pipeline(convert(sd1.folder, tmp_path / "baked.safetensors", vae=file), **PLAIN),
    ):
        assert_same_tensors(pipe.vae.state_dict(), net.state_dict(), "the net in the pipeline")
        drawn.append(pipe.generate("a cat", height=16, width=16, **DRAWING | {"num_inference_steps": 1}).images)
    assert drawn[0].std() > 0.01, "an empty picture compares nothing"
    assert drawn[0].tobytes() == drawn[1].tobytes() == drawn[2].tobytes()


def test_averages_of_both_files(
    sd1: Model, bare: dict[str, Tensor], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """use_ema is for the UNet and for the VAE; where the one file has none, it is said."""
    unet = {name: tensor for name, tensor in sd1.state.items() if name.startswith("model.diffusion_model.")}
    averaged = {"model_ema." + name[len("model.") :].replace(".", ""): tensor + 1 for name, tensor in unet.items()}
    model = save(tmp_path / "model.safetensors", sd1.state | averaged)
    own = save(tmp_path / "own.safetensors", bare)
    average = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in bare.items()}
    both = save(tmp_path / "both.safetensors", bare | average)
    for path in (model, sd1.folder):
        found = fastsd.Pipeline(path, vae=both, use_ema=True, **PLAIN).vae
        assert torch.equal(found.decoder.conv_out.bias, bare["decoder.conv_out.bias"] + 1), path.name
    open_model(model, vae=own, use_ema=True)
    assert "own.safetensors holds no moving average" in caplog.text
    open_model(model, vae=folder, use_ema=True)
    with pytest.raises(CheckpointError, match=r"use_ema: .* averaged tensors are not in the file"):
        open_model(sd1.folder, vae=own, use_ema=True)
    for vae in (None, folder):
        with pytest.raises(ParameterError, match="use_ema: is for single files"):
            open_model(sd1.folder, vae=vae, use_ema=True)


def test_it_must_fit_the_unet(sd1: Model, small_model: Path, tmp_path: Path) -> None:
    vq_model(VQ["vq-f4"]).save_pretrained(tmp_path / "codebook")
    for model in (sd1.folder, sd1.file, small_model):
        says = f"codebook: latents of 3 channels, but the UNet of .*{model.name} makes 4; take an autoencoder that"
        with pytest.raises(CheckpointError, match=says) as caught:
            fastsd.Pipeline(model, vae=tmp_path / "codebook")
        assert str(caught.value).isprintable()


def test_what_names_no_autoencoder(small_model: Path) -> None:
    for given in (7, b"x", ["a"]):
        with pytest.raises(ParameterError, match="vae: must be a folder, a file or a Hub id, not"):
            fastsd.Pipeline(small_model, vae=given)
    for given in ("nowhere.safetensors", "", Path("no/where"), "a\0b"):
        with pytest.raises(CheckpointError, match="no such folder: "):
            fastsd.Pipeline(small_model, vae=given)


def test_a_variant_of_the_model_is_one_of_the_vae_where_it_has_it(
    sd1: Model, folder: Path, net: diffusers.AutoencoderKL, tmp_path: Path
) -> None:
    model = shutil.copytree(sd1.folder, tmp_path / "model")
    for component in ("unet", "vae"):
        weights = model / component / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    half = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    both = shutil.copytree(folder, tmp_path / "both")
    save(both / "diffusion_pytorch_model.fp16.safetensors", half)
    for vae, expected in ((both, half), (folder, net.state_dict())):
        opened = open_model(model, variant="fp16", vae=vae)
        found = loaded(AutoencoderFiles("", opened.vae, opened.weight_files("vae"), True))
        assert_same_tensors(found, expected, vae.name)
    lone = save(tmp_path / "lone.safetensors", net.state_dict())
    assert open_model(model, variant="fp16", vae=lone).weight_files("vae")[0].label == "lone.safetensors"
    with pytest.raises(ParameterError, match="variant: is for folders; a single file has none"):
        open_autoencoder(lone, variant="fp16")


# What is refused


def refused(path: Path, reason: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        loaded(open_autoencoder(path, **options))
    message = str(caught.value)
    assert path.name in message, f"the message does not name the file: {message}"
    assert message.isprintable(), f"not one printable line: {message!r}"


FOREIGN = {
    "a LoRA": {"lora_unet_mid_block.lora_up.weight": torch.ones(2, 2)},
    "the UNet, in the place of the VAE": {"time_embedding.linear_1.weight": torch.ones(2), "conv_in.weight": torch.ones(2)},
    "no autoencoder: none of its tensors is called as they are": {"x": torch.ones(2)},
    "a textual-inversion embedding": {"emb_params": torch.ones(2, 4)},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_named(kind: str, tmp_path: Path) -> None:
    refused(save(tmp_path / "other.safetensors", FOREIGN[kind]), f"this is {kind}")


def test_a_text_encoder_and_a_bare_unet_are_no_autoencoders(tmp_path: Path) -> None:
    refused(
        save(tmp_path / "text.safetensors", small_model_state("text_encoder")), "this is the text encoder, in the place"
    )
    unet = {"input_blocks.0.0.weight": torch.ones(2, 4, 3, 3)}
    refused(save(tmp_path / "unet.safetensors", unet), "this is no autoencoder")


def test_damaged_files(bare: dict[str, Tensor], net: diffusers.AutoencoderKL, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    refused(
        save(path, bare | {"decoder.secret": torch.ones(1)}),
        r"1 tensors that no autoencoder has \(decoder\.secret\)",
    )
    less = {name: tensor for name, tensor in bare.items() if name != "decoder.up.1.block.1.conv1.weight"}
    refused(save(path, less), r"1 missing \(decoder\.up_blocks\.0\.resnets\.1\.conv1\.weight\)")
    less = {name: tensor for name, tensor in bare.items() if name != "decoder.conv_in.weight"}
    refused(save(path, less), r"decoder\.conv_in\.weight is missing")
    narrow = bare | {"decoder.conv_out.weight": torch.ones(3, 7, 3, 3)}
    refused(save(path, narrow), r"1 of another shape \(decoder\.conv_out\.weight expected \[3, 32, 3, 3\]")
    refused(save(path, bare | {"quant_conv.bias": torch.full((8,), torch.nan)}), "holds NaN or infinite values")
    refused(save(path, bare | {"quant_conv.bias": torch.ones(8, dtype=torch.int8)}), "is int8; only floating-point")
    both = bare | {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(32, 32, 3, 3)}
    refused(save(path, both), "unexpected")
    refused(save(path, net.state_dict() | {"extra.weight": torch.ones(1)}), r"1 unexpected \(extra\.weight\)")
    whole = save(path, bare).read_bytes()
    path.write_bytes(whole[:-100])
    refused(path, "truncated")
    path.write_bytes(b"")
    refused(path, "is empty")


def test_widths_that_no_net_can_have(bare: dict[str, Tensor], tmp_path: Path) -> None:
    odd = bare | {"encoder.down.0.block.0.conv1.weight": torch.ones(33, 32, 3, 3)}
    refused(save(tmp_path / "odd.safetensors", odd), "block_out_channels = .*: must be positive multiples of norm_num_")
    codebook = to_ldm(vq.autoencoder(config_from_ldm(VQ["vq-f4"])).state_dict(), config_from_ldm(VQ["vq-f4"]))
    codebook["quantize.embedding.weight"] = torch.ones(9, 0)
    refused(save(tmp_path / "flat.safetensors", codebook), "vq_embed_dim = 0: must be a positive integer")


@pytest.mark.parametrize("start", ["encoder.down.{}.block.0.conv1.weight", "encoder.down_blocks.{}.resnets.{}.x"])
def test_a_thousand_levels_cost_nothing(start: str, tmp_path: Path) -> None:
    """Names alone must not make a net, or a table of names, of any size."""
    state = {start.format(index % 100, index // 100): torch.ones(32, 1) for index in range(10_000)}
    state |= {"decoder.conv_in.weight": torch.ones(32, 4), "encoder.conv_in.weight": torch.ones(32, 3)}
    state |= {"decoder.conv_out.weight": torch.ones(3, 32)}
    began = time.process_time()
    refused(save(tmp_path / "deep.safetensors", state), "must be a list of 1 to 8|damaged|unexpected")
    assert time.process_time() - began < 5


def test_pickles_only_on_demand(bare: dict[str, Tensor], net: diffusers.AutoencoderKL, tmp_path: Path) -> None:
    path = tmp_path / "vae-ft-mse-840000-ema-pruned.ckpt"
    torch.save({"state_dict": bare}, path)
    refused(path, "is a pickle, which can carry code: .*allow_pickle=True")
    assert_same_tensors(loaded(open_autoencoder(path, allow_pickle=True)), net.state_dict(), "ckpt")
    with pytest.raises(CheckpointError, match="is a pickle, which can carry code"):
        fastsd.Pipeline(vae=path)


def test_folders_that_hold_none(folder: Path, sd1: Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no autoencoder: there is no config.json, nor in vae/ or vqvae/")
    refused(sd1.folder / "unet", "describes a UNet2DConditionModel, not a AutoencoderKL or VQModel")
    without = shutil.copytree(folder, tmp_path / "without", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match="holds no usable weights: expected diffusion_pytorch_model"):
        open_autoencoder(without)
    edit_json(without / "config.json", scaling_factor=0)
    with pytest.raises(CheckpointError, match="scaling_factor = 0: must not be 0"):
        open_autoencoder(without)
    (without / "config.json").write_text("{")
    refused(without, "config.json: not valid JSON")
    with pytest.raises(ParameterError, match="use_ema: is for single files"):
        open_autoencoder(folder, use_ema=True)


def test_a_file_of_diffusers_names_has_no_average(net: diffusers.AutoencoderKL, tmp_path: Path) -> None:
    path = save(tmp_path / "vae.safetensors", net.state_dict())
    refused(path, "use_ema: a file of diffusers' names holds no average; leave it out", use_ema=True)
    assert_same_tensors(loaded(open_autoencoder(path, use_ema=None)), net.state_dict(), "where it is")


def test_what_is_logged_is_logged_once(
    bare: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "vae.safetensors", bare | noise_of_training(bare))
    with caplog.at_level(logging.INFO, "fastsd"):
        open_autoencoder(path)
        assert not caplog.records, "nothing was asked for that is not there"
        open_autoencoder(path, use_ema=None)
    assert len(caplog.records) == 1
