"""Image-to-image and inpainting against diffusers' pipelines: same weights, same generators, same pictures, fp32."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd import masks
from fastsd.denoise import Denoiser
from fastsd.graph import Graphs
from fastsd.sampling import SAMPLERS, NoiseSchedule, Table, make_table
from tests import oracle
from tests.oracle import assert_same_picture
from tests.sampling import sampler_cases
from tests.small_model import SMALL_MODEL
from tests.test_graph import StandIn
from tests.tolerances import NOISE_LEVEL

PROMPT = "a large blue circle in the center on a white background"
PIPELINES = {
    "img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
}


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """A red disc on a shaded ground: no two rows and no two columns are alike."""
    rows, columns = np.mgrid[0:height, 0:width]
    ground = np.stack([columns / width, rows / height, 0 * rows + 0.5], -1)
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(width, height) / 3) ** 2
    ground[disc] = (0.9, 0.1, 0.1)
    return Image.fromarray((ground * 255).astype(np.uint8))


def half_mask(width: int = 64, height: int = 64) -> Image.Image:
    """White on the left."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def theirs(path: Path, mode: str) -> Any:
    components = oracle.load_pipeline(path).components
    pipe = PIPELINES[mode](**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def their_pipes(small_model: Path) -> dict[str, Any]:
    return {mode: theirs(small_model, mode) for mode in PIPELINES}


def with_scheduler(pipe: Any, sampler: str, schedule: str) -> Any:
    """The pipeline with a sampler's twin, on the checkpoint's own noise schedule."""
    info = SAMPLERS[sampler]
    options = dict(info.diffusers_options) | {"use_karras_sigmas": schedule == "karras"}
    if sampler == "plms":
        options["skip_prk_steps"] = True  # else diffusers' first steps are Runge-Kutta's
    config = json.loads((SMALL_MODEL / "scheduler" / "scheduler_config.json").read_text())
    scheduler_class = getattr(diffusers, info.diffusers_class)
    pipe.scheduler = scheduler_class.from_config({k: v for k, v in config.items() if k[0] != "_"}, **options)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def as_floats(image: Image.Image) -> np.ndarray:
    return np.asarray(image) / 255.0


# dpmpp_sde's twin draws from a Brownian tree, not from the generator; those without a class have no twin.
TWINS = [(id, "uniform") for id, info in SAMPLERS.items() if info.diffusers_class and id != "dpmpp_sde"]


@pytest.mark.parametrize(("sampler", "schedule"), [*TWINS, ("dpmpp_2m", "karras"), ("unipc", "karras")])
def test_image_to_image_with_every_sampler(
    pipe: fastsd.Pipeline, their_pipes: dict[str, Any], sampler: str, schedule: str
) -> None:
    """Half of seven steps: a walk that begins on another row, and where history is short."""
    given: dict[str, Any] = {"image": picture(), "strength": 0.5, "num_inference_steps": 7, "output_type": "np"}
    given["eta"] = 0.0  # the default of diffusers' pipelines, also for TCD, whose own is 0.3
    expected = with_scheduler(their_pipes["img2img"], sampler, schedule)(PROMPT, generator=generators(5), **given)
    ours = pipe.generate(PROMPT, seed=5, sampler=sampler, schedule=schedule, **given)
    assert_same_picture(ours.images, expected.images, f"{sampler}, {schedule}")


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("ddim", "uniform"),
        ("euler_ancestral", "uniform"),
        ("heun", "uniform"),
        ("plms", "uniform"),
        ("dpmpp_2m", "karras"),
    ],
)
def test_inpainting_with_an_ordinary_checkpoint(
    pipe: fastsd.Pipeline, their_pipes: dict[str, Any], sampler: str, schedule: str, strength: float
) -> None:
    """One evaluation a step and two, noise of the steps, a first step taken twice, levels between the timesteps."""
    given: dict[str, Any] = {
        **{"image": picture(), "mask_image": half_mask(), "strength": strength, "num_inference_steps": 7},
        **{"output_type": "np", "height": 64, "width": 64},
    }
    expected = with_scheduler(their_pipes["inpaint"], sampler, schedule)(PROMPT, generator=generators(5), **given)
    ours = pipe.generate(PROMPT, seed=5, sampler=sampler, schedule=schedule, **given)
    assert_same_picture(ours.images, expected.images, f"{sampler}, {schedule}, strength {strength}")


@pytest.fixture(scope="module")
def inpainting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the style of an inpainting checkpoint: its UNet takes 9 channels."""
    path = oracle.save_random_model(tmp_path_factory.mktemp("inpaint"), "sd1")
    oracle.unet(oracle.SD1_UNET | {"in_channels": 9}).save_pretrained(path / "unet")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionInpaintPipeline"}))
    return path


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_inpainting_checkpoints(inpainting_model: Path, strength: float, guidance: float) -> None:
    given: dict[str, Any] = {
        **{"image": picture(), "mask_image": half_mask(), "strength": strength},
        **{"guidance_scale": guidance, "num_inference_steps": 5, "output_type": "np", "height": 64, "width": 64},
    }
    expected = theirs(inpainting_model, "inpaint")(PROMPT, generator=generators(5), **given).images
    ours = fastsd.Pipeline(inpainting_model, device="cpu", backend="reference")
    assert_same_picture(ours.generate(PROMPT, seed=5, **given).images, expected, "9 channels")
    other = ours.generate(PROMPT, seed=5, **given | {"mask_image": Image.new("L", (64, 64), 255)}).images
    assert oracle.psnr(other, expected) < 40, "the mask does not reach the UNet"


def test_an_inpainting_checkpoint_draws_from_a_prompt_alone(inpainting_model: Path) -> None:
    """As if all were to be painted: the same as a mask that is white everywhere, over a grey image."""
    ours = fastsd.Pipeline(inpainting_model, device="cpu", backend="reference")
    given: dict[str, Any] = {"num_inference_steps": 3, "seed": 5, "output_type": "latent", "height": 64, "width": 64}
    alone = ours.generate(PROMPT, **given).images
    assert alone.shape == (1, 4, 8, 8)
    assert alone.isfinite().all()
    seen: list[torch.Tensor] = []
    hook = ours.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ours.generate(PROMPT, **given)
    hook.remove()
    grey = ours.encode_image(torch.zeros(1, 3, 64, 64))
    assert torch.equal(seen[0][..., 4], torch.ones(2, 8, 8)), "the mask is not white"
    oracle.assert_close(seen[0][:1, ..., 5:], oracle.nhwc(grey), 1e-5, "the masked image")


def test_what_an_inpainting_checkpoint_sees_reaches_a_captured_step(inpainting_model: Path) -> None:
    plain, ours = (fastsd.Pipeline(inpainting_model, device="cpu", backend="reference") for _ in range(2))
    ours.graphs = Graphs(StandIn(), 10_000)
    ours._denoiser = Denoiser(ours.unet, ours.ops, ours.graphs)
    given: dict[str, Any] = {"num_inference_steps": 2, "seed": 4, "output_type": "latent", "height": 64, "width": 64}
    with_mask = {"image": picture(), "mask_image": half_mask()}
    for change in ({}, {}, with_mask, {}):  # eager, captured, replayed
        expected = plain.generate(PROMPT, **given, **change).images
        assert torch.equal(ours.generate(PROMPT, **given, **change).images, expected), f"stale: {list(change)}"


@pytest.mark.parametrize("mode", PIPELINES)
def test_sd1_and_sd2_style_models(random_model: Path, mode: str) -> None:
    given: dict[str, Any] = {"image": picture(128, 128), "strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    given |= {"mask_image": half_mask(128, 128)} if mode == "inpaint" else {}
    expected = theirs(random_model, mode)(PROMPT, generator=generators(3), **given).images
    ours = fastsd.Pipeline(random_model, device="cpu", backend="reference").generate(PROMPT, seed=3, **given).images
    assert_same_picture(ours, expected, mode)


CALLS: dict[str, dict[str, Any]] = {
    "wide": {"image": picture(88, 48)},
    "an odd size": {"image": picture(70, 66)},
    "two images, two prompts": {"prompt": [PROMPT, "a red star"], "image": [picture(), half_mask().convert("RGB")]},
    "one image, two prompts": {"prompt": [PROMPT, "a red star"]},
    "no guidance": {"guidance_scale": 1.0},
    "a small strength": {"strength": 0.26},
    "the default strength": {"strength": None},
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_mean_what_they_mean_in_diffusers(
    pipe: fastsd.Pipeline, their_pipes: dict[str, Any], case: str
) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "image": picture(), "strength": 0.5, "num_inference_steps": 4}
    given |= {"output_type": "np"} | CALLS[case]
    seeds = (7, 8) if isinstance(given["prompt"], list) else (7,)
    given = {name: value for name, value in given.items() if value is not None}
    expected = with_scheduler(their_pipes["img2img"], "ddim", "uniform")(generator=generators(*seeds), **given).images
    ours = pipe.generate(seed=7, sampler="ddim", **given)
    assert ours.seeds == list(seeds)
    assert_same_picture(ours.images, expected, case)


@pytest.mark.parametrize("mode", PIPELINES)
def test_one_generator_for_a_batch_draws_as_in_diffusers(
    pipe: fastsd.Pipeline, their_pipes: dict[str, Any], mode: str
) -> None:
    """One sample of the one image's latents, then noise for two, and what the steps add after that."""
    given: dict[str, Any] = {"image": picture(), "strength": 0.6, "num_inference_steps": 4, "output_type": "np"}
    given |= {"num_images_per_prompt": 2}
    given |= {"mask_image": half_mask(), "height": 64, "width": 64} if mode == "inpaint" else {}
    expected = with_scheduler(their_pipes[mode], "euler_ancestral", "uniform")(
        PROMPT, generator=torch.Generator().manual_seed(9), **given
    ).images
    ours = pipe.generate(PROMPT, generator=torch.Generator().manual_seed(9), sampler="euler_ancestral", **given)
    assert_same_picture(ours.images, expected, mode)


def test_latents_for_an_image(pipe: fastsd.Pipeline, their_pipes: dict[str, Any]) -> None:
    latents = pipe.encode_image(picture(), seed=2)
    given: dict[str, Any] = {"image": latents, "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    expected = with_scheduler(their_pipes["img2img"], "ddim", "uniform")(PROMPT, generator=generators(7), **given)
    ours = pipe.generate(PROMPT, seed=7, sampler="ddim", **given)
    assert_same_picture(ours.images, expected.images, "latents")


BOXES = {"a corner": (0, 0, 9, 30), "the middle": (30, 20, 50, 60), "wide": (2, 40, 95, 50), "a pixel": (70, 9, 71, 10)}


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
@pytest.mark.parametrize("box", BOXES)
def test_the_part_to_paint_is_diffusers(box: str, size: tuple[int, int], padding: int) -> None:
    mask = Image.new("L", (96, 72))
    mask.paste(255, BOXES[box])
    processor = diffusers.image_processor.VaeImageProcessor
    assert masks.crop_region(mask, *size, padding) == processor.get_crop_region(mask, *size, pad=padding)


def test_painting_a_part_alone(pipe: fastsd.Pipeline, their_pipes: dict[str, Any]) -> None:
    """padding_mask_crop: the part is enlarged to the model's size, painted and put back; the rest does not change by a bit."""
    whole, mask = picture(96, 80), Image.new("L", (96, 80))
    mask.paste(255, (40, 30, 60, 52))
    given: dict[str, Any] = {"image": whole, "mask_image": mask, "padding_mask_crop": 4, "num_inference_steps": 4}
    expected = with_scheduler(their_pipes["inpaint"], "ddim", "uniform")(PROMPT, generator=generators(6), **given)
    ours = pipe.generate(PROMPT, seed=6, sampler="ddim", **given).images[0]
    assert ours.size == (96, 80)
    assert_same_picture(as_floats(ours), as_floats(expected.images[0]), "a part")
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(ours)[kept], np.asarray(whole)[kept]), "a pixel outside the mask has changed"
    assert not np.array_equal(np.asarray(ours), np.asarray(whole)), "nothing was painted"


# As in diffusers they go on with the history of a walk that was never taken, or a level off: see their docstrings.
CARELESS_BEGINNERS = ("plms", "lms")


# PLMS mixes raw outputs of several levels, which for v is not what any of them means.
WALKS = [(sampler, "epsilon") for sampler in SAMPLERS]
WALKS += [(sampler, "v_prediction") for sampler in SAMPLERS if sampler != "plms"]


@pytest.mark.parametrize(("sampler", "prediction"), WALKS)
def test_the_noise_levels_are_those_the_table_walks(sampler: str, prediction: str) -> None:
    """What an image is noised with at each step, for every schedule, is what the state holds if the UNet is always right."""
    noise = NoiseSchedule.from_config(sampler_cases.SD15 | {"prediction_type": prediction})
    for schedule in SAMPLERS[sampler].schedules:
        for strength in (1.0,) if sampler in CARELESS_BEGINNERS else (1.0, 0.5):
            table = make_table(noise, 12, sampler, schedule, strength=strength)
            levels = table.noise_levels(noise)
            error = np.abs(walked(table, levels[0], prediction) - levels[1:-1]) / np.maximum(levels[1:-1], 1.0)
            assert len(error) >= 5
            assert error.max() < NOISE_LEVEL, f"{sampler}, {schedule}, strength {strength}: {error.max():.1e}"


def walked(table: Table, level: np.ndarray, prediction: str) -> np.ndarray:
    """[n-1, 2]: shares of image and noise in state[0] after each step but the last, from their shares before the first.

    Slots are vectors over (image, the first noise, each step's noise); the UNet sees the image and what else is there.
    """
    n = len(table)
    slots = np.zeros((table.state_size, 2 + n))
    slots[0, :2] = level
    image, reached = np.eye(1, 2 + n)[0], []
    for i in range(n - 1):
        seen = table.model_input[i] @ slots
        share, rest = seen[0], np.linalg.norm(seen[1:])
        eps = np.append(0.0, seen[1:] / rest)
        out = eps if prediction == "epsilon" else share * eps - rest * image
        slots = table.update[i] @ np.stack([*slots, out, np.eye(2 + n)[2 + i]])
        reached.append((slots[0, 0], np.linalg.norm(slots[0, 1:])))
    return np.array(reached)
