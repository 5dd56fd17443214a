"""Every name a user may give a sampler or a schedule, and every error for a wrong argument."""

import re

import numpy as np
import pytest
import torch

from fastsd.errors import ParameterError
from fastsd.sampling import SAMPLERS, NoiseSchedule, canonical_sampler, canonical_schedule, make_table, schedules
from fastsd.sampling.names import SCHEDULE_ALIASES, schedule_label
from fastsd.sampling.schedule import SAMPLER_OF_CLASS
from tests.sampling.sampler_cases import SD15, SMALL

NOISE = NoiseSchedule.from_config(SD15)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # diffusers
        ("PNDMScheduler", ("plms", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("DPMSolverSinglestepScheduler", ("dpmpp_2s", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_ancestral", None)),
        # AUTOMATIC1111
        ("Euler a", ("euler_ancestral", None)),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("Euler a Karras", ("euler_ancestral", "karras")),
        ("DDIM Normal", ("ddim", "uniform")),
        ("k_euler_a", ("euler_ancestral", None)),
        ("DPM++ 2M SDE Karras", ("dpmpp_2m_sde", "karras")),
        ("DPM++ 3M SDE Exponential", ("dpmpp_3m_sde", "exponential")),
        ("DPM++ 2S a", ("dpmpp_2s_ancestral", None)),
        ("DPM++ 2M SDE Heun Exponential", ("dpmpp_2m_sde_heun", "exponential")),
        ("k_dpmpp_2m_sde_ka", ("dpmpp_2m_sde", "karras")),
        ("k_dpmpp_3m_sde_exp", ("dpmpp_3m_sde", "exponential")),
        ("k_dpm_2_a_ka", ("dpm2_ancestral", "karras")),
        ("DPM2 a Karras", ("dpm2_ancestral", "karras")),
        ("Heun SGM Uniform", ("heun", "sgm_uniform")),
        ("Euler Align Your Steps", ("euler", "align_your_steps")),
        ("UniPC Beta", ("unipc", "beta")),
        # k-diffusion
        ("sample_dpm_2", ("dpm2", None)),
        ("sample_dpm_2_ancestral", ("dpm2_ancestral", None)),
        ("sample_lms", ("lms", None)),
        ("dpmpp_sde", ("dpmpp_sde", None)),
        ("euler_ancestral", ("euler_ancestral", None)),
        ("dpmpp_2m", ("dpmpp_2m", None)),
        ("sample_dpmpp_2m", ("dpmpp_2m", None)),
        ("sample_euler_ancestral", ("euler_ancestral", None)),
        # CompVis
        ("plms", ("plms", None)),
        ("dpm_solver", ("dpmpp_2m", None)),
        # spelling
        ("  EULER-A ", ("euler_ancestral", None)),
        ("dpm++ 2m karras", ("dpmpp_2m", "karras")),
    ],
)
def test_names_of_other_programs(name, expected):
    assert canonical_sampler(name) == expected


def test_each_name_means_one_sampler():
    for info in SAMPLERS.values():
        own_class = (info.diffusers_class,) if info.diffusers_class and not info.diffusers_options else ()
        for name in (info.id, info.label, *own_class, *info.aliases):
            assert canonical_sampler(name) == (info.id, None)
            assert canonical_sampler(f"{name} Karras") == (info.id, "karras")
            assert canonical_sampler(name.upper()) == (info.id, None)
    named = ("uniform", "karras", "exponential", "sgm_uniform", "simple", "beta", "align_your_steps")
    assert schedules() == named
    assert [schedule_label(name) for name in named[-4:]] == ["SGM Uniform", "Simple", "Beta", "Align Your Steps"]
    assert all(canonical_schedule(schedule_label(name)) == name for name in named)
    for schedule, aliases in SCHEDULE_ALIASES.items():
        for name in (schedule, schedule.title(), *aliases):
            assert canonical_schedule(name) == schedule


def test_the_two_lists_of_diffusers_classes_agree():
    whole = [info for info in SAMPLERS.values() if info.diffusers_class and not info.diffusers_options]
    assert {info.diffusers_class: info.id for info in whole} == SAMPLER_OF_CLASS


@pytest.mark.parametrize(
    "name", ["euler b", "", "karras", "SASolverScheduler", "++", "Euler a polyexponential", None, 3]
)
def test_unknown_sampler_lists_the_known(name):
    with pytest.raises(
        ParameterError,
        match=r"^sampler: .* is unknown; choose one of ddpm, ddim, plms, dpmpp_2m, dpmpp_2m_sde, ",
    ):
        canonical_sampler(name)


@pytest.mark.parametrize("name", ["polyexponential", "", None, 7])
def test_unknown_schedule_lists_the_known(name):
    with pytest.raises(
        ParameterError, match=r"^schedule: .* is unknown; choose one of uniform, karras, .*beta.*, automatic$"
    ):
        canonical_schedule(name)


def test_defaults_are_the_checkpoints():
    table = make_table(NOISE, 20)
    assert (table.sampler, table.schedule) == ("plms", "uniform")
    assert make_table(NoiseSchedule.from_config(SMALL), 20).sampler == "ddim"
    karras = NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True})
    table = make_table(karras, 20)
    assert (table.sampler, table.schedule) == ("dpmpp_2m", "karras")
    assert make_table(karras, 20, schedule="normal").schedule == "uniform"
    assert make_table(karras, 20, "ddim").schedule == "uniform"
    assert make_table(NOISE, 20, "DPM++ 2M Karras").schedule == "karras"
    assert make_table(NOISE, 20, "DPM++ 2M Karras", "karras").schedule == "karras"


def test_3m_sde_has_the_web_ui_s_schedule():
    """On the uniform one, whose steps in log σ are uneven, its third order overshoots."""
    for schedule in (None, "Automatic", "exponential"):
        assert make_table(NOISE, 20, "DPM++ 3M SDE", schedule).schedule == "exponential"
    assert make_table(NOISE, 20, "DPM++ 3M SDE", "uniform").schedule == "uniform"
    assert make_table(NOISE, 2, "DPM++ 3M SDE", sigmas=[5.0, 1.0]).schedule == "custom"


@pytest.mark.parametrize(
    "steps",
    [0, -1, 1001, 10**30, 10**5000, True, 20.0, "20", None, float("nan")],
    ids=lambda steps: type(steps).__name__,  # Python does not print 5000 digits
)
def test_steps_outside_their_range(steps):
    with pytest.raises(ParameterError, match=r"^num_inference_steps: .* it must be an integer from 1 to 1000$"):
        make_table(NOISE, steps)


def test_dpm_solver_leading_spacing_needs_one_timestep_more_than_steps():
    """diffusers gives NaN here."""
    with pytest.raises(
        ParameterError,
        match=r"^num_inference_steps: 1000 is out of range; with leading spacing this sampler takes at most 999",
    ):
        make_table(NoiseSchedule.from_config(SMALL), 1000, "dpmpp_2m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": -0.1}, "eta: -0.1 is not right; it must be a number from 0 to 1"),
        ({"eta": 1.5}, "eta: 1.5"),
        ({"eta": float("nan")}, "eta: nan"),
        ({"eta": True}, "eta: True"),
        ({"eta": 10**400}, "eta: 1000"),
        ({"eta": 10**5000}, "eta: a huge int"),
        ({"sampler": "plms", "schedule": "karras"}, "schedule: plms .* do: dpmpp_2m, .*euler, euler_ancestral"),
        ({"sampler": "DDIM Karras"}, "schedule: ddim does not take karras"),
        (
            {"sampler": "DPM++ 2M Karras", "schedule": "uniform"},
            "schedule: uniform, but the sampler's name says karras",
        ),
        ({"timesteps": [5], "sigmas": [5.0]}, "timesteps: give either timesteps or sigmas, not both"),
        # what the diffusers classes take
        (
            {"sampler": "plms", "timesteps": [5]},
            "timesteps: plms does not take them.*ddpm, dpmpp_2m, dpmpp_2m_sde, .*, euler",
        ),
        ({"sampler": "ddim", "timesteps": [5]}, "timesteps: ddim does not take them"),
        ({"sampler": "euler a", "timesteps": [5]}, "timesteps: euler_ancestral does not take them"),
        (
            {"sampler": "dpmpp_2m", "sigmas": [5.0]},
            "sigmas: dpmpp_2m does not take them; the samplers that do: .*euler",
        ),
        ({"sampler": "euler", "schedule": "karras", "timesteps": [5]}, "timesteps: exclude the karras schedule"),
        ({"sampler": "euler", "schedule": "karras", "sigmas": [5.0]}, "sigmas: exclude the karras schedule"),
        # values
        ({"sampler": "ddpm", "timesteps": [5, 5]}, "timesteps: .*each smaller than the one before"),
        ({"sampler": "ddpm", "timesteps": [1, 5]}, "timesteps: .*each smaller than the one before"),
        ({"sampler": "ddpm", "timesteps": []}, "timesteps: must be a non-empty list"),
        ({"sampler": "ddpm", "timesteps": 5}, "timesteps: must be a list of finite numbers, not 5"),
        ({"sampler": "ddpm", "timesteps": "900"}, "timesteps: must be a list of finite numbers, not '900'"),
        ({"sampler": "ddpm", "timesteps": ["a"]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": ["900", "3"]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [True, False]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": np.array([True, False])}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [10**400, 3]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [10**5000, 3]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [3j, 1]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": {5, 1}}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [[2], [1]]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [float("inf"), 1]}, "timesteps: must be a list of finite numbers"),
        ({"sampler": "ddpm", "timesteps": [1000, 1]}, r"timesteps: 1000 to 1 is .* must lie in \[0, 1000\)"),
        ({"sampler": "ddpm", "timesteps": [5, -1]}, r"timesteps: .*must lie in \[0, 1000\)"),
        ({"sampler": "dpmpp_2m", "timesteps": [5.5, 1]}, "timesteps: must be whole numbers for dpmpp_2m"),
        ({"sampler": "euler", "sigmas": [3.0, -1.0]}, "sigmas: must lie in"),
        ({"sampler": "euler", "sigmas": [0.0]}, "sigmas: must lie in"),
        ({"sampler": "euler", "sigmas": [1e300, 1.0]}, "sigmas: must lie in"),
        ({"sampler": "euler", "sigmas": [1.0, float("nan")]}, "sigmas: must be a list of finite numbers"),
        ({"sampler": "euler", "sigmas": ["3.0", True]}, "sigmas: must be a list of finite numbers"),
        # a caller's text is shown, but not whole
        ({"sampler": "x" * 100_000}, "sampler: 'xxx"),
        ({"schedule": "\n" * 100_000}, "schedule: "),
        ({"sampler": "ddpm", "timesteps": ["x" * 100_000]}, "timesteps: "),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_arguments(arguments, message):
    """The message begins with the argument's name, which the command line changes to the option's."""
    with pytest.raises(ParameterError, match=f"^{message}") as raised:
        make_table(NOISE, 20, **arguments)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda stops: np.array(stops, np.float32)])
def test_stops_may_be_any_list_of_numbers(kind):
    table = make_table(NOISE, 20, "euler", timesteps=kind([900, 500, 3]))
    assert table.timesteps.tolist() == [900.0, 500.0, 3.0]
    assert make_table(NOISE, 20, "euler", timesteps=range(900, 0, -300)).timesteps.tolist() == [900.0, 600.0, 300.0]


@pytest.mark.parametrize("name", ["Automatic", "automatic", " AUTOMATIC "])
def test_automatic_is_whatever_it_would_be_without(name):
    """What AUTOMATIC1111 writes in most of its images."""
    assert canonical_schedule(name) is None
    karras = NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True})
    assert make_table(karras, 20, schedule=name).schedule == "karras"
    assert make_table(karras, 20, "ddim", name).schedule == "uniform"
    assert make_table(NOISE, 20, "DPM++ 2M Karras", name).schedule == "karras"
    assert make_table(NOISE, 20, "DPM++ 2M", name).schedule == "uniform"


def test_steps_are_not_looked_at_beside_timesteps():
    assert len(make_table(NOISE, 0, "euler", timesteps=[900.5, 500, 3])) == 3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "SASolverScheduler"}, "SASolverScheduler"),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
            "UniPCMultistepScheduler with solver_order = 3",
        ),
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, "DEISMultistepScheduler with solver_order = 3"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
            "DPMSolverMultistepScheduler with solver_order = 3",
        ),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler with skip_prk_steps = False"),  # Runge-Kutta first
        ({"_class_name": "x" * 100_000}, "x" * 120 + "…"),
    ],
)
def test_checkpoint_with_a_sampler_fastsd_has_not(config, named):
    """It loads, and runs with another sampler; only its own is refused."""
    noise = NoiseSchedule.from_config(config)
    with pytest.raises(ParameterError, match=f"^sampler: .*own, {re.escape(named)}; choose one of ddpm, ddim"):
        make_table(noise, 20)
    assert make_table(noise, 20, "euler").sampler == "euler"


def test_checkpoint_with_a_schedule_fastsd_has_not():
    noise = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "use_lu_lambdas": True})
    with pytest.raises(ParameterError, match=r"^schedule: .*own, lu; choose one of uniform, karras"):
        make_table(noise, 20)
    assert make_table(noise, 20, schedule="uniform").schedule == "uniform"
    assert make_table(noise, 20, "ddim").sampler == "ddim"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_class_name": "HeunDiscreteScheduler", "use_exponential_sigmas": True}, ("heun", "exponential")),
        ({"_class_name": "UniPCMultistepScheduler", "use_beta_sigmas": True}, ("unipc", "beta")),
        ({"_class_name": "DEISMultistepScheduler", "use_karras_sigmas": True}, ("deis", "karras")),
        ({"_class_name": "LCMScheduler"}, ("lcm", "uniform")),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_karras_sigmas": True,
            },
            ("dpmpp_2m_sde", "karras"),
        ),
    ],
)
def test_checkpoints_own_sampler_and_schedule(config, expected):
    table = make_table(NoiseSchedule.from_config(config), 20)
    assert (table.sampler, table.schedule) == expected


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_consistency_models_take_no_more_steps_than_they_were_distilled_on(sampler):
    with pytest.raises(ParameterError, match=r"^num_inference_steps: 51 is out of range; .* at most 50$"):
        make_table(NOISE, 51, sampler)
    assert len(make_table(NOISE, 50, sampler)) == 50


def test_zero_terminal_snr_is_for_those_whose_twin_takes_it():
    noise = NoiseSchedule.from_config({**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    for sampler, info in SAMPLERS.items():
        if info.zero_snr:
            assert np.all(np.isfinite(make_table(noise, 8, sampler).update)), sampler
        else:
            with pytest.raises(
                ParameterError, match=rf"^sampler: {sampler} does not take .*zero_snr; .* do: ddpm, ddim"
            ):
                make_table(noise, 8, sampler)


@pytest.mark.parametrize(
    ("sampler", "schedule", "spacing", "most"),
    [
        *((sampler, None, "trailing", 285) for sampler in ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "euler_ancestral")),
        ("dpmpp_2m_sde", None, "linspace", 285),
        ("euler_ancestral", None, "linspace", 265),
        ("dpmpp_2m_sde", None, "leading", 998),
        ("euler_ancestral", None, "leading", 999),
        ("dpmpp_2m_sde", "simple", "leading", 250),
        ("euler_ancestral", "sgm_uniform", "leading", 285),
    ],
)
def test_samplers_that_add_noise_do_not_go_up(sampler, schedule, spacing, most):
    """With DDPM's linear betas, rescaled, timestep 998 has σ = 15406 where 4096 stands for the last one's infinity."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    noise = NoiseSchedule.from_config(config)
    with pytest.raises(ParameterError, match=rf"^num_inference_steps: in {most + 1} .* 4096, .*; take at most {most}$"):
        make_table(noise, most + 1, sampler, schedule)
    table = make_table(noise, most, sampler, schedule)
    assert np.all(np.diff(table.noise_spans(noise)[:, 0]) <= 0)
    part = make_table(noise, most + 1, sampler, schedule, strength=0.9)
    assert np.all(np.isfinite(part.update)), "the level that is too low is not walked from"


def test_timesteps_of_the_callers_that_go_up():
    noise = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    with pytest.raises(ParameterError, match=r"^timesteps: the noise level rises .*; begin with the second$"):
        make_table(noise, 0, "dpmpp_2m_sde", timesteps=[999, 998, 500])
    assert np.all(np.isfinite(make_table(noise, 0, "dpmpp_2m_sde", timesteps=[998, 500]).update))


def test_zero_terminal_snr_says_nothing_to_epsilon_at_its_end():
    """diffusers divides by 0."""
    config = {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ParameterError, match=r"^sampler: at zero terminal SNR .* choose euler or dpmpp_2m$"):
        make_table(NoiseSchedule.from_config(config), 8, "ddim")
    assert np.all(np.isfinite(make_table(NoiseSchedule.from_config(config), 8, "euler").update))
