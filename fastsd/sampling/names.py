"""The samplers and schedules fastsd knows, and every name a user may call them by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsd.errors import ParameterError
from fastsd.sampling.consistency import TCD_ETA, lcm, tcd
from fastsd.sampling.ddim import ddim, ddpm
from fastsd.sampling.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_2s, dpmpp_3m_sde
from fastsd.sampling.euler import euler, euler_ancestral, lms
from fastsd.sampling.plms import plms
from fastsd.sampling.schedule import NoiseSchedule
from fastsd.sampling.spacing import Walk
from fastsd.sampling.table import Table
from fastsd.sampling.two_stage import dpm2, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, heun
from fastsd.sampling.unipc import deis, unipc
from fastsd.wording import quoted


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler: its names, what it can be asked, and the function that writes its table.

    id                      canonical name
    label                   as AUTOMATIC1111's web UI shows it
    diffusers_class         its twin, whose results it reproduces; "" where diffusers has none: then k-diffusion's are
    diffusers_options       what makes this sampler of that class, whose name alone means another
    aliases                 further names: CompVis', k-diffusion's, AUTOMATIC1111's
    schedules               the schedules it takes
    takes_timesteps         whether the caller may choose the timesteps, as in its twin
    whole_timesteps         whether chosen timesteps must be whole numbers
    takes_sigmas            whether the caller may choose the noise levels, as in its twin
    zero_snr                whether it takes checkpoints of zero terminal SNR (rescale_betas_zero_snr), as its twin does
    default_eta             the eta of a caller who gives none; None: it has no such knob
    follows_checkpoint      whether the checkpoint's own schedule (use_karras_sigmas) is its default, as in its twin
    default_schedule        otherwise; where diffusers has no twin it is AUTOMATIC1111's "Automatic"
    multistep               whether a step reads what earlier ones left; its function then heeds `Walk.begin`
    brownian                whether k-diffusion draws its noise from a Brownian path
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
    zero_snr: bool = False
    default_eta: float | None = None
    follows_checkpoint: bool = False
    default_schedule: str = "uniform"
    multistep: bool = False
    brownian: bool = False
    diffusers_options: Mapping[str, Any] = field(default_factory=dict)


SCHEDULE_ALIASES: dict[str, tuple[str, ...]] = {
    "uniform": ("normal",),
    "karras": ("ka",),
    "exponential": ("exp",),
    "sgm_uniform": (),
    "simple": (),
    "beta": (),
    "align_your_steps": ("ays",),
}
AUTOMATIC = "automatic"
_SIGMA_SCHEDULES = tuple(SCHEDULE_ALIASES)

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
            zero_snr=True,
        ),
        SamplerInfo(
            "ddim",
            "DDIM",
            "DDIMScheduler",
            "deterministic at eta 0, as noisy as DDPM at eta 1 (Song et al. 2020)",
            ddim,
            zero_snr=True,
            default_eta=0.0,
        ),
        SamplerInfo(
            "plms",
            "PLMS",
            "PNDMScheduler",
            "fourth-order multistep, one UNet call more than steps (Liu et al. 2022)",
            plms,
            aliases=("pndm",),
            multistep=True,
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
            zero_snr=True,
            follows_checkpoint=True,
            multistep=True,
        ),
        SamplerInfo(
            "dpmpp_2m_sde",
            "DPM++ 2M SDE",
            "DPMSolverMultistepScheduler",
            "second-order multistep, fresh noise at every step (Lu et al. 2022)",
            dpmpp_2m_sde,
            aliases=("k_dpmpp_2m_sde", "sde_dpm_solver++"),
            schedules=_SIGMA_SCHEDULES,
            takes_timesteps=True,
            zero_snr=True,
            follows_checkpoint=True,
            multistep=True,
            brownian=True,
            diffusers_options={"algorithm_type": "sde-dpmsolver++"},
        ),
        SamplerInfo(
            "dpmpp_2m_sde_heun",
            "DPM++ 2M SDE Heun",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M SDE, the slope integrated over the step (k-diffusion, sample_dpmpp_2m_sde)",
            dpmpp_2m_sde_heun,
            aliases=("k_dpmpp_2m_sde_heun",),
            schedules=_SIGMA_SCHEDULES,
            takes_timesteps=True,
            zero_snr=True,
            follows_checkpoint=True,
            multistep=True,
            brownian=True,
            diffusers_options={"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        ),
        SamplerInfo(
            "dpmpp_3m_sde",
            "DPM++ 3M SDE",
            "",
            "third-order multistep, fresh noise at every step, exponential unless asked (k-diffusion, sample_dpmpp_3m_sde)",
            dpmpp_3m_sde,
            aliases=("k_dpmpp_3m_sde",),
            schedules=_SIGMA_SCHEDULES,
            default_schedule="exponential",  # third order is unstable where λ's steps are uneven, as the uniform schedule's
            takes_sigmas=True,
            multistep=True,
            brownian=True,
        ),
        SamplerInfo(
            "dpmpp_2s",
            "DPM++ 2S",
            "DPMSolverSinglestepScheduler",
            "second-order single-step: pairs of steps of one UNet call each (Lu et al. 2022)",
            dpmpp_2s,
            aliases=("k_dpmpp_2s", "dpm_solver_singlestep"),
            schedules=tuple(name for name in _SIGMA_SCHEDULES if name != "sgm_uniform"),
            takes_timesteps=True,
            follows_checkpoint=True,
            multistep=True,
        ),
        SamplerInfo(
            "dpmpp_2s_ancestral",
            "DPM++ 2S a",
            "",
            "second order, two UNet calls a step, fresh noise at every step (k-diffusion, sample_dpmpp_2s_ancestral)",
            dpmpp_2s_ancestral,
            aliases=("k_dpmpp_2s_a", "k_dpmpp_2s_ancestral"),
            schedules=_SIGMA_SCHEDULES,
            takes_sigmas=True,
        ),
        SamplerInfo(
            "dpmpp_sde",
            "DPM++ SDE",
            "DPMSolverSDEScheduler",
            "second order, two UNet calls a step, fresh noise at every call (k-diffusion, sample_dpmpp_sde)",
            dpmpp_sde,
            aliases=("k_dpmpp_sde",),
            schedules=_SIGMA_SCHEDULES,
            follows_checkpoint=True,
            brownian=True,
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
            zero_snr=True,
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
            zero_snr=True,
        ),
        SamplerInfo(
            "heun",
            "Heun",
            "HeunDiscreteScheduler",
            "second order, two UNet calls a step (Karras et al. 2022, algorithm 1)",
            heun,
            aliases=("k_heun", "heun_discrete"),
            schedules=_SIGMA_SCHEDULES,
            takes_timesteps=True,
            whole_timesteps=False,
            follows_checkpoint=True,
        ),
        SamplerInfo(
            "dpm2",
            "DPM2",
            "KDPM2DiscreteScheduler",
            "second order, two UNet calls a step (Lu et al. 2022, DPM-Solver-2)",
            dpm2,
            aliases=("k_dpm_2",),
            schedules=_SIGMA_SCHEDULES,
            follows_checkpoint=True,
        ),
        SamplerInfo(
            "dpm2_ancestral",
            "DPM2 a",
            "KDPM2AncestralDiscreteScheduler",
            "second order, two UNet calls a step, fresh noise at every step (k-diffusion, sample_dpm_2_ancestral)",
            dpm2_ancestral,
            aliases=("k_dpm_2_a", "k_dpm_2_ancestral"),
            schedules=_SIGMA_SCHEDULES,
            follows_checkpoint=True,
        ),
        SamplerInfo(
            "lms",
            "LMS",
            "LMSDiscreteScheduler",
            "fourth-order multistep in σ (k-diffusion, sample_lms)",
            lms,
            aliases=("k_lms", "lms_discrete"),
            schedules=_SIGMA_SCHEDULES,
            follows_checkpoint=True,
        ),
        SamplerInfo(
            "unipc",
            "UniPC",
            "UniPCMultistepScheduler",
            "second-order multistep, each step corrected by the next call (Zhao et al. 2023)",
            unipc,
            aliases=("uni_pc", "uni_pc_bh2"),
            schedules=_SIGMA_SCHEDULES,
            zero_snr=True,
            follows_checkpoint=True,
            multistep=True,
        ),
        SamplerInfo(
            "deis",
            "DEIS",
            "DEISMultistepScheduler",
            "second-order multistep in log σ (Zhang & Chen 2022)",
            deis,
            schedules=_SIGMA_SCHEDULES,
            follows_checkpoint=True,
            multistep=True,
        ),
        SamplerInfo(
            "lcm",
            "LCM",
            "LCMScheduler",
            "for latent consistency models: 1 to 8 steps (Luo et al. 2023)",
            lcm,
            takes_timesteps=True,
            zero_snr=True,
        ),
        SamplerInfo(
            "tcd",
            "TCD",
            "TCDScheduler",
            "for trajectory consistency models: 1 to 8 steps, eta is its γ (Zheng et al. 2024)",
            tcd,
            takes_timesteps=True,
            zero_snr=True,
            default_eta=TCD_ETA,
        ),
    )
}


def schedules() -> tuple[str, ...]:
    """The canonical names of the known schedules."""
    return tuple(SCHEDULE_ALIASES)


def schedule_label(schedule: str) -> str:
    """A canonical schedule, or "custom", as AUTOMATIC1111's web UI shows it."""
    return "SGM Uniform" if schedule == "sgm_uniform" else schedule.replace("_", " ").title()


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

    None for "Automatic", AUTOMATIC1111's default: the one in the sampler's name, else the checkpoint's own or the sampler's.
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
        classes: tuple[str, ...] = ()
        if info.diffusers_class and not info.diffusers_options:
            classes = (info.diffusers_class, info.diffusers_class.removesuffix("Scheduler"))
        names = (info.id, info.label, *classes, f"sample_{info.id}", *info.aliases)
        keys.update({_key(name): info.id for name in names})
    return keys


_SAMPLER_KEYS = _sampler_keys()
_SCHEDULE_KEYS = {_key(name): id for id, aliases in SCHEDULE_ALIASES.items() for name in (id, *aliases)}
