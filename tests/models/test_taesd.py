"""TAESD's decoder against diffusers' AutoencoderTiny with the same weights, from both kinds of file."""

from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastsd.checkpoints.taesd import open_taesd_decoder
from fastsd.checkpoints.weights import fill_module
from fastsd.errors import CheckpointError
from fastsd.models.taesd import TAESDDecoder
from tests import oracle
from tests.tolerances import NET


@pytest.fixture(scope="module")
def theirs() -> diffusers.AutoencoderTiny:
    """As released for Stable Diffusion, with random weights."""
    return oracle.randomise(diffusers.AutoencoderTiny(), seed=4)


def original_keys(net: diffusers.AutoencoderTiny) -> dict[str, Tensor]:
    """The decoder as github.com/madebyollin/taesd names it: a Sequential whose layer 0 is the clamp."""
    state = {}
    for name, weight in net.decoder.layers.state_dict().items():
        number, rest = name.split(".", 1)
        state[f"{int(number) + 1}.{rest}"] = weight
    return state


def saved(net: diffusers.AutoencoderTiny, kind: str, folder: Path) -> Path:
    if kind == "diffusers":
        net.save_pretrained(folder)
        return folder / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(original_keys(net), folder / "taesd_decoder.safetensors")
    return folder / "taesd_decoder.safetensors"


def loaded(path: Path, **options: int) -> TAESDDecoder:
    with torch.device("meta"):
        decoder = TAESDDecoder(**options)
    fill_module("taesd", [open_taesd_decoder(path)], decoder, torch.float32, torch.device("cpu"))
    return decoder


@pytest.mark.parametrize("kind", ["diffusers", "original"])
@torch.inference_mode()
def test_equals_diffusers(theirs: diffusers.AutoencoderTiny, tmp_path: Path, kind: str) -> None:
    ours = loaded(saved(theirs, kind, tmp_path))
    latents = 3 * torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(8))  # beyond ±3 the clamp shows
    expected = theirs.decode(latents).sample
    oracle.assert_close(oracle.nchw(ours(oracle.nhwc(latents))), expected, NET, "image")


@torch.inference_mode()
def test_of_another_autoencoder(tmp_path: Path) -> None:
    """16 latent channels, a quarter of the height and width."""
    tiny = diffusers.AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(64,) * 3,
        decoder_block_out_channels=(64,) * 3,
        num_encoder_blocks=(1, 3, 3),
        num_decoder_blocks=(3, 3, 1),
    )
    theirs = oracle.randomise(tiny, seed=5)
    ours = loaded(saved(theirs, "diffusers", tmp_path), latent_channels=16, levels=3)
    latents = torch.randn(1, 16, 3, 2, generator=torch.Generator().manual_seed(8))
    oracle.assert_close(oracle.nchw(ours(oracle.nhwc(latents))), theirs.decode(latents).sample, NET, "image")


def altered(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    if change == "missing":
        del state["3.conv.0.weight"]
    elif change == "unexpected":
        state["19.weight.more"] = torch.zeros(1)
    elif change == "shape":
        state["1.weight"] = torch.zeros(64, 16, 3, 3)
    elif change == "integers":
        state["1.bias"] = torch.zeros(64, dtype=torch.int32)
    elif change == "nan":
        state["1.bias"] = torch.full((64,), torch.nan)
    elif change == "twice":
        state["decoder.layers.0.bias"] = torch.zeros(64)
    elif change == "encoder":
        state = {"0.weight": torch.zeros(64, 3, 3, 3), "0.bias": torch.zeros(64)}
    elif change == "lora":
        state = {"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}
    return state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r"1 missing \(layers\.2\.conv\.0\.weight\)"),
        ("unexpected", "1 unexpected"),
        ("shape", r"layers\.0\.weight expected \[64, 4, 3, 3\], found \[64, 16, 3, 3\]"),
        ("integers", "layers.0.bias is int32; only floating-point"),
        ("nan", "holds NaN or infinite values"),
        ("twice", r"1 unexpected \(decoder\.layers\.0\.bias\)"),
        ("encoder", r"1 unexpected \(0\.weight, 0\.bias\)|2 unexpected"),
        ("lora", "this is a LoRA"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    theirs: diffusers.AutoencoderTiny, tmp_path: Path, change: str, says: str
) -> None:
    path = tmp_path / "taesd.safetensors"
    safetensors.torch.save_file(altered(original_keys(theirs), change), path)
    with pytest.raises(CheckpointError, match=rf"^taesd\.safetensors.*{says}") as error:
        loaded(path)
    assert "\n" not in str(error.value)


def test_a_whole_vae_is_recognised(tmp_path: Path) -> None:
    oracle.vae(oracle.SD_VAE).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="this is the VAE, in the place of TAESD's decoder"):
        loaded(tmp_path / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "the file is empty"), (b"PK\x03\x04 and more bytes than eight", "a zip archive")]
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "taesd_decoder.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"taesd_decoder\.pth: {says}"):
        loaded(path)
    with pytest.raises(CheckpointError, match="none is missing"):
        loaded(tmp_path / "none")
