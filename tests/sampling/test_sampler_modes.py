"""Image-to-image and inpainting, step by step against the diffusers schedulers as its pipelines drive them, in float64.

A walk begins at any of its steps with an image noised to that level; and after each UNet call the part that is kept becomes the
image, noised to the level that the next call is told. That level is the question in the middle of a step of two calls.
"""

import importlib

import numpy as np
import pytest
import torch

from fastsd.sampling import NoiseSchedule, make_table
from tests.measured import measured
from tests.sampling.sampler_cases import SD15, SD21
from tests.sampling.test_sampler_parity import (
    LATENTS,
    NOISES,
    OFFSETS,
    TWIN_OPTIONS,
    WALKS_WITH_TWIN,
    compute_in_float64,
    fake_model,
    twin,
)
from tests.tolerances import SAMPLER_FP64, SAMPLER_FP64_LCM

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

IMAGE = 0.5 * OFFSETS[-1]
MASK = np.broadcast_to(np.arange(LATENTS.shape[-1]) % 2, LATENTS.shape).copy()  # 1: painted
STEPS = 7
TWO_CALLS = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde")


def walk(table, noise, mask):
    """The latents after each row; mask None: nothing is kept."""
    levels = table.noise_levels(noise)
    state = np.zeros((table.state_size, *IMAGE.shape))
    state[0] = levels[0, 0] * IMAGE + levels[0, 1] * LATENTS
    reached = []
    for i, timestep in enumerate(table.timesteps):
        out = fake_model(np.tensordot(table.model_input[i], state, axes=1), timestep, i)
        state = np.tensordot(table.update[i], np.stack([*state, out, NOISES[i]]), axes=1)
        if mask is not None:
            kept = levels[i + 1, 0] * IMAGE + levels[i + 1, 1] * LATENTS
            state[0] = mask * state[0] + (1 - mask) * kept
        reached.append(state[0])
    return reached


def walk_of_twin(scheduler, strength, timesteps, mask, monkeypatch):
    """The same as StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline do it."""
    reached = []
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(NOISES[len(reached)]))
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: torch.from_numpy(NOISES[len(reached)])
    begin = max(STEPS - int(STEPS * strength), 0) * scheduler.order
    stops = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    image, noise = torch.from_numpy(IMAGE), torch.from_numpy(LATENTS)
    x = scheduler.add_noise(image, noise, stops[:1])
    for i, stop in enumerate(stops):
        out = torch.from_numpy(fake_model(scheduler.scale_model_input(x, stop).double().numpy(), timesteps[i], i))
        x = scheduler.step(out, stop, x).prev_sample
        if mask is not None:
            kept = scheduler.add_noise(image, noise, stops[i + 1 : i + 2]) if i < len(stops) - 1 else image
            x = torch.from_numpy(mask) * x + (1 - torch.from_numpy(mask)) * kept
        reached.append(x.double().numpy())
    return reached


def compared(sampler, schedule, config, strength, mask, monkeypatch, correct=lambda scheduler: None):
    """The largest relative error of a walk; `correct` mends the twin."""
    compute_in_float64(sampler, monkeypatch)
    scheduler = twin(sampler, config, **TWIN_OPTIONS[schedule])
    scheduler.set_timesteps(STEPS)
    correct(scheduler)
    noise = NoiseSchedule.from_config(config)
    table = make_table(noise, STEPS, sampler, schedule, strength=strength)
    expected = walk_of_twin(scheduler, strength, table.timesteps, mask, monkeypatch)
    ours = walk(table, noise, mask)
    assert len(ours) == len(expected)
    return max(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in zip(ours, expected, strict=True))


def assert_same(error, sampler):
    tolerance = SAMPLER_FP64_LCM if sampler == "lcm" else SAMPLER_FP64
    measured("relative error", error, tolerance)
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(("sampler", "schedule"), WALKS_WITH_TWIN)
def test_image_to_image_equals_diffusers(sampler, schedule, strength, monkeypatch):
    config = SD15 if schedule == "uniform" else SD21
    assert_same(compared(sampler, schedule, config, strength, None, monkeypatch), sampler)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(("sampler", "schedule"), [w for w in WALKS_WITH_TWIN if w[0] not in ("dpm2", "dpmpp_sde")])
def test_inpainting_equals_diffusers(sampler, schedule, strength, monkeypatch):
    """Heun's second call is at the end of the step; DPM2 ancestral's middle, sqrt(σ σ_down), is σ' too."""
    assert_same(compared(sampler, schedule, SD15, strength, MASK, monkeypatch), sampler)


def middle_level(scheduler):
    """What diffusers' add_noise would have to do in the middle of a step: noise to the level that scale_model_input undoes."""
    theirs = type(scheduler).add_noise

    def add_noise(image, noise, timesteps):
        if scheduler.state_in_first_order:
            return theirs(scheduler, image, noise, timesteps)
        if hasattr(scheduler, "mid_point_sigma"):
            return image + noise * scheduler.mid_point_sigma
        return image + noise * scheduler.sigmas_interpol[scheduler.step_index]

    scheduler.add_noise = add_noise


@pytest.mark.parametrize("schedule", ["uniform", "karras"])
@pytest.mark.parametrize("sampler", ["dpm2", "dpmpp_sde"])
def test_in_the_middle_of_a_step_the_kept_part_has_the_level_of_the_rest(sampler, schedule, monkeypatch):
    """diffusers noises it to the level at the step's end there, below that of the painted part, and tells the UNet the middle
    one for both. With that mended it does what we do; as it is, the two are far apart."""
    given = (sampler, schedule, SD15, 0.6, MASK)
    assert_same(compared(*given, monkeypatch, middle_level), sampler)
    monkeypatch.undo()
    assert compared(*given, monkeypatch) > 1e-2, "diffusers has mended its add_noise: compare with it as it is"


@pytest.mark.parametrize("schedule", ["uniform", "karras"])
@pytest.mark.parametrize("sampler", TWO_CALLS)
def test_the_kept_parts_level_is_the_one_that_the_unet_is_told(sampler, schedule):
    """At each call what is kept, scaled as the UNet sees it, is the image and noise of unit variance, as in training."""
    noise = NoiseSchedule.from_config(SD15)
    table = make_table(noise, STEPS, sampler, schedule)
    levels = table.noise_levels(noise)[:-1] * table.model_input[:, :1]
    alpha_bars = np.exp(np.interp(table.timesteps, np.arange(1000), np.log(noise.alphas_cumprod)))
    np.testing.assert_allclose((levels**2).sum(1), 1.0, rtol=1e-12)
    # DPM2's timesteps of a Karras schedule are rounded, and σ between timesteps is linear in σ or in log σ.
    np.testing.assert_allclose(levels[:, 0] ** 2, alpha_bars, rtol=3e-2)
