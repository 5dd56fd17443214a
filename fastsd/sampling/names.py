"""The samplers and schedules fastsd knows, and every name a user may call them by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fastsd.errors import ParameterError
from fastsd.sampling.ddim import ddim, ddpm
from fastsd.sampling.dpm_solver import dpmpp_2m
from fastsd.sampling.euler import euler, euler_ancestral
from fastsd.sampling.plms import plms
from fastsd.sampling.schedule import NoiseSchedule
from fastsd.sampling.spacing import Walk
from fastsd.sampling.table import Table
from fastsd.wording import quoted


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler: its names, what it can be asked, and the function that writes its table.

    id                      canonical name
    label                   as AUTOMATIC1111's web UI shows it
    diffusers_class         its twin, whose results it reproduces
    aliases                 further names: CompVis', k-diffusion's, AUTOMATIC1111's
    schedules               the schedules it takes
    takes_timesteps         whether the caller may choose the timesteps, as in its twin
    whole_timesteps         whether chosen timesteps must be whole numbers
    takes_sigmas            whether the caller may choose the noise levels, as in its twin
    follows_checkpoint      whether the checkpoint's own schedule (use_karras_sigmas) is its default, as in its twin
    """

    id: str
    label: str
    diffusers_class: str
    description: str
    function: Callable[[NoiseSchedule, Walk], Table]
    aliases: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ("uniform",)
    takes_timesteps: bool = False
    whole_timesteps: bool = True
    takes_sigmas: bool = False
    follows_checkpoint: bool = False


_SIGMA_SCHEDULES = ("uniform", "karras")

SAMPLERS: dict[str, SamplerInfo] = {
    info.id: info
    for info in (
        SamplerInfo(
            "ddpm",
            "DDPM",
            "DDPMScheduler",
            "ancestral sampling, noise at every step (Ho et al. 2020)",
            ddpm,
            takes_timesteps=True,
        ),
        SamplerInfo(
            "ddim",
            "DDIM",
            "DDIMScheduler",
            "deterministic at eta 0, as noisy as DDPM at eta 1 (Song et al. 2020)",
            ddim,
        ),
        SamplerInfo(
            "plms",
            "PLMS",
            "PNDMScheduler",
            "fourth-order multistep, one UNet call more than steps (Liu et al. 2022)",
            plms,
            aliases=("pndm",),
        ),
        SamplerInfo(
            "dpmpp_2m",
            "DPM++ 2M",
            "DPMSolverMultistepScheduler",
            "second-order multistep, good from 15 steps on (Lu et al. 2022)",
            dpmpp_2m,
            aliases=("k_dpmpp_2m", "dpm_solver", "dpm_solver++", "dpm_solver_multistep"),
            schedules=_SIGMA_SCHEDULES,
            takes_timesteps=True,
            follows_checkpoint=True,
        ),
        SamplerInfo(
            "euler",
            "Euler",
            "EulerDiscreteScheduler",
            "first order, deterministic (Karras et al. 2022, algorithm 1)",
            euler,
            aliases=("k_euler", "euler_discrete"),
            schedules=_SIGMA_SCHEDULES,
            takes_timesteps=True,
            whole_timesteps=False,
            takes_sigmas=True,
            follows_checkpoint=True,
        ),
        SamplerInfo(
            "euler_ancestral",
            "Euler a",
            "EulerAncestralDiscreteScheduler",
            "first order, fresh noise at every step (k-diffusion, sample_euler_ancestral)",
            euler_ancestral,
            aliases=("k_euler_a", "k_euler_ancestral", "euler_ancestral_discrete"),
            schedules=_SIGMA_SCHEDULES,
        ),
    )
}

SCHEDULE_ALIASES: dict[str, tuple[str, ...]] = {"uniform": ("normal",), "karras": ()}
AUTOMATIC = "automatic"


def schedules() -> tuple[str, ...]:
    """The canonical names of the known schedules."""
    return tuple(SCHEDULE_ALIASES)


def canonical_sampler(name: str) -> tuple[str, str | None]:
    """(sampler id, schedule that the name also gave or None): "DPM++ 2M Karras" is ("dpmpp_2m", "karras").

    Takes diffusers class names, AUTOMATIC1111 labels, k-diffusion and CompVis names, in any case. Otherwise
    ParameterError, which lists the known ones.
    """
    key = _key(name)
    if key in _SAMPLER_KEYS:
        return _SAMPLER_KEYS[key], None
    for schedule_key, schedule in _SCHEDULE_KEYS.items():
        stem = key.removesuffix(schedule_key)
        if stem != key and stem in _SAMPLER_KEYS:
            return _SAMPLER_KEYS[stem], schedule
    raise ParameterError(f"sampler: {quoted(name)} is unknown; choose one of {', '.join(SAMPLERS)}")


def canonical_schedule(name: str) -> str | None:
    """The canonical name of a schedule, of "Karras", "normal", …; ParameterError, which lists the known ones.

    None for "Automatic", AUTOMATIC1111's default: the one in the sampler's name, else the checkpoint's own.
    """
    key = _key(name)
    if key == AUTOMATIC:
        return None
    if key not in _SCHEDULE_KEYS:
        known = ", ".join((*SCHEDULE_ALIASES, AUTOMATIC))
        raise ParameterError(f"schedule: {quoted(name)} is unknown; choose one of {known}")
    return _SCHEDULE_KEYS[key]


def _key(name: object) -> str:
    """Spelling apart: lower case, letters and digits only, `++` as k-diffusion writes it."""
    text = name.lower() if isinstance(name, str) else ""
    return re.sub(r"[^a-z0-9]", "", text.replace("++", "pp"))


def _sampler_keys() -> dict[str, str]:
    keys = {}
    for info in SAMPLERS.values():
        short_class = info.diffusers_class.removesuffix("Scheduler")
        names = (info.id, info.label, info.diffusers_class, short_class, f"sample_{info.id}", *info.aliases)
        keys.update({_key(name): info.id for name in names})
    return keys


_SAMPLER_KEYS = _sampler_keys()
_SCHEDULE_KEYS = {_key(name): id for id, aliases in SCHEDULE_ALIASES.items() for name in (id, *aliases)}
