"""First stages: `fastsd.Autoencoder` against diffusers' AutoencoderKL and VQModel, and a VQModel in a Pipeline."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import fastsd
from fastsd.checkpoints import ldm_keys
from fastsd.config import TINY, VAEConfig, VQConfig, autoencoder_config
from fastsd.convert import convert
from fastsd.errors import CheckpointError, ImageError, NumericsError, ParameterError
from fastsd.ldm_autoencoder import config_from_ldm
from fastsd.ops import REFERENCE, Ops
from fastsd.tracing import run_stages
from tests import oracle
from tests.checkpoints.checkpoint_builders import edit_json
from tests.checkpoints.single_files import save
from tests.models.test_vae_family import FAMILY as KL
from tests.models.test_vae_family import diffusers_config
from tests.models.test_vq import FAMILY as VQ
from tests.models.test_vq import vq_model
from tests.oracle import assert_same_picture
from tests.small_model import SMALL_MODEL
from tests.tolerances import NET, RECONSTRUCTION_ERROR

PLAIN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "backend": "reference"}
FAMILY = KL | VQ


def theirs_of(name: str) -> Any:
    if name in KL:
        return oracle.vae(diffusers_config(KL[name]) | {"scaling_factor": 0.18215})
    return vq_model(VQ[name], scaling_factor=1.0)


def config_of(theirs: Any) -> VAEConfig:
    return autoencoder_config({**theirs.config, "_class_name": type(theirs).__name__})


def ldm_state(theirs: Any) -> dict[str, Tensor]:
    """As latent diffusion's `model.ckpt` holds it: bare names, attention by 1×1 convolutions, the losses of training."""
    config = config_of(theirs)
    back = ldm_keys.inverse(ldm_keys.vae_table(config, ""))
    state = {ldm_keys.renamed(name, back): tensor for name, tensor in theirs.state_dict().items()}
    four = {name: tensor[:, :, None, None] for name, tensor in state.items() if ".attn" in name and tensor.ndim == 2}
    losses = {"loss.discriminator.main.0.bias": torch.ones(3), "loss.logvar": torch.zeros(())}
    return {name: tensor.contiguous() for name, tensor in (state | four | losses).items()}


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """[count, H, W, 3] in [0, 1]."""
    return np.random.default_rng(1).random((count, height, width, 3)).astype(np.float32)


def as_theirs(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@pytest.fixture(scope="module", params=["kl-f4", "vq-f4"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, fastsd.Autoencoder]:
    """diffusers' net, and ours from the folder that it saved."""
    theirs = theirs_of(request.param)
    path = tmp_path_factory.mktemp("net")
    theirs.save_pretrained(path)
    return theirs, fastsd.Autoencoder.from_pretrained(path, **PLAIN)


@pytest.fixture(scope="module")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[diffusers.VQModel, fastsd.Autoencoder]:
    theirs = vq_model(VQ["vq-f4"], scaling_factor=0.4)
    path = tmp_path_factory.mktemp("codebook")
    theirs.save_pretrained(path / "vqvae")
    return theirs, fastsd.Autoencoder.from_pretrained(path, **PLAIN)


@pytest.fixture(scope="module")
def own() -> fastsd.Autoencoder:
    """The small model's."""
    return fastsd.Autoencoder.from_pretrained(SMALL_MODEL, **PLAIN)


# The same as diffusers


@pytest.mark.parametrize("name", FAMILY)
@torch.inference_mode()
def test_files_of_latent_diffusion(name: str, tmp_path: Path) -> None:
    """kl-f4 to kl-f32, vq-f4 to vq-f16: config from names and shapes, latents and pictures as diffusers' net of these weights."""
    theirs = theirs_of(name)
    torch.save({"state_dict": ldm_state(theirs), "global_step": 1}, tmp_path / "model.ckpt")
    ours = fastsd.Autoencoder.from_single_file(tmp_path / "model.ckpt", allow_pickle=True, **PLAIN)
    assert ours.config == config_of(theirs)
    unit = ours.config.downscale
    images = pictures(1, 2 * unit, unit)
    encoded = theirs.encode(as_theirs(images))
    expected = encoded.latent_dist.mean if name in KL else encoded.latents
    latents = ours.encode(images[0])
    assert latents.dtype == torch.float32
    oracle.assert_close(latents, expected * ours.config.scaling_factor, NET, "latents")
    decoded = (theirs.decode(expected).sample / 2 + 0.5).clamp(0, 1)
    oracle.assert_close(ours.decode(expected * ours.config.scaling_factor, "pt"), decoded, NET, "picture")


@torch.inference_mode()
def test_reconstruction_and_its_error(pair: tuple[Any, fastsd.Autoencoder]) -> None:
    theirs, ours = pair
    images = pictures(3, 16, 12)
    encoded = theirs.encode(as_theirs(images))
    latents = encoded.latent_dist.mode() if isinstance(theirs, diffusers.AutoencoderKL) else encoded.latents
    expected = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    found = ours.reconstruct(images, "pt")
    oracle.assert_close(found, expected, NET, "reconstruction")
    truth = torch.from_numpy(images).double().permute(0, 3, 1, 2)
    errors = ours.reconstruction_error(images)
    assert errors.dtype == torch.float64
    wanted = (expected.double() - truth).square().mean((1, 2, 3))
    assert errors.shape == (3,)
    assert ((errors - wanted) / wanted).abs().max() < RECONSTRUCTION_ERROR, f"{errors} instead of {wanted}"
    alone = torch.cat([ours.reconstruction_error(image) for image in images])
    assert ((errors - alone) / alone).abs().max() < RECONSTRUCTION_ERROR, "one image's error depends on the others"
    levels = (images * 255).round().astype(np.uint8)
    assert ours.reconstruct(levels)[2].size == (12, 16), "PIL images, upright"


@torch.inference_mode()
def test_samples_of_the_distribution(own: fastsd.Autoencoder, pipe: fastsd.Pipeline) -> None:
    """Image i takes seed + i, as a Pipeline's encode_image does, and diffusers with that generator."""
    theirs = oracle.load_pipeline(SMALL_MODEL).vae
    images = pictures(2, 32, 24)
    found = own.encode(images, seed=7)
    for index in range(2):
        drawn = theirs.encode(as_theirs(images[index : index + 1])).latent_dist.sample(
            torch.Generator().manual_seed(7 + index)
        )
        oracle.assert_close(found[index : index + 1], drawn * theirs.config.scaling_factor, NET, f"sample {index}")
    assert torch.equal(found, pipe.encode_image(images, seed=7))
    assert (found - own.encode(images)).abs().max() > 1e-3, "the sample is the mean, so this compares nothing"


@torch.inference_mode()
def test_entries_of_the_codebook(codebook: tuple[diffusers.VQModel, fastsd.Autoencoder]) -> None:
    theirs, ours = codebook
    images = pictures(2, 16, 12)
    latents = ours.encode(images)
    expected, _, (_, _, indices) = theirs.quantize(theirs.encode(as_theirs(images)).latents)
    entries, found = ours.quantize(latents)
    assert torch.equal(found, indices.view(2, 4, 3))
    assert len(found.unique()) > 3, "too few of the entries are met for this to compare anything"
    oracle.assert_close(entries, expected * 0.4, NET, "entries")
    picture = ours.decode_indices(found, "pt")
    oracle.assert_close(picture, (theirs.decode(expected).sample / 2 + 0.5).clamp(0, 1), NET, "picture of indices")
    oracle.assert_close(picture, ours.reconstruct(images, "pt"), NET, "what the indices keep")


def test_what_it_was_trained_on_is_told_from_what_it_was_not(own: fastsd.Autoencoder, pipe: fastsd.Pipeline) -> None:
    """The use as an anomaly score: drawings of the kind that the small model was trained on, against noise and stripes."""
    prompts = ["a red circle", "a large blue square on a white background"]
    drawings = pipe.generate(prompts, num_inference_steps=10, seed=1).images
    rows = np.arange(64)[:, None, None]
    stripes = np.broadcast_to(rows % 2, (64, 64, 3)).astype(np.float32)
    known = own.reconstruction_error(drawings)
    strange = own.reconstruction_error(np.stack([pictures(1, 64, 64)[0], stripes]))
    assert known.max() * 10 < strange.min(), f"errors {known} of drawings, {strange} of what are none"


# How it is opened


def test_how_latents_are_scaled(tmp_path: Path) -> None:
    """Stable Diffusion's factor unless a codebook, or latent diffusion's YAML, says otherwise."""
    kl, book = (
        save(tmp_path / f"{n}.safetensors", ldm_state(theirs_of(n))) for n in ("two levels", "narrower entries")
    )
    small = KL["two levels"]
    own = {"model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": small}}
    whole = {"model": {"params": {"scale_factor": 0.3, "first_stage_config": {"target": "x", "params": small}}}}
    (tmp_path / "config.yaml").write_text(
        "model:\n  base_learning_rate: 5.0e-05\n  params:\n    scale_factor: 0.22765929\n    first_stage_config:\n"
        "      params:\n        embed_dim: 2\n        ddconfig:\n          double_z: true\n          z_channels: 2\n"
        "          resolution: 256\n          in_channels: 3\n          out_ch: 3\n          ch: 32\n"
        "          ch_mult: [1, 2]\n          num_res_blocks: 1\n          attn_resolutions: []\n          dropout: 0.0\n"
        "        lossconfig:\n          target: torch.nn.Identity\n"
    )
    for path, given, factor in (
        (kl, None, 0.18215),
        (kl, small, 1.0),
        (kl, own, 1.0),
        (kl, whole, 0.3),
        (kl, str(tmp_path / "config.yaml"), 0.22765929),
        (book, None, 1.0),
        (book, {"model": {"params": VQ["narrower entries"]}}, 1.0),
    ):
        config = fastsd.Autoencoder(path, original_config=given, **PLAIN).config
        assert config.scaling_factor == factor, given
        assert isinstance(config, VQConfig) == (path == book)


YAML = {
    "a: [": "not valid YAML",
    "a: \x00": "not valid YAML",
    **dict.fromkeys(
        ("a: !!int ''", "a: !!float ''", "a: !!bool maybe", "a: !!timestamp z", f"a: 1{':10' * 2000}.5"),
        r"config\.yaml: not valid YAML",
    ),
    "a: &x [1]\nb: *x": "YAML with aliases, or nested deeply, is refused",
    "[" * 60_000: "YAML with aliases, or nested deeply, is refused",
    "- 1": "must be a path to a YAML file or a mapping, not",
    "": "must be a path to a YAML file or a mapping, not None",
    "a: 1\n" * 20_000: "larger than",
    "model: {params: {embed_dim: 3}}": "ddconfig = None: must hold the nets' settings",
    "params: {scale_factor: x, first_stage_config: {params: {ddconfig: {}}}}": "scale_factor = 'x': must be a finite",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_bad_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises((CheckpointError, ParameterError), match=YAML[text]) as caught:
        fastsd.Autoencoder(tmp_path / "x.safetensors", original_config=tmp_path / "config.yaml")
    assert str(caught.value).isprintable(), f"not one printable line: {caught.value!r}"


def test_a_yaml_that_is_not_the_file_s(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", ldm_state(theirs_of("two levels")))
    with pytest.raises(CheckpointError, match=r"x\.safetensors \(vae\): tensors do not fit the model: .* missing"):
        fastsd.Autoencoder(path, original_config=KL["kl-f4"])
    with pytest.raises(CheckpointError, match="ch = 48: must be a multiple of 32"):
        fastsd.Autoencoder(path, original_config={"ddconfig": KL["two levels"]["ddconfig"] | {"ch": 48}})
    with pytest.raises(CheckpointError, match=r"no\.yaml is missing"):
        fastsd.Autoencoder(path, original_config=tmp_path / "no.yaml")
    with pytest.raises(ParameterError, match="original_config: is for single files"):
        fastsd.Autoencoder(SMALL_MODEL, original_config=KL["two levels"])


@torch.inference_mode()
def test_the_average_where_it_is_asked_for(tmp_path: Path) -> None:
    theirs = theirs_of("two levels")
    state = ldm_state(theirs)
    average = {f"model_ema.{name.replace('.', '')}": tensor + 0.1 for name, tensor in state.items() if tensor.ndim == 1}
    average |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state.items() if tensor.ndim != 1}
    path = save(tmp_path / "x.safetensors", state | {name: tensor.clone() for name, tensor in average.items()})
    for weight in theirs.parameters():
        if weight.ndim == 1:
            weight += 0.1
    latents = torch.ones(1, 2, 4, 4)
    expected = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    found = fastsd.Autoencoder.from_single_file(path, use_ema=True, **PLAIN).decode(latents * 0.18215, "pt")
    oracle.assert_close(found, expected, NET, "averaged weights")
    plain = fastsd.Autoencoder.from_single_file(path, **PLAIN).decode(latents * 0.18215, "pt")
    assert (plain - found).abs().max() > 0.01, "the average is no other picture, so this compares nothing"


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for path in ("nowhere.safetensors", "", tmp_path, 7):
        with pytest.raises(CheckpointError, match="no such file"):
            fastsd.Autoencoder.from_single_file(path)
    with pytest.raises(ParameterError, match="model: must be a folder, a file or a Hub id, not 7"):
        fastsd.Autoencoder(7)
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        fastsd.Autoencoder.from_pretrained(tmp_path)
    with pytest.raises(ParameterError, match="dtype: 'int8' is unknown"):
        fastsd.Autoencoder(SMALL_MODEL, dtype="int8")
    with pytest.raises(ParameterError, match="variant: must be a string"):
        fastsd.Autoencoder(SMALL_MODEL, variant=16)


def test_it_is_exported_and_costs_nothing_until_it_is_asked_for() -> None:
    code = "import sys, fastsd; assert 'torch' not in sys.modules; print(fastsd.Autoencoder.__name__)"
    assert "Autoencoder" in fastsd.__all__
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "Autoencoder\n"


# What is refused of it


def test_arguments(own: fastsd.Autoencoder, codebook: tuple[diffusers.VQModel, fastsd.Autoencoder]) -> None:
    _, book = codebook
    with pytest.raises(ParameterError, match="seed: has no meaning with a codebook"):
        book.encode(pictures(1, 16, 16), seed=1)
    for asked in (
        lambda: own.quantize(torch.zeros(1, 4, 2, 2)),
        lambda: own.decode_indices(torch.zeros(1, 2, 2).long()),
    ):
        with pytest.raises(ParameterError, match="quantize: this autoencoder has no codebook"):
            asked()
    for indices in (
        torch.zeros(1, 2, 2),
        torch.full((1, 2, 2), 300),
        torch.zeros(2, 2).long(),
        torch.zeros(0, 2, 2).long(),
        3,
    ):
        with pytest.raises(ParameterError, match=r"^indices: ?must be|^indices must be"):
            book.decode_indices(indices)
    for latents in (torch.zeros(1, 4, 2, 2), torch.full((1, 3, 2, 2), torch.nan), "x"):
        for asked in (book.quantize, book.decode):
            with pytest.raises(ParameterError, match="latents: "):
                asked(latents)
    with pytest.raises(ImageError, match="width and height must be multiples of 4"):
        own.reconstruct(pictures(1, 18, 16))
    for kind in ("latent", "jpeg"):
        with pytest.raises(ParameterError, match=r"output_type: .* choose one of pil, np, pt"):
            own.reconstruct(pictures(1, 16, 16), kind)
    with pytest.raises(ParameterError, match="vae_tiling"):
        own.encode(pictures(1, 16, 16), vae_tiling="yes")


def test_an_fp16_overflow_is_computed_again_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    half, full = (fastsd.Autoencoder(SMALL_MODEL, **PLAIN | {"dtype": name}) for name in ("float16", "float32"))
    for net in (half, full):
        with torch.no_grad():
            net.vae.decoder.conv_in.weight *= 3e4
            net.vae.decoder.conv_in.bias *= 3e4
    images = pictures(1, 32, 32)
    found, expected = half.reconstruction_error(images), full.reconstruction_error(images)
    assert "vae: non-finite values in torch.float16; computed again in float32" in caplog.text
    assert abs(found - expected) / expected < 0.05, f"{found} in half precision, {expected} in full"


def test_what_is_not_finite_is_an_error(tmp_path: Path) -> None:
    vq_model(VQ["narrower entries"]).save_pretrained(tmp_path)
    book = fastsd.Autoencoder(tmp_path, **PLAIN)
    with torch.no_grad():
        book.vae.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(NumericsError, match="vae: encode gives non-finite values"):
        book.reconstruction_error(pictures(1, 8, 8))
    with torch.no_grad():
        book.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(NumericsError, match="vae: decode gives non-finite values"):
        book.decode(torch.zeros(1, 4, 2, 2))


# A VQModel in a Pipeline

MODES = {
    "text": diffusers.StableDiffusionPipeline,
    "image": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder whose vae/ is a VQModel (f8, 4 channels, attention in a level)."""
    path = oracle.save_random_model(tmp_path_factory.mktemp("quantised"), "sd1")
    vq_model(VQ["vq-f8"], scaling_factor=0.6).save_pretrained(path / "vae")
    edit_json(path / "model_index.json", vae=["diffusers", "VQModel"])
    return path


@pytest.fixture(scope="module")
def pipes(quantised: Path) -> tuple[dict[str, Any], fastsd.Pipeline]:
    """The parts of diffusers' pipelines, and ours."""
    return oracle.load_pipeline(quantised).components, fastsd.Pipeline(quantised, **PLAIN)


@pytest.mark.parametrize("mode", MODES)
def test_a_vq_model_draws_what_diffusers_draws(
    pipes: tuple[dict[str, Any], fastsd.Pipeline], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its latents are not drawn from a distribution: from an image the generator gives the noise alone."""
    decode = diffusers.VQModel.decode  # which knows no generator, though the pipelines hand it one
    monkeypatch.setattr(diffusers.VQModel, "decode", lambda net, z, generator=None, **more: decode(net, z, **more))
    components, ours = pipes
    theirs = MODES[mode](**components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(ours.config.vae, VQConfig)
    image, mask = pictures(1, 64, 64), np.zeros((64, 64), np.float32)
    mask[:, :32] = 1
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    size = {"height": 64, "width": 64}
    if mode == "text":
        expected = theirs("a cat", generator=torch.Generator().manual_seed(9), **given, **size).images
        found = ours.generate("a cat", seed=9, **given, **size).images
    else:
        start: dict[str, Any] = {"image": as_theirs(image), "strength": 0.7}
        if mode == "inpaint":
            start |= {"mask_image": torch.from_numpy(mask)[None, None]}
            given |= size
        expected = theirs("a cat", generator=torch.Generator().manual_seed(9), **given, **start).images
        if mode == "inpaint":
            start["mask_image"] = mask
        found = ours.generate("a cat", seed=9, **given, **start | {"image": image}).images
    assert expected.std() > 0.01, "an empty picture compares nothing"
    assert_same_picture(found, expected, f"a VQModel, from {mode}")


def test_as_a_single_file_and_back(quantised: Path, tmp_path: Path) -> None:
    """Its codebook goes with it, named as latent diffusion names it."""
    file = convert(quantised, tmp_path / "quantised.safetensors")
    folder = convert(file, tmp_path / "folder")
    given = {"num_inference_steps": 1, "seed": 2, "height": 64, "width": 64, "output_type": "np"}
    pictures = [fastsd.Pipeline(path, **PLAIN).generate("a cat", **given).images for path in (quantised, file, folder)]
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()
    assert diffusers.VQModel.from_pretrained(folder / "vae").config.num_vq_embeddings == 64


def test_its_kernels_can_be_told_ahead() -> None:
    """A codebook runs on meta tensors as well, as where kernels are compiled before the first picture."""
    called: list[str] = []

    def traced(stage: str) -> Ops:
        return replace(
            REFERENCE, conv2d=lambda *given, **more: called.append(stage) or REFERENCE.conv2d(*given, **more)
        )

    nets = replace(TINY, vae=config_from_ldm(VQ["vq-f8"]))
    size = {"height": 16, "width": 16, "images": 1, "guided": True, "prompts": 1, "steps": [4]}
    run_stages(nets, traced, torch.float16, **size, stages=("decode", "encode"))
    assert set(called) == {"decode", "encode"}
