"""Every name a user may give a sampler or a schedule, and every error for a wrong argument."""

import re

import pytest

from fastsd.errors import ParameterError
from fastsd.sampling import SAMPLERS, NoiseSchedule, canonical_sampler, canonical_schedule, make_table, schedules
from fastsd.sampling.names import SCHEDULE_ALIASES
from fastsd.sampling.schedule import SAMPLER_OF_CLASS
from tests.sampling.sampler_cases import BUNDLED, SD15

NOISE = NoiseSchedule.from_config(SD15)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # diffusers
        ("PNDMScheduler", ("plms", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_ancestral", None)),
        # AUTOMATIC1111
        ("Euler a", ("euler_ancestral", None)),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("Euler a Karras", ("euler_ancestral", "karras")),
        ("DDIM Normal", ("ddim", "uniform")),
        ("k_euler_a", ("euler_ancestral", None)),
        # k-diffusion
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
        for name in (info.id, info.label, info.diffusers_class, *info.aliases):
            assert canonical_sampler(name) == (info.id, None)
            assert canonical_sampler(f"{name} Karras") == (info.id, "karras")
            assert canonical_sampler(name.upper()) == (info.id, None)
    assert schedules() == ("uniform", "karras")
    for schedule, aliases in SCHEDULE_ALIASES.items():
        for name in (schedule, schedule.title(), *aliases):
            assert canonical_schedule(name) == schedule


def test_the_two_lists_of_diffusers_classes_agree():
    assert {info.diffusers_class: info.id for info in SAMPLERS.values()} == SAMPLER_OF_CLASS


@pytest.mark.parametrize(
    "name", ["euler b", "", "karras", "UniPCMultistepScheduler", "++", "Euler a exponential", None, 3]
)
def test_unknown_sampler_lists_the_known(name):
    with pytest.raises(ParameterError, match=r"unknown sampler.*ddpm, ddim, plms, dpmpp_2m, euler, euler_ancestral"):
        canonical_sampler(name)


@pytest.mark.parametrize("name", ["exponential", "", None, 7])
def test_unknown_schedule_lists_the_known(name):
    with pytest.raises(ParameterError, match=r"unknown schedule.*uniform, karras"):
        canonical_schedule(name)


def test_defaults_are_the_checkpoints():
    table = make_table(NOISE, 20)
    assert (table.sampler, table.schedule) == ("plms", "uniform")
    assert make_table(NoiseSchedule.from_config(BUNDLED), 20).sampler == "ddim"
    karras = NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True})
    table = make_table(karras, 20)
    assert (table.sampler, table.schedule) == ("dpmpp_2m", "karras")
    assert make_table(karras, 20, schedule="normal").schedule == "uniform"
    assert make_table(karras, 20, "ddim").schedule == "uniform"
    assert make_table(NOISE, 20, "DPM++ 2M Karras").schedule == "karras"
    assert make_table(NOISE, 20, "DPM++ 2M Karras", "karras").schedule == "karras"


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**30, True, 20.0, "20", None, float("nan")])
def test_steps_outside_their_range(steps):
    with pytest.raises(ParameterError, match="num_inference_steps must be an integer from 1 to 1000"):
        make_table(NOISE, steps)


def test_dpm_solver_leading_spacing_needs_one_timestep_more_than_steps():
    """diffusers gives NaN here."""
    with pytest.raises(
        ParameterError, match="num_inference_steps must be at most 999 for dpmpp_2m with leading spacing"
    ):
        make_table(NoiseSchedule.from_config(BUNDLED), 1000, "dpmpp_2m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": -0.1}, "eta must be between 0 and 1, got -0.1"),
        ({"eta": 1.5}, "eta must be between 0 and 1"),
        ({"eta": float("nan")}, "eta must be between 0 and 1"),
        ({"eta": True}, "eta must be between 0 and 1"),
        ({"sampler": "plms", "schedule": "karras"}, "do: dpmpp_2m, euler, euler_ancestral"),
        ({"sampler": "DDIM Karras"}, "ddim does not take the karras schedule"),
        (
            {"sampler": "DPM++ 2M Karras", "schedule": "uniform"},
            "name says schedule karras, the schedule argument uniform",
        ),
        ({"timesteps": [5], "sigmas": [5.0]}, "timesteps or sigmas, not both"),
        # what the diffusers classes take
        ({"sampler": "plms", "timesteps": [5]}, "plms does not take timesteps.*ddpm, dpmpp_2m, euler"),
        ({"sampler": "ddim", "timesteps": [5]}, "ddim does not take timesteps"),
        ({"sampler": "euler a", "timesteps": [5]}, "euler_ancestral does not take timesteps"),
        ({"sampler": "dpmpp_2m", "sigmas": [5.0]}, "dpmpp_2m does not take sigmas; the samplers that do: euler"),
        ({"sampler": "euler", "schedule": "karras", "timesteps": [5]}, "timesteps and the karras schedule exclude"),
        ({"sampler": "euler", "schedule": "karras", "sigmas": [5.0]}, "sigmas and the karras schedule exclude"),
        # values
        ({"sampler": "ddpm", "timesteps": [5, 5]}, "each smaller than the one before"),
        ({"sampler": "ddpm", "timesteps": [1, 5]}, "each smaller than the one before"),
        ({"sampler": "ddpm", "timesteps": []}, "non-empty list"),
        ({"sampler": "ddpm", "timesteps": 5}, "non-empty list"),
        ({"sampler": "ddpm", "timesteps": ["a"]}, "list of numbers"),
        ({"sampler": "ddpm", "timesteps": [[2], [1]]}, "non-empty list"),
        ({"sampler": "ddpm", "timesteps": [float("inf"), 1]}, "finite numbers"),
        ({"sampler": "ddpm", "timesteps": [1000, 1]}, r"must lie in \[0, 1000\), got 1000 to 1"),
        ({"sampler": "ddpm", "timesteps": [5, -1]}, r"must lie in \[0, 1000\)"),
        ({"sampler": "dpmpp_2m", "timesteps": [5.5, 1]}, "whole numbers for dpmpp_2m"),
        ({"sampler": "euler", "sigmas": [3.0, -1.0]}, "sigmas must lie in"),
        ({"sampler": "euler", "sigmas": [0.0]}, "sigmas must lie in"),
        ({"sampler": "euler", "sigmas": [1e300, 1.0]}, "sigmas must lie in"),
        ({"sampler": "euler", "sigmas": [1.0, float("nan")]}, "finite numbers"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ParameterError, match=message) as raised:
        make_table(NOISE, 20, **arguments)
    assert "\n" not in str(raised.value)


def test_steps_are_not_looked_at_beside_timesteps():
    assert len(make_table(NOISE, 0, "euler", timesteps=[900.5, 500, 3])) == 3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "DPMSolverMultistepScheduler (sde-dpmsolver++, 2, midpoint)",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "(dpmsolver++, 3, midpoint)"),
    ],
)
def test_checkpoint_with_a_sampler_fastsd_has_not(config, named):
    """It loads, and runs with another sampler; only its own is refused."""
    noise = NoiseSchedule.from_config(config)
    with pytest.raises(ParameterError, match=f"own sampler .*{re.escape(named)}; choose sampler from ddpm, ddim"):
        make_table(noise, 20)
    assert make_table(noise, 20, "euler").sampler == "euler"


def test_checkpoint_with_a_schedule_fastsd_has_not():
    noise = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True})
    with pytest.raises(ParameterError, match="own schedule exponential; choose schedule from uniform, karras"):
        make_table(noise, 20)
    assert make_table(noise, 20, schedule="uniform").schedule == "uniform"
    assert make_table(noise, 20, "ddim").sampler == "ddim"
