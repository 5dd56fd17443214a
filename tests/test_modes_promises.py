"""What the modes on images promise a user: meaning, pixels that stay, seeds, graphs, errors that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastsd
from fastsd import cli, images
from fastsd.errors import ImageError, ParameterError
from fastsd.metadata import parse_parameters
from tests import oracle
from tests.test_modes import half_mask, picture
from tests.tolerances import NET, SECOND_PASS_PSNR

RED = "a large red circle in the center on a white background"
BLUE = "a large blue circle in the center on a white background"
FAST: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "sampler": "ddim"}


@pytest.fixture(scope="module")
def red_circle(pipe: fastsd.Pipeline) -> Image.Image:
    return pipe.generate(RED, num_inference_steps=20, guidance_scale=4.0, seed=7, sampler="dpmpp_2m").images[0]


def ink(image: Image.Image) -> np.ndarray:
    """What differs from the white background."""
    return np.abs(np.asarray(image, dtype=float) - 255).max(-1) > 100


# Meaning --------------------------------------------------------------------------------------------------------------


def test_image_to_image_keeps_the_shape_and_changes_the_colour(pipe: fastsd.Pipeline, red_circle: Image.Image) -> None:
    blue = pipe.generate(
        BLUE, image=red_circle, strength=0.8, num_inference_steps=20, guidance_scale=4.0, seed=1, sampler="dpmpp_2m"
    ).images[0]
    before, after = ink(red_circle), ink(blue)
    overlap = (before & after).sum() / (before | after).sum()
    assert overlap > 0.6, f"the circle has moved: {overlap:.2f} of it is left"
    colours = [np.asarray(one, dtype=float)[where].mean(0) for one, where in ((red_circle, before), (blue, after))]
    assert colours[0][0] > colours[0][2] + 50, f"the circle to begin with is not red: {colours[0].round()}"
    assert colours[1][2] > colours[1][0] + 50, f"the circle has not become blue: {colours[1].round()}"


def test_a_smaller_strength_stays_closer(pipe: fastsd.Pipeline, red_circle: Image.Image) -> None:
    arguments: dict[str, Any] = {"image": red_circle, "num_inference_steps": 10, "seed": 1, "guidance_scale": 1.0}
    given = np.asarray(red_circle) / 255.0
    drawn = [pipe.generate(RED, strength=strength, output_type="np", **arguments).images[0] for strength in (0.2, 0.9)]
    near, far = (oracle.psnr(one, given) for one in drawn)
    assert near > far + 3, f"{near:.1f} dB at strength 0.2, {far:.1f} dB at 0.9"


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_leaves_what_is_not_masked(pipe: fastsd.Pipeline, red_circle: Image.Image, strength: float) -> None:
    """Through the VAE nearly so, pasted back to the bit; what is masked is painted anew."""
    mask, kept = half_mask(), np.asarray(half_mask()) == 0
    given: dict[str, Any] = {"image": red_circle, "mask_image": mask, "strength": strength, "num_inference_steps": 10}
    given |= {"seed": 2, "guidance_scale": 4.0}
    plain = np.asarray(pipe.generate(BLUE, **given).images[0])
    pasted = np.asarray(pipe.generate(BLUE, **given, paste_back=True).images[0])
    original = np.asarray(red_circle)
    through_vae = oracle.psnr(plain[:, 40:] / 255.0, original[:, 40:] / 255.0)
    assert through_vae > 25, f"the kept half has changed: {through_vae:.1f} dB"
    oracle.assert_equal(pasted[kept], original[kept], "outside the mask")
    assert np.array_equal(pasted[~kept], plain[~kept])
    assert np.abs(plain[:, :24].astype(int) - original[:, :24]).mean() > 5, "the masked half was not painted"


def test_a_soft_edge_blends_and_the_far_side_stays(pipe: fastsd.Pipeline, red_circle: Image.Image) -> None:
    given: dict[str, Any] = {"image": red_circle, "mask_image": half_mask(), **FAST}
    hard = np.asarray(pipe.generate(BLUE, **given, paste_back=True).images[0]).astype(int)
    result = pipe.generate(BLUE, **given, mask_blur=3)
    soft, original = np.asarray(result.images[0]).astype(int), np.asarray(red_circle)
    assert np.array_equal(soft[:, 48:], original[:, 48:]), "what lies far from the mask has changed"
    steps = [np.abs(one[:, 32] - one[:, 31]).mean() for one in (hard, soft)]
    assert steps[1] < steps[0], f"the edge is no softer: a step of {steps[1]:.1f} against {steps[0]:.1f}"
    assert parse_parameters(result.parameters[0])["mask_blur"] == 3


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pasting_back_in_every_output(pipe: fastsd.Pipeline, output_type: str) -> None:
    given: dict[str, Any] = {"image": picture(), "mask_image": half_mask(), "paste_back": True, **FAST}
    drawn = pipe.generate([BLUE, RED], **given, output_type=output_type).images
    wanted = np.asarray(picture()) / 255.0
    for one in drawn:
        array = np.asarray(one) / 255.0 if output_type == "pil" else np.asarray(one)
        array = array.transpose(1, 2, 0) if output_type == "pt" else array
        assert np.abs(array[:, 32:] - wanted[:, 32:]).max() < 1e-6


# Outpainting ----------------------------------------------------------------------------------------------------------


def test_extend_gives_the_canvas_and_the_mask_of_what_is_new(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    picture(40, 24).save(tmp_path / "in.png")
    canvas, mask = images.extend(tmp_path / "in.png", left=8, right=16, top=0, bottom=40)
    assert canvas.size == mask.size == (64, 64)
    inner = (slice(0, 24), slice(8, 48))
    padded = np.pad(np.asarray(picture(40, 24)), ((0, 40), (8, 16), (0, 0)), mode="edge")
    oracle.assert_equal(np.asarray(canvas), padded, "the canvas")
    outside = np.ones((64, 64), bool)
    outside[inner] = False
    assert np.array_equal(np.asarray(mask) == 255, outside)
    drawn = pipe.generate(BLUE, image=canvas, mask_image=mask, paste_back=True, **FAST).images[0]
    oracle.assert_equal(np.asarray(drawn)[inner], np.asarray(canvas)[inner], "what was there already")


@pytest.mark.parametrize(("side", "error"), [(-1, ParameterError), (True, ParameterError), (10**7, ImageError)])
def test_extend_refuses(side: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"left|canvas"):
        images.extend(picture(), left=side)


# A second pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("upscaler", "mode"), [("latent", "bilinear"), ("latent-nearest", "nearest")])
def test_a_second_pass_is_image_to_image_on_the_enlarged_latents(
    pipe: fastsd.Pipeline, upscaler: str, mode: str
) -> None:
    hires: dict[str, Any] = {"hires_scale": 1.5, "hires_strength": 0.6, "hires_steps": 5, "hires_upscaler": upscaler}
    result = pipe.generate(RED, num_images_per_prompt=2, output_type="np", **FAST, **hires)
    first = pipe.generate(RED, num_images_per_prompt=2, output_type="latent", **FAST).images
    larger = torch.nn.functional.interpolate(first, size=(24, 24), mode=mode)
    second = FAST | {"image": larger, "strength": 0.6, "num_inference_steps": 5}
    expected = pipe.generate(RED, num_images_per_prompt=2, output_type="np", **second).images
    assert result.images.shape == (2, 96, 96, 3)
    oracle.assert_same_picture(result.images, expected, upscaler, SECOND_PASS_PSNR)
    fields = parse_parameters(result.parameters[0])
    assert (fields["width"], fields["hires_scale"], fields["hires_steps"]) == (64, 1.5, 5)
    assert fields["denoising_strength"] == 0.6
    assert "hires" in result.timings


def test_a_second_pass_on_the_enlarged_picture(pipe: fastsd.Pipeline) -> None:
    result = pipe.generate(RED, output_type="np", hires_scale=2, hires_upscaler="lanczos", **FAST)
    first = pipe.generate(RED, **FAST).images[0].resize((128, 128), Image.Resampling.LANCZOS)
    expected = pipe.generate(RED, image=first, strength=0.7, output_type="np", **FAST)
    oracle.assert_same_picture(result.images, expected.images, "lanczos", SECOND_PASS_PSNR)


def test_the_callback_sees_both_passes(pipe: fastsd.Pipeline) -> None:
    seen: list[tuple[int, int, int]] = []

    def note(_: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
        seen.append((step, values["num_steps"], values["latents"].shape[2]))

    pipe.generate(RED, hires_scale=1.5, hires_strength=0.5, callback_on_step_end=note, **FAST)
    assert seen == [(0, 4, 16), (1, 4, 16), (2, 4, 16), (3, 4, 16), (0, 2, 24), (1, 2, 24)]


# Variations -----------------------------------------------------------------------------------------------------------


def latents(pipe: fastsd.Pipeline, **change: Any) -> torch.Tensor:
    return torch.as_tensor(pipe.generate(RED, output_type="latent", **FAST | change).images)


def test_a_variation_lies_between_two_seeds(pipe: fastsd.Pipeline) -> None:
    own, other = latents(pipe), latents(pipe, seed=12)
    varied = [latents(pipe, variation_seed=12, variation_strength=t) for t in (0.1, 0.6, 1.0)]
    torch.testing.assert_close(varied[2], other)
    a, b = (torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)).double() for seed in (3, 12))
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    between = (torch.sin(0.4 * angle) * a + torch.sin(0.6 * angle) * b) / torch.sin(angle)
    oracle.assert_close(varied[1], latents(pipe, seed=None, latents=between.float()[None]), NET, "the noise between")
    distances = [(one - own).norm().item() for one in varied]
    assert 0 < distances[0] < distances[1] < distances[2] * 1.2, distances


def test_variations_of_a_batch_share_the_seed(pipe: fastsd.Pipeline) -> None:
    """As in the web UI: image i turns to variation_seed + i, and comes out alone from what its parameters say."""
    arguments: dict[str, Any] = {**FAST, "variation_seed": 12, "variation_strength": 0.3, "output_type": "latent"}
    result = pipe.generate(RED, num_images_per_prompt=2, **arguments)
    assert result.seeds == [3, 3]
    fields = parse_parameters(result.parameters[1])
    assert (fields["seed"], fields["variation_seed"], fields["variation_strength"]) == (3, 13, 0.3)
    alone = latents(pipe, variation_seed=13, variation_strength=0.3)
    oracle.assert_close(torch.as_tensor(result.images)[1:], alone, 1e-4, "the second of a batch against itself alone")


def test_slerp_goes_along_the_arc() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 64, 64, generator=generator) for _ in range(2))
    assert torch.equal(fastsd.slerp(a, b, 0.0), a)
    torch.testing.assert_close(fastsd.slerp(a, b, 1.0), b)
    assert abs(fastsd.slerp(a, b, 0.5).std().item() - 1) < 0.01, "half way noise must stay unit noise"
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    oracle.assert_close(fastsd.slerp(east, north, 1 / 3), torch.tensor([3**0.5 / 2, 0.5]), 1e-7, "30 degrees")
    torch.testing.assert_close(fastsd.slerp(a, a, 0.3), a)
    assert fastsd.slerp(a.half(), b.half(), 0.5).dtype == torch.float16
    zero = torch.zeros(3)
    assert fastsd.slerp(zero, zero, 0.5).isfinite().all()
    for wrong in ((a, b[:1], 0.5), (a, b, 1.5), (a, b, float("nan")), (a, None, 0.5)):
        with pytest.raises(ParameterError):
            fastsd.slerp(*wrong)


# Seeds and batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_image_i_comes_out_alone(pipe: fastsd.Pipeline, masked: bool) -> None:
    given: dict[str, Any] = {"image": picture(), "strength": 0.6, "output_type": "latent", "num_inference_steps": 4}
    given |= {"sampler": "euler_ancestral"} | ({"mask_image": half_mask()} if masked else {})
    together = torch.as_tensor(pipe.generate(RED, num_images_per_prompt=3, seed=5, **given).images)
    for index in range(3):
        alone = torch.as_tensor(pipe.generate(RED, seed=5 + index, **given).images)
        oracle.assert_close(together[index : index + 1], alone, 1e-4, f"image {index} of three against itself alone")


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_masks_of_every_kind_are_one_mask(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    mask = half_mask()
    mask.save(tmp_path / "mask.png")
    array = np.asarray(mask)
    kinds = [mask, mask.convert("RGB"), mask.convert("1"), tmp_path / "mask.png", str(tmp_path / "mask.png"), [mask]]
    kinds += [array, array == 255, array[None, ..., None] / 255.0, torch.from_numpy(array / 255.0)[None, None].float()]
    sixteen = Image.fromarray(array.astype(np.uint16) * 257)
    given: dict[str, Any] = {"image": picture(), "output_type": "latent", "num_inference_steps": 1, "seed": 0}
    first, *others = (pipe.generate(RED, mask_image=kind, **given).images for kind in [*kinds, sixteen])
    for index, other in enumerate(others, 1):
        assert torch.equal(torch.as_tensor(other), torch.as_tensor(first)), f"mask {index} is read otherwise"


def test_pictures_of_every_kind_are_one_picture(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "in.png")
    array = np.asarray(image)
    kinds: list[Any] = [image, tmp_path / "in.png", [image], array, (array / 255.0).astype(np.float32)]
    kinds += [torch.from_numpy(array / 255.0 * 2 - 1).permute(2, 0, 1).float()]
    given: dict[str, Any] = {"strength": 0.5, "output_type": "latent", **FAST}
    first, *others = (torch.as_tensor(pipe.generate(RED, image=kind, **given).images) for kind in kinds)
    for index, other in enumerate(others, 1):
        torch.testing.assert_close(other, first, msg=f"picture {index} is read otherwise")


def test_a_rotated_photograph_is_turned_upright(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    """EXIF orientation 6, of the picture and of its mask."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(48, 64).rotate(90, expand=True).save(tmp_path / "in.png", exif=exif)
    half_mask(48, 64).rotate(90, expand=True).save(tmp_path / "mask.png", exif=exif)
    given: dict[str, Any] = {"paste_back": True, **FAST}
    turned = pipe.generate(RED, image=tmp_path / "in.png", mask_image=tmp_path / "mask.png", **given).images[0]
    upright = pipe.generate(RED, image=picture(48, 64), mask_image=half_mask(48, 64), **given).images[0]
    assert np.array_equal(np.asarray(turned), np.asarray(upright))


def test_a_black_mask_paints_nothing_and_says_so(pipe: fastsd.Pipeline) -> None:
    result = pipe.generate(RED, image=picture(), mask_image=Image.new("L", (64, 64)), paste_back=True, **FAST)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(picture()))
    assert any("nothing is painted" in warning for warning in result.warnings), result.warnings


# Faults ---------------------------------------------------------------------------------------------------------------

Fault = tuple[dict[str, Any], type[Exception], str]
IMAGE: dict[str, Any] = {"image": picture()}
MASKED = IMAGE | {"mask_image": half_mask()}
FAULTS: dict[str, Fault] = {
    "strength above 1": (IMAGE | {"strength": 1.1}, ParameterError, "strength: .* from 0 to 1"),
    "strength below 0": (IMAGE | {"strength": -0.1}, ParameterError, "strength: .* from 0 to 1"),
    "strength NaN": (IMAGE | {"strength": float("nan")}, ParameterError, "strength: "),
    "strength a bool": (IMAGE | {"strength": True}, ParameterError, "strength: "),
    "no step": (IMAGE | {"strength": 0.2}, ParameterError, "strength: 0.2 of 4 steps is less than one"),
    "strength 0": (IMAGE | {"strength": 0.0}, ParameterError, "strength: 0.0 of 4 steps"),
    "strength alone": ({"strength": 0.5}, ParameterError, "strength: has no meaning without image"),
    "mask alone": ({"mask_image": half_mask()}, ParameterError, "mask_image: has no meaning without image"),
    "blur without a mask": (IMAGE | {"mask_blur": 4}, ParameterError, "mask_blur: has no meaning without mask_image"),
    "blur too large": (MASKED | {"mask_blur": 65}, ParameterError, "mask_blur: .* from 0 to 64"),
    "pasting without a mask": (IMAGE | {"paste_back": True}, ParameterError, "paste_back: has no meaning"),
    "mask of another size": (IMAGE | {"mask_image": half_mask(32, 64)}, ImageError, "mask_image: 32x64 .* has 64x64"),
    "mask of numbers": (IMAGE | {"mask_image": np.zeros((64, 64), int)}, ImageError, "mask_image: "),
    "mask out of range": (
        IMAGE | {"mask_image": np.full((64, 64), 2.0)},
        ImageError,
        "mask_image: values out of range",
    ),
    "mask NaN": (IMAGE | {"mask_image": np.full((64, 64), np.nan)}, ImageError, "mask_image: values out of range"),
    "mask a number": (IMAGE | {"mask_image": 3}, ImageError, "mask_image: give a path"),
    "no masks": (IMAGE | {"mask_image": []}, ImageError, "mask_image: the list is empty"),
    "no images": ({"image": []}, ImageError, "image: the list is empty"),
    "image a number": ({"image": 3}, ImageError, "image: give a path"),
    "image missing": ({"image": "no/such.png"}, ImageError, "such.png: cannot be read"),
    "images of two sizes": ({"image": [picture(), picture(32, 32)]}, ImageError, "same size"),
    "two images for one prompt": ({"image": [picture()] * 2}, ParameterError, "image: 2 images for 1 prompts"),
    "an array of another size": ({"image": np.zeros((62, 64, 3))}, ImageError, "64x62 pixels for a picture of 64x60"),
    "latents of another size": ({"image": torch.zeros(1, 4, 16, 16), "height": 32}, ParameterError, "image: latents"),
    "latents NaN": ({"image": torch.full((1, 4, 16, 16), float("nan"))}, ParameterError, "image: holds NaN"),
    "latents pasted": (
        {"image": torch.zeros(1, 4, 16, 16), "mask_image": half_mask(), "paste_back": True},
        ParameterError,
        "paste_back: the image was given as latents",
    ),
    "a crop of nothing": (
        IMAGE | {"mask_image": Image.new("L", (64, 64)), "padding_mask_crop": 0},
        ImageError,
        "all black",
    ),
    "a crop of an array": (
        {"image": np.zeros((64, 64, 3)), "mask_image": half_mask(), "padding_mask_crop": 0},
        ParameterError,
        "padding_mask_crop: takes one image",
    ),
    "a crop as latents": (MASKED | {"padding_mask_crop": 0, "output_type": "latent"}, ParameterError, "output_type: "),
    "padding below 0": (MASKED | {"padding_mask_crop": -1}, ParameterError, "padding_mask_crop: "),
    "hires of an image": (IMAGE | {"hires_scale": 2}, ParameterError, "hires_scale: .* leave image out"),
    "hires too large": ({"hires_scale": 9}, ParameterError, "hires_scale: .* from 1 to 8"),
    "hires strength alone": ({"hires_strength": 0.5}, ParameterError, "hires_strength: has no meaning"),
    "hires strength of nothing": ({"hires_scale": 2, "hires_strength": 0.1}, ParameterError, "strength: 0.1 of 4"),
    "hires upscaler": ({"hires_scale": 2, "hires_upscaler": "ESRGAN"}, ParameterError, "choose one of latent"),
    "hires steps": ({"hires_scale": 2, "hires_steps": 0}, ParameterError, "hires_steps: 0 is out of range"),
    "variation too strong": ({"variation_strength": 1.5}, ParameterError, "variation_strength: .* from 0 to 1"),
    "variation seed alone": ({"variation_seed": 5}, ParameterError, "variation_seed: has no effect"),
    "variation seed": ({"variation_seed": -2, "variation_strength": 0.5}, ParameterError, "variation_seed: -2"),
    "variation of a generator": (
        {"generator": torch.Generator(), "seed": None, "variation_strength": 0.5},
        ParameterError,
        "variation_strength: varies the noise of a seed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_harm_nothing(pipe: fastsd.Pipeline, fault: str) -> None:
    arguments, error, message = FAULTS[fault]
    with pytest.raises(error, match=message) as caught:
        pipe.generate(RED, **FAST | arguments)
    assert "\n" not in str(caught.value)


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: (picture().save(path), path.write_bytes(path.read_bytes()[:200])),
    "a GIF": lambda path: picture().save(path, "GIF"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("role", ["image", "mask_image"])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_images(pipe: fastsd.Pipeline, tmp_path: Path, kind: str, role: str) -> None:
    FILES[kind](tmp_path / "broken.png")
    with pytest.raises(ImageError, match=r"broken\.png"):
        pipe.generate(RED, **FAST | IMAGE | {role: tmp_path / "broken.png"})


def test_a_huge_mask_is_refused_by_its_header(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    Image.new("1", (8192, 4096)).save(tmp_path / "huge.png")
    with pytest.raises(ImageError, match=r"huge\.png: 8192x4096 pixels"):
        pipe.generate(RED, **FAST | IMAGE | {"mask_image": tmp_path / "huge.png"})


# The command line -----------------------------------------------------------------------------------------------------


def test_the_command_line_paints_in_a_picture(
    pipe: fastsd.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastsd, "Pipeline", lambda **_: pipe)
    picture().save(tmp_path / "in.png")
    half_mask().save(tmp_path / "mask.png")
    common = ["generate", "-p", RED, "--steps", "4", "-s", "3", "--sampling-method", "ddim", "--cfg-scale", "7.5", "-q"]
    out = str(tmp_path / "out.png")
    files = ["-i", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png")]
    result = CliRunner().invoke(cli.app, [*common, *files, "--strength", "0.5", "--paste-back", "-o", out])
    assert result.exit_code == 0, result.output
    expected = pipe.generate(
        RED, image=picture(), mask_image=half_mask(), strength=0.5, paste_back=True, prompt_style="a1111", **FAST
    )
    with Image.open(out) as drawn:
        oracle.assert_equal(np.asarray(drawn), np.asarray(expected.images[0]), "the picture")
        assert parse_parameters(drawn.info["parameters"])["denoising_strength"] == 0.5
    result = CliRunner().invoke(cli.app, [*common, "-i", str(tmp_path / "in.png"), "-o", out])
    with Image.open(out) as drawn:
        assert parse_parameters(drawn.info["parameters"])["denoising_strength"] == 0.75
    result = CliRunner().invoke(cli.app, [*common, "--hires-scale", "1.5", "--variation-strength", "0.2", "-o", out])
    with Image.open(out) as drawn:
        assert drawn.size == (96, 96)
        assert parse_parameters(drawn.info["parameters"])["variation_strength"] == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0.5"], "--strength: has no meaning without image"),
        (["--mask", "m.png"], "--mask: has no meaning without image"),
        (["--variation-seed", "4"], "--variation-seed: has no effect"),
        (["--hires-steps", "4"], "--hires-steps: has no meaning"),
    ],
)
def test_the_command_line_names_its_options(
    pipe: fastsd.Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(fastsd, "Pipeline", lambda **_: pipe)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["generate", "-p", "x", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
