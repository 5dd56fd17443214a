"""Whole pictures against diffusers' StableDiffusionPipeline: same weights, same seeds, fp32."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fastsd
from tests import oracle
from tests.oracle import assert_same_picture
from tests.tolerances import NET

PROMPT = "a green triangle above an orange ring on a black background"

# Every sampler and schedule that diffusers has, as diffusers names it.
SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}, {}),
    "ddim, eta 0.7": ("DDIMScheduler", {}, {"eta": 0.7}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, {}),
    "dpmpp_2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
}


def with_scheduler(
    pipe: diffusers.StableDiffusionPipeline, name: str, options: dict[str, Any]
) -> diffusers.StableDiffusionPipeline:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("case", SAMPLERS)
def test_every_sampler_on_the_trained_model(pipe: fastsd.Pipeline, small_model: Path, case: str) -> None:
    """The noise is the same too: image i draws latents and step noise from its own generator in diffusers' order."""
    scheduler, options, arguments = SAMPLERS[case]
    sampler, _, schedule = case.split(",")[0].partition(" ")
    theirs = with_scheduler(oracle.load_pipeline(small_model), scheduler, options)
    expected = theirs(PROMPT, num_inference_steps=20, generator=generators([11]), output_type="np", **arguments)
    ours = pipe.generate(
        PROMPT,
        num_inference_steps=20,
        seed=11,
        sampler=sampler,
        schedule=schedule or None,
        output_type="np",
        **arguments,
    )
    assert_same_picture(ours.images, expected.images, case)


@pytest.mark.parametrize("sampler", [None, "euler"])
def test_sd1_and_sd2_style_models(random_model: Path, sampler: str | None) -> None:
    """Both prediction types, both projections, both text encoders; the checkpoint's own sampler and another."""
    theirs = oracle.load_pipeline(random_model)
    if sampler:
        with_scheduler(theirs, "EulerDiscreteScheduler", {})
    ours = fastsd.Pipeline(random_model, device="cpu", backend="reference")
    expected = theirs(PROMPT, num_inference_steps=6, generator=generators([3]), output_type="latent").images
    latents = ours.generate(PROMPT, num_inference_steps=6, seed=3, sampler=sampler, output_type="latent").images
    oracle.assert_close(latents, expected, 50 * NET, "latents after 6 steps")
    picture = theirs(PROMPT, num_inference_steps=6, generator=generators([3]), output_type="np").images
    assert_same_picture(
        ours.generate(PROMPT, num_inference_steps=6, seed=3, sampler=sampler, output_type="np").images,
        picture,
        "picture",
    )


CALLS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a purple star", "guidance_scale": 4.0},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "wide": {"height": 48, "width": 88},
    "odd latents": {"height": 72, "width": 64},
    "empty prompt": {"prompt": ""},
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_mean_what_they_mean_in_diffusers(
    pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline, case: str
) -> None:
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "np"} | CALLS[case]
    expected = diffusers_pipe(**arguments, generator=generators([5])).images
    ours = pipe.generate(**arguments, seed=5).images
    assert_same_picture(ours, expected, case)


def test_prompts_and_images_a_prompt_stand_as_in_diffusers(
    pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline
) -> None:
    prompts = [PROMPT, "a small blue heart on the left on a gray background"]
    arguments: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 4, "output_type": "np"}
    negatives = ["a moon", "a ring"]
    expected = diffusers_pipe(
        prompts, negative_prompt=negatives, generator=generators([1, 2, 3, 4]), **arguments
    ).images
    result = pipe.generate(prompts, negatives, seed=1, **arguments)
    assert result.seeds == [1, 2, 3, 4]
    for index in range(4):
        assert_same_picture(result.images[index], expected[index], f"image {index}")


def test_clip_skip_as_in_diffusers(pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline) -> None:
    """diffusers 0.42 fails at clip_skip with transformers 5 (it asks for `.text_model`), so its embeddings are made here."""
    encoder, embeds = diffusers_pipe.text_encoder, []
    for text in (PROMPT, ""):
        ids = diffusers_pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            embeds.append(encoder.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-2]))
    common: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    expected = diffusers_pipe(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=generators([5]), **common
    ).images
    ours = pipe.generate(PROMPT, clip_skip=1, seed=5, **common).images
    assert_same_picture(ours, expected, "clip_skip 1")
    assert oracle.psnr(pipe.generate(PROMPT, seed=5, **common).images, expected) < 50, "clip_skip changes nothing"


def test_latents_embeds_and_generator_as_in_diffusers(
    pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline
) -> None:
    """What a diffusers user hands over may be handed over here: NCHW latents, embeddings, one generator for a batch."""
    embeds, negative = diffusers_pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, True, "a star")
    common: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_images_per_prompt": 2}
    expected = diffusers_pipe(**given, generator=torch.Generator().manual_seed(8), **common).images
    ours = pipe.generate(**given, generator=torch.Generator().manual_seed(8), **common)
    assert ours.seeds is None
    assert_same_picture(ours.images, expected, "embeddings and one generator")

    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    expected = diffusers_pipe(PROMPT, latents=latents, **common).images
    assert_same_picture(pipe.generate(PROMPT, latents=latents, **common).images, expected, "latents")


@torch.inference_mode()
def test_encode_and_decode_equal_diffusers(
    pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline
) -> None:
    vae, scale = diffusers_pipe.vae, diffusers_pipe.vae.config.scaling_factor
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    distribution = vae.encode(image).latent_dist
    oracle.assert_close(pipe.encode_image(image), distribution.mean * scale, NET, "mean latents")
    noise = torch.stack([torch.randn(4, 16, 16, generator=one) for one in generators([7, 8])])
    sample = (distribution.mean + distribution.std * noise) * scale
    oracle.assert_close(pipe.encode_image(image, seed=7), sample, NET, "sampled latents")
    decoded = (vae.decode(sample / scale).sample / 2 + 0.5).clamp(0, 1)
    oracle.assert_close(pipe.decode_latents(sample, output_type="pt"), decoded, NET, "decoded image")
