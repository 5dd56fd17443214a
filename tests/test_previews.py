"""Previews: the linear map and TAESD's decoder against the VAE's own pictures and diffusers', and how they reach a user."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import fastsd
from fastsd import cli
from fastsd.errors import CheckpointError, NumericsError, ParameterError
from fastsd.previews import Previewer
from tests import oracle
from tests.measured import measured
from tests.small_model import SMALL_MODEL
from tests.tolerances import PREVIEW_EARLY_PSNR, PREVIEW_PSNR, PREVIEW_TAESD_LEVELS

DRAWINGS = [
    "a large red circle in the center on a white background",
    "a blue square on the left on a white background",
    "a small green triangle on the right on a black background",
    "a yellow circle above a purple square on a gray background",
]
RED = DRAWINGS[0]
FAST: dict[str, Any] = {"num_inference_steps": 6, "seed": 7, "guidance_scale": 4.0, "sampler": "euler_ancestral"}


@pytest.fixture(scope="module")
def drawn(pipe: fastsd.Pipeline) -> Tensor:
    """Latents of the small model's own drawings."""
    return pipe.generate(
        DRAWINGS, num_inference_steps=12, seed=5, sampler="dpmpp_2m", guidance_scale=4.0, output_type="latent"
    ).images


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[diffusers.AutoencoderTiny, Path]:
    """An AutoencoderTiny of the small model's factor, with random weights; and its file."""
    levels: dict[str, Any] = {"encoder_block_out_channels": (64,) * 3, "decoder_block_out_channels": (64,) * 3}
    net = diffusers.AutoencoderTiny(**levels, num_encoder_blocks=(1, 3, 3), num_decoder_blocks=(3, 3, 1))
    folder = tmp_path_factory.mktemp("taesd")
    oracle.randomise(net, seed=4).save_pretrained(folder)
    return net, folder / "diffusion_pytorch_model.safetensors"


def unit(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]) / 255.0


# Pictures -------------------------------------------------------------------------------------------------------------


def test_one_pixel_a_latent_is_the_mean_of_what_the_vae_decodes(pipe: fastsd.Pipeline, drawn: Tensor) -> None:
    decoded = pipe.decode_latents(drawn, output_type="pt")
    expected = torch.nn.functional.avg_pool2d(decoded, 4).permute(0, 2, 3, 1).numpy()
    previews = unit(pipe.preview(drawn))
    assert previews.shape == expected.shape == (4, 16, 16, 3)
    for index, drawing in enumerate(DRAWINGS):
        own, *others = (oracle.psnr(previews[index], expected[index - other]) for other in range(4))
        measured("dB", own, PREVIEW_PSNR)
        assert own >= PREVIEW_PSNR, f"{drawing}: {own:.1f} dB"
        assert own > max(others) + 3, f"{drawing}: the preview is as near to another picture"


def test_the_vae_is_asked_once(pipe: fastsd.Pipeline, drawn: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.preview(drawn)
    monkeypatch.setattr(pipe, "vae", None)
    assert len(pipe.preview(drawn)) == len(drawn)


def test_the_map_is_not_on_the_callers_default_device(pipe: fastsd.Pipeline, drawn: Tensor) -> None:
    expected = unit(pipe.preview(drawn))
    other = fastsd.Pipeline(SMALL_MODEL, device="cpu")
    with torch.device("meta"):
        found = unit(other.preview(drawn))
    assert np.array_equal(found, expected)


def test_another_vae_has_another_map(random_model: Path) -> None:
    """Fitted, not built in: a chart that this VAE encodes is shown in its own colours."""
    pipe = fastsd.Pipeline(random_model, device="cpu", backend="reference")
    half = torch.ones(1, 3, 128, 128)
    half[:, :, :, 64:] = -1.0
    preview = unit(pipe.preview(pipe.encode_image(half)))[0]
    assert preview.shape == (16, 16, 3)
    assert preview[:, :6].mean() > preview[:, 10:].mean() + 0.1


def test_taesd_equals_diffusers(
    pipe: fastsd.Pipeline, drawn: Tensor, tiny: tuple[diffusers.AutoencoderTiny, Path]
) -> None:
    net, path = tiny
    with torch.no_grad():
        expected = (net.decode(drawn).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for taesd in (path, str(path), pipe.load_taesd(path)):
        previews = pipe.preview(drawn, taesd=taesd)
        assert previews[0].size == (64, 64)
        levels = np.abs(unit(previews) - expected).max() * 255
        measured("max abs error", levels / 255, PREVIEW_TAESD_LEVELS / 255)
        assert levels <= PREVIEW_TAESD_LEVELS, f"{levels:.2f} levels from diffusers"
    assert expected.std() > 0.05


def test_in_half_precision(pipe: fastsd.Pipeline, drawn: Tensor, tiny: tuple[diffusers.AutoencoderTiny, Path]) -> None:
    half = fastsd.Pipeline(SMALL_MODEL, device="cpu", dtype="bfloat16", backend="reference")
    for taesd in (None, tiny[1]):
        psnr = oracle.psnr(unit(half.preview(drawn, taesd)), unit(pipe.preview(drawn, taesd)))
        assert psnr > 30, f"{taesd}: {psnr:.1f} dB from fp32"


# While drawing --------------------------------------------------------------------------------------------------------


def test_previews_come_to_the_picture(pipe: fastsd.Pipeline) -> None:
    """Every so many steps, ever nearer, and the drawing is the same as without; of a sampler whose latents are noisy."""
    shown: list[tuple[int, list[Image.Image]]] = []
    given = FAST | {"num_inference_steps": 12, "num_images_per_prompt": 2}
    previewer = Previewer(pipe, lambda step, pictures: shown.append((step, pictures)), every=5)
    watched = pipe.generate(RED, **given, callback_on_step_end=previewer)
    assert [step for step, _ in shown] == [4, 9]
    assert [len(pictures) for _, pictures in shown] == [2, 2]
    plain = pipe.generate(RED, **given)
    assert np.array_equal(unit(watched.images), unit(plain.images)), "looking on changed the picture"
    final = unit([image.resize((16, 16), Image.Resampling.BOX) for image in plain.images])
    near = [oracle.psnr(unit(pictures), final) for _, pictures in shown]
    assert near[0] > PREVIEW_EARLY_PSNR, f"{near[0]:.1f} dB from the picture after 5 of 12 steps"
    assert near[1] > near[0], f"{near} dB from the picture: no nearer"


def test_with_taesd_pictures_are_of_full_size(
    pipe: fastsd.Pipeline, tiny: tuple[diffusers.AutoencoderTiny, Path]
) -> None:
    sizes: list[tuple[int, int]] = []
    previewer = Previewer(pipe, lambda _, pictures: sizes.extend(p.size for p in pictures), every=2, taesd=tiny[1])
    pipe.generate(RED, height=48, width=32, **FAST | {"num_inference_steps": 2}, callback_on_step_end=previewer)
    assert sizes == [(32, 48)]


def test_an_exception_cancels_and_reaches_the_caller(pipe: fastsd.Pipeline) -> None:
    def stop(step: int, pictures: list[Image.Image]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate(RED, **FAST, callback_on_step_end=Previewer(pipe, stop, every=2))


def test_latents_that_are_not_finite_are_not_shown() -> None:
    broken = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference")
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(torch.nan)
    shown: list[int] = []
    with pytest.raises(NumericsError, match="unet: a non-finite value at step 1"):
        broken.generate(RED, **FAST, callback_on_step_end=Previewer(broken, lambda step, _: shown.append(step), 1))
    assert shown == []


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latents", [torch.zeros(4, 16, 16), torch.zeros(1, 3, 16, 16), [[0.0]], torch.tensor(torch.nan)]
)
def test_what_is_no_latents_is_refused(pipe: fastsd.Pipeline, latents: Any) -> None:
    with pytest.raises(ParameterError, match=r"^latents: "):
        pipe.preview(latents)
    with pytest.raises(ParameterError, match=r"^latents: holds NaN"):
        pipe.preview(torch.full((1, 4, 16, 16), torch.nan))


@pytest.mark.parametrize("every", [0, -1, True, 2.5, "5", None])
def test_every_must_be_a_number_of_steps(pipe: fastsd.Pipeline, every: Any) -> None:
    with pytest.raises(ParameterError, match=r"^every: .* an integer of 1 or more"):
        Previewer(pipe, print, every=every)


def test_bad_arguments_are_told_before_the_drawing(
    pipe: fastsd.Pipeline, tmp_path: Path, tiny: tuple[diffusers.AutoencoderTiny, Path]
) -> None:
    with pytest.raises(ParameterError, match=r"^on_preview: must be a function, not 3"):
        Previewer(pipe, 3)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"^taesd: must be a file's path, not 3"):
        Previewer(pipe, print, taesd=3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="none is missing"):
        Previewer(pipe, print, taesd=tmp_path / "none")
    oracle.randomise(diffusers.AutoencoderTiny()).save_pretrained(tmp_path)  # of factor 8
    with pytest.raises(CheckpointError, match="tensors do not fit the model"):
        pipe.load_taesd(tmp_path / "diffusion_pytorch_model.safetensors")


# Command line ---------------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> Any:
    output = ["-o", str(folder / "out.png"), "--steps", "2", "-s", "7"]
    return CliRunner().invoke(cli.app, ["generate", "-m", str(SMALL_MODEL), "-p", RED, *output, *arguments])


@pytest.mark.parametrize("with_taesd", [False, True])
def test_the_command_line_writes_a_grid(
    tmp_path: Path, tiny: tuple[diffusers.AutoencoderTiny, Path], with_taesd: bool
) -> None:
    path = tmp_path / "preview.png"
    more = ["--taesd", str(tiny[1])] if with_taesd else []
    result = run(tmp_path, "-b", "2", "--preview", str(path), "--preview-every", "2", *more)
    assert result.exit_code == 0, result.stderr
    with Image.open(path) as sheet:
        assert sheet.size == (128, 64)
        assert np.asarray(sheet).std() > 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-0.png", "out-1.png", "preview.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preview-every", "2"], "--preview-every: has no meaning without --preview"),
        (["--taesd", "x.safetensors"], "--taesd: has no meaning without --preview"),
        (["--preview", "x.gif"], "--preview: cannot write 'x.gif': the name must end in"),
        (["--preview", "no/where.png"], "--preview: cannot write"),
        (["--preview", "p.png", "--preview-every", "0"], "--preview-every"),
    ],
)
def test_the_command_line_refuses_before_the_work(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_taesd_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "--preview", str(tmp_path / "p.png"), "--taesd", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "fastsd: error: none is missing"


def test_tiles_from_the_command_line(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    large = ["-W", "80", "-H", "64", "--backend", "reference", "--device", "cpu"]
    pictures = {}
    for option in ("--vae-tiling", "--no-vae-tiling"):
        assert run(tmp_path, *large, option).exit_code == 0
        with Image.open(tmp_path / "out.png") as image:
            pictures[option] = np.asarray(image) / 255.0
    asked: dict[str, Any] = {"width": 80, "height": 64, "num_inference_steps": 2, "seed": 7, "prompt_style": "a1111"}
    for option, tiling in (("--vae-tiling", True), ("--no-vae-tiling", False)):
        expected = pipe.generate(RED, **asked, vae_tiling=tiling).images
        assert oracle.psnr(pictures[option], unit(expected)[0]) > 50
    assert not np.array_equal(*pictures.values())
