"""Every sampler against its diffusers twin, step by step: timesteps, what the UNet sees, latents."""

import importlib
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from fastsd.sampling import SAMPLERS, NoiseSchedule, make_table
from tests.sampling.sampler_cases import CONFIGS, SD15, WALKS, run_table
from tests.tolerances import SAMPLER, SAMPLER_FP64, TIMESTEP

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

STEPS = (1, 2, 3, 5, 10, 20, 50, 100)
SHAPE = (2, 4, 3, 5)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE)
NOISES = np.random.default_rng(1).standard_normal((128, *SHAPE))
OFFSETS = np.random.default_rng(2).standard_normal((128, *SHAPE))

TWINLESS = ("euler_ancestral", "karras")  # diffusers' class has no such option
WALKS_WITH_TWIN = [walk for walk in WALKS if walk != TWINLESS]


def fake_model(x, timestep, call):
    """Smooth, nonlinear, and dependent on everything a UNet depends on, so that a slip at one step shows in all later.

    Its slope is below 1, or rounding errors would grow by exp(slope * 3.4) on the way from σ 14.6 to 0 and drown slips.
    """
    return 0.5 * np.sin(x + timestep / 300) + 0.5 * OFFSETS[call]


def twin(sampler, config, float64=False, **options):
    """The diffusers scheduler, with what StableDiffusionPipeline forces (clip_sample off, no Runge-Kutta steps)."""
    scheduler_class = getattr(diffusers, SAMPLERS[sampler].diffusers_class)
    forced = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False}, "plms": {"skip_prk_steps": True}}
    scheduler = scheduler_class.from_config(config, **forced.get(sampler, {}), **options)
    if float64:
        scheduler.alphas_cumprod = torch.from_numpy(NoiseSchedule.from_config(config).alphas_cumprod)
        ends_at_one = sampler != "ddpm" and scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = torch.tensor(1.0) if ends_at_one else scheduler.alphas_cumprod[0]
    return scheduler


def run_twin(scheduler, monkeypatch, **step_options):
    """(initial scale, what the UNet saw, the latents after): as `run_table`, on the same latents and noises."""
    seen, reached = [], []
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(NOISES[len(reached)]))
    scale = float(scheduler.init_noise_sigma)
    x = torch.from_numpy(LATENTS) * scale
    for i, timestep in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, timestep)
        seen.append(x_in.double().numpy())
        out = torch.from_numpy(fake_model(seen[-1], float(timestep), i))
        x = scheduler.step(out, timestep, x, **step_options).prev_sample
        reached.append(x.double().numpy())
    return scale, seen, reached


def assert_same(table, scheduler, monkeypatch, tolerance=SAMPLER, **step_options):
    assert len(table) == len(scheduler.timesteps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.double(), rtol=0, atol=TIMESTEP)
    scale, twin_seen, twin_reached = run_twin(scheduler, monkeypatch, **step_options)
    assert table.initial_scale == pytest.approx(scale, rel=tolerance)
    seen, reached = run_table(table, LATENTS, fake_model, NOISES)
    for step in range(len(table)):
        for what, ours, theirs in (("input", seen, twin_seen), ("latents", reached, twin_reached)):
            error = np.abs(ours[step] - theirs[step]).max() / max(1.0, np.abs(theirs[step]).max())
            assert error <= tolerance, (
                f"{what} of step {step} of {len(table)}: relative error {error:.1e} > {tolerance}"
            )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("sampler", "schedule"), WALKS_WITH_TWIN)
def test_equals_diffusers(sampler, schedule, config, steps, monkeypatch):
    options = {"use_karras_sigmas": True} if schedule == "karras" else {}
    scheduler = twin(sampler, config, **options)
    scheduler.set_timesteps(steps)
    table = make_table(NoiseSchedule.from_config(config), steps, sampler, schedule)
    assert_same(table, scheduler, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0), ("plms", 0.0)]
)
def test_equals_diffusers_in_float64(sampler, eta, config, steps, monkeypatch):
    scheduler = twin(sampler, config, float64=True)
    scheduler.set_timesteps(steps)
    table = make_table(NoiseSchedule.from_config(config), steps, sampler, eta=eta)
    assert_same(table, scheduler, monkeypatch, SAMPLER_FP64, **({"eta": eta} if sampler == "ddim" else {}))


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "euler"])  # the twins that take it
def test_sample_prediction_equals_diffusers(sampler, steps, monkeypatch):
    config = {**SD15, "prediction_type": "sample"}
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(steps)
    assert_same(make_table(NoiseSchedule.from_config(config), steps, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"steps_offset": 0, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
        {"beta_schedule": "linear"},
        {"trained_betas": np.linspace(1e-4, 0.03, 500).tolist(), "num_train_timesteps": 500},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [6, 16])  # DPM-Solver treats fewer than 15 steps differently
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_config_options_equal_diffusers(sampler, steps, change, monkeypatch):
    config = {**SD15, **change}
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(steps)
    assert_same(make_table(NoiseSchedule.from_config(config), steps, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bare_config_has_the_class_defaults(sampler, monkeypatch):
    """Linear betas from 1e-4 to 0.02, and each class's own spacing and set_alpha_to_one."""
    scheduler = twin(sampler, {})
    scheduler.set_timesteps(10)
    assert_same(make_table(NoiseSchedule.from_config({}), 10, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_checkpoint_that_asks_for_karras_gets_what_diffusers_gives(sampler, monkeypatch):
    """euler_ancestral's class has no such option: it stays uniform."""
    config = {**SD15, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(12)
    assert_same(make_table(NoiseSchedule.from_config(config), 12, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "euler"])
def test_chosen_timesteps_equal_diffusers(sampler, monkeypatch):
    timesteps = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    scheduler = twin(sampler, SD15)
    scheduler.set_timesteps(timesteps=timesteps)
    table = make_table(NoiseSchedule.from_config(SD15), 50, sampler, timesteps=timesteps)
    assert table.schedule == "custom"
    assert_same(table, scheduler, monkeypatch)


@pytest.mark.parametrize("change", [{}, {"timestep_spacing": "leading"}, {"final_sigmas_type": "sigma_min"}], ids=str)
def test_chosen_sigmas_equal_diffusers(change, monkeypatch):
    sigmas = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    noise = NoiseSchedule.from_config({**SD15, **change})
    for given in (sigmas, sigmas[:-1]):  # the final 0 may be left out
        scheduler = twin("euler", {**SD15, **change})
        scheduler.set_timesteps(sigmas=sigmas)
        assert_same(make_table(noise, 50, "euler", sigmas=given), scheduler, monkeypatch)


@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_spacing_has_no_step_too_many(steps):
    """diffusers' arange overshoots at 62 of 1000 step counts and ends on timestep -1; the others are the same."""
    config = CONFIGS["sd15-trailing"]
    scheduler = twin("ddim", config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[-1] == -1
    table = make_table(NoiseSchedule.from_config(config), steps, "ddim")
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps[:-1])


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("config", [CONFIGS["sd15"], CONFIGS["sd21"]], ids=["epsilon", "v_prediction"])
def test_euler_ancestral_karras_equals_the_published_algorithm(config, steps):
    """k-diffusion's sample_euler_ancestral on get_sigmas_karras, written out; diffusers has no twin."""
    noise = NoiseSchedule.from_config(config)
    table = make_table(noise, steps, "euler_ancestral", "karras")
    train_sigmas = np.sqrt(1 / noise.alphas_cumprod - 1)
    highest = train_sigmas[-1] if steps > 1 else train_sigmas[0]  # linspace spacing of one step is timestep 0
    ramp = np.arange(steps) / max(steps - 1, 1)
    sigmas = [*(highest ** (1 / 7) * (1 - ramp) + train_sigmas[0] ** (1 / 7) * ramp) ** 7, 0.0]

    x, expected = LATENTS * sigmas[0], []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        timestep = np.interp(np.log(sigma), np.log(train_sigmas), np.arange(1000))
        scale = 1 / np.sqrt(1 + sigma**2)
        out = fake_model(x * scale, timestep, i)
        is_v = noise.prediction_type == "v_prediction"
        denoised = x * scale**2 - sigma * scale * out if is_v else x - sigma * out
        sigma_up = np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        sigma_down = np.sqrt(sigma_next**2 - sigma_up**2)
        x = x + (x - denoised) / sigma * (sigma_down - sigma) + NOISES[i] * sigma_up
        expected.append(x)

    _, reached = run_table(table, LATENTS, fake_model, NOISES)
    np.testing.assert_allclose(reached, expected, rtol=1e-9, atol=1e-9)
