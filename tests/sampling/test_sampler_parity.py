"""Every sampler against its diffusers twin, step by step: timesteps, what the UNet sees, latents."""

import importlib
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from fastsd.sampling import SAMPLERS, NoiseSchedule, make_table
from tests.measured import measured
from tests.sampling.sampler_cases import CONFIGS, SD15, WALKS, run_table
from tests.tolerances import (
    SAMPLER,
    SAMPLER_CANCELLING,
    SAMPLER_FP64,
    SAMPLER_FP64_LCM,
    TIMESTEP,
    TIMESTEP_OF_MIDDLE,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

STEPS = (1, 2, 3, 5, 10, 20, 50, 100)
FEW_STEPS = (1, 2, 3, 8, 25)
SHAPE = (2, 4, 3, 5)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE)
NOISES = np.random.default_rng(1).standard_normal((256, *SHAPE))
OFFSETS = np.random.default_rng(2).standard_normal((256, *SHAPE))

TWIN_OPTIONS = {
    "uniform": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}


def has_twin(sampler, schedule):
    """Euler ancestral's class has no options for schedules; "simple" and "align_your_steps" are not diffusers'."""
    known = ("uniform", "sgm_uniform") if sampler == "euler_ancestral" else TWIN_OPTIONS
    return bool(SAMPLERS[sampler].diffusers_class) and schedule in known


WALKS_WITH_TWIN = [walk for walk in WALKS if has_twin(*walk)]
TWINS = [info.id for info in SAMPLERS.values() if info.diffusers_class]


def fake_model(x, timestep, call):
    """Smooth, nonlinear, and dependent on everything a UNet depends on, so that a slip at one step shows in all later.

    Its slope is below 1, or rounding errors would grow by exp(slope * 3.4) on the way from σ 14.6 to 0 and drown slips.
    """
    return 0.5 * np.sin(x + timestep / 300) + 0.5 * OFFSETS[call]


def twin(sampler, config, **options):
    """The diffusers scheduler, with what StableDiffusionPipeline forces (clip_sample off, no Runge-Kutta steps)."""
    info = SAMPLERS[sampler]
    forced = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False}, "plms": {"skip_prk_steps": True}}
    options = {**info.diffusers_options, **forced.get(sampler, {}), **options}
    scheduler_class = getattr(diffusers, info.diffusers_class)
    set_timesteps = scheduler_class.set_timesteps
    # Some constructors begin with all training timesteps, which takes half a second; two do.
    with mock.patch.object(scheduler_class, "set_timesteps", lambda self, _, *rest: set_timesteps(self, 2, *rest)):
        return scheduler_class.from_config(config, **options)


def compute_in_float64(sampler, monkeypatch):
    """diffusers writes float32 wherever it makes a table: from here on its module of this sampler reads that as float64."""
    module = importlib.import_module(getattr(diffusers, SAMPLERS[sampler].diffusers_class).__module__)
    monkeypatch.setattr(module, "np", SimpleNamespace(**{**vars(np), "float32": np.float64}))
    monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "float32": torch.float64}))


def run_twin(scheduler, timesteps, monkeypatch, **step_options):
    """(initial scale, what the UNet saw, the latents after): as `run_table`, on the same latents, noises and timesteps."""
    seen, reached = [], []
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(NOISES[len(reached)]))
    if hasattr(scheduler, "noise_sampler"):  # for DPM++ SDE's Brownian path, whose two noises of a step depend
        scheduler.noise_sampler = lambda *_: torch.from_numpy(NOISES[len(reached)])
    # The pipeline does not say so, and then a second step of the same timestep is taken for the first (exponential and beta).
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    scale = float(scheduler.init_noise_sigma)
    x = torch.from_numpy(LATENTS) * scale
    for i, timestep in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, timestep)
        seen.append(x_in.double().numpy())
        out = torch.from_numpy(fake_model(seen[-1], timesteps[i], i))
        x = scheduler.step(out, timestep, x, **step_options).prev_sample
        reached.append(x.double().numpy())
    return scale, seen, reached


def assert_same(table, scheduler, monkeypatch, tolerance=None, timestep=None, **step_options):
    if tolerance is None:
        tolerance = SAMPLER_CANCELLING if table.sampler in ("deis", "unipc", "dpm2_ancestral") else SAMPLER
    if timestep is None:
        timestep = TIMESTEP_OF_MIDDLE if table.sampler == "dpm2_ancestral" else TIMESTEP
    assert len(table) == len(scheduler.timesteps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.double(), rtol=0, atol=timestep)
    scale, twin_seen, twin_reached = run_twin(scheduler, table.timesteps, monkeypatch, **step_options)
    assert table.initial_scale == pytest.approx(scale, rel=tolerance)
    seen, reached = run_table(table, LATENTS, fake_model, NOISES)
    for step in range(len(table)):
        for what, ours, theirs in (("input", seen, twin_seen), ("latents", reached, twin_reached)):
            error = np.abs(ours[step] - theirs[step]).max() / max(1.0, np.abs(theirs[step]).max())
            measured("relative error", error, tolerance)
            assert error <= tolerance, (
                f"{what} of step {step} of {len(table)}: relative error {error:.1e} > {tolerance}"
            )


# Every config with uniform spacing; the other schedules are made of its levels. Both predictions are below, in float64.
CASES = [(*walk, name) for walk in WALKS_WITH_TWIN for name in CONFIGS if walk[1] == "uniform" or name == "sd21"]


@pytest.mark.parametrize(("sampler", "schedule", "config"), CASES)
def test_equals_diffusers(sampler, schedule, config, monkeypatch):
    scheduler = twin(sampler, CONFIGS[config], **TWIN_OPTIONS[schedule])
    for steps in FEW_STEPS:
        scheduler.set_timesteps(steps)
        table = make_table(NoiseSchedule.from_config(CONFIGS[config]), steps, sampler, schedule)
        assert_same(table, scheduler, monkeypatch)


@pytest.mark.parametrize("config", ["sd15", "sd21"])
@pytest.mark.parametrize(("sampler", "schedule"), WALKS_WITH_TWIN)
def test_equals_diffusers_in_float64(sampler, schedule, config, monkeypatch):
    compute_in_float64(sampler, monkeypatch)
    scheduler = twin(sampler, CONFIGS[config], **TWIN_OPTIONS[schedule])
    # Of DPM-Solver's classes the schedules' timesteps are cut to whole ones, where a last digit decides.
    cut = schedule in ("exponential", "beta") and scheduler.init_noise_sigma == 1.0
    for steps in STEPS if schedule == "uniform" and sampler not in ("lms", "lcm", "tcd") else FEW_STEPS:
        scheduler.set_timesteps(steps)
        table = make_table(NoiseSchedule.from_config(CONFIGS[config]), steps, sampler, schedule)
        tolerance = SAMPLER_FP64_LCM if sampler == "lcm" else SAMPLER_FP64
        assert_same(table, scheduler, monkeypatch, tolerance, 1.0 if cut else 1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("sampler", ["ddim", "tcd"])
def test_eta_equals_diffusers(sampler, config, monkeypatch):
    compute_in_float64(sampler, monkeypatch)
    scheduler = twin(sampler, config)
    for eta in (0.0, 0.3, 0.55, 1.0):
        for steps in FEW_STEPS:
            scheduler.set_timesteps(steps)
            table = make_table(NoiseSchedule.from_config(config), steps, sampler, eta=eta)
            assert_same(table, scheduler, monkeypatch, SAMPLER_FP64, eta=eta)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize(
    "sampler", [s for s in TWINS if s not in ("plms", "dpmpp_sde", "dpm2", "dpm2_ancestral", "euler_ancestral")]
)
def test_sample_prediction_equals_diffusers(sampler, steps, monkeypatch):
    config = {**SD15, "prediction_type": "sample"}
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(steps)
    table = make_table(NoiseSchedule.from_config(config), steps, sampler)
    assert_same(table, scheduler, monkeypatch, SAMPLER_CANCELLING if sampler == "heun" else None)


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
@pytest.mark.parametrize("sampler", TWINS)
def test_config_options_equal_diffusers(sampler, steps, change, monkeypatch):
    config = {**SD15, **change}
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(steps)
    assert_same(make_table(NoiseSchedule.from_config(config), steps, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize("sampler", TWINS)
def test_bare_config_has_the_class_defaults(sampler, monkeypatch):
    """Its betas, its spacing and its set_alpha_to_one."""
    scheduler = twin(sampler, {})
    scheduler.set_timesteps(10)
    noise = NoiseSchedule.from_config({"_class_name": SAMPLERS[sampler].diffusers_class})
    assert_same(make_table(noise, 10, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("sampler", TWINS)
def test_checkpoint_that_asks_for_a_schedule_gets_what_diffusers_gives(sampler, option, monkeypatch):
    """Some classes have no such option: they stay uniform."""
    config = {**SD15, "_class_name": "EulerDiscreteScheduler", option: True}
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(12)
    assert_same(make_table(NoiseSchedule.from_config(config), 12, sampler), scheduler, monkeypatch)


@pytest.mark.parametrize("sampler", [info.id for info in SAMPLERS.values() if info.takes_timesteps])
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


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"])  # the twins that take timesteps
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 64])
def test_simple_schedule_is_the_web_uis_timesteps(sampler, steps, monkeypatch):
    scheduler = twin(sampler, SD15, timestep_spacing="trailing")
    timesteps = [999 - int(i * (1000 / steps)) for i in range(steps)]
    scheduler.set_timesteps(timesteps=timesteps)
    assert_same(make_table(NoiseSchedule.from_config(SD15), steps, sampler, "simple"), scheduler, monkeypatch)


@pytest.mark.parametrize("steps", [1, 4, 10, 11, 25])
def test_align_your_steps_schedule_is_the_published_levels(steps, monkeypatch):
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    sigmas = np.exp(np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, 11), np.log(published)))
    scheduler = twin("euler", SD15, timestep_spacing="trailing")
    scheduler.set_timesteps(sigmas=[*sigmas, 0.0])
    table = make_table(NoiseSchedule.from_config(SD15), steps, "euler", "Align Your Steps")
    assert_same(table, scheduler, monkeypatch)


@pytest.mark.parametrize("sampler", [info.id for info in SAMPLERS.values() if info.zero_snr])
@pytest.mark.parametrize("config", [CONFIGS["sd21-trailing"], CONFIGS["sd21"]], ids=["trailing", "bare"])
def test_zero_terminal_snr_equals_diffusers(sampler, config, monkeypatch):
    config = {**config, "rescale_betas_zero_snr": True}
    compute_in_float64(sampler, monkeypatch)
    scheduler = twin(sampler, config)
    for steps in FEW_STEPS:
        scheduler.set_timesteps(steps)
        table = make_table(NoiseSchedule.from_config(config), steps, sampler)
        assert_same(table, scheduler, monkeypatch, SAMPLER_FP64_LCM if sampler == "lcm" else SAMPLER_FP64)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_a_level_that_rises_equals_diffusers(sampler, monkeypatch):
    """Without fresh noise a step may lead up, from zero terminal SNR's 4096 to what the timesteps next to it have."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    config["beta_end"] = 0.04
    compute_in_float64(sampler, monkeypatch)
    scheduler = twin(sampler, config)
    scheduler.set_timesteps(60)
    assert scheduler.sigmas[1] > scheduler.sigmas[0]
    assert_same(make_table(NoiseSchedule.from_config(config), 60, sampler), scheduler, monkeypatch, SAMPLER_FP64)


@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_spacing_has_no_step_too_many(steps):
    """diffusers' arange overshoots at 62 of 1000 step counts and ends on timestep -1; the others are the same."""
    config = CONFIGS["sd15-trailing"]
    scheduler = twin("ddim", config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[-1] == -1
    table = make_table(NoiseSchedule.from_config(config), steps, "ddim")
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps[:-1])
