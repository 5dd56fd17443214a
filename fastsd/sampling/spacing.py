"""Where a sampler stops on its way from noise to image: timesteps, and the noise levels σ that belong to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastsd.errors import ParameterError
from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.sigma_schedules import SIGMA_SCHEDULES

# How DPM-Solver's classes make whole timesteps of those that belong to a schedule's noise levels: rounded, or cut.
# The first level's T - 1 becomes T - 2, as diffusers' float32 falls short of it before it is cut.
WHOLE_TIMESTEPS: dict[str, Callable[[Vector], Vector]] = {
    "karras": np.round,
    "exponential": lambda timesteps: np.maximum(np.ceil(timesteps) - 1, 0),
    "beta": lambda timesteps: np.maximum(np.ceil(timesteps) - 1, 0),
}


@dataclass(frozen=True, eq=False)
class Walk:
    """What the caller asked of a sampler, already checked: see `make_table`.

    timesteps [n] or sigmas [n], without the final 0, are set where the caller chose the stops; schedule is then "custom".
    Those of the "simple" schedule are set too. eta: None is the sampler's default.
    begin is the first step that is taken, for the samplers that read in a step what earlier ones left (`SamplerInfo.multistep`):
    the stops before it are dropped, and no history is there. Of the other samplers' tables `make_table` drops the rows.
    """

    steps: int
    schedule: str
    eta: float | None = None
    begin: int = 0
    timesteps: Vector | None = None
    sigmas: Vector | None = None


Stops = Callable[[NoiseSchedule, Walk], tuple[Vector, Vector]]  # `sigma_stops` or `solver_stops`


def spaced_timesteps(noise: NoiseSchedule, steps: int, default: str) -> Vector:
    """[steps] falling timesteps in [0, T): Lin et al. 2023, "Common Diffusion Noise Schedules", table 2.

    default: the spacing of the sampler's diffusers class, for checkpoints that name none. "leading" and "trailing" are
    whole numbers; "linspace" is not rounded.
    """
    spacing, T = noise.timestep_spacing or default, noise.train_steps
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps)[::-1]
    if spacing == "trailing":
        # arange as in diffusers, so that ties round alike; for some counts (61, 103, …) it yields one stop too many.
        return np.arange(T, 0, -T / steps)[:steps].round() - 1
    return _offset(np.arange(steps, dtype=np.float64)[::-1] * (T // steps), noise)


def spaced_timesteps_above_zero(noise: NoiseSchedule, steps: int, default: str) -> Vector:
    """[steps] falling whole timesteps as DPM-Solver spaces them: [0, T) is cut in steps + 1, timestep 0 left out."""
    spacing, T = noise.timestep_spacing or default, noise.train_steps
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps + 1)[:0:-1].round()
    if spacing == "trailing":
        return spaced_timesteps(noise, steps, default)
    if steps >= T:
        raise ParameterError(
            f"num_inference_steps: {steps} is out of range; with leading spacing this sampler takes at most {T - 1}"
        )
    return _offset(np.arange(1, steps + 1, dtype=np.float64)[::-1] * (T // (steps + 1)), noise)


def _offset(timesteps: Vector, noise: NoiseSchedule) -> Vector:
    """Adds the checkpoint's steps_offset, or what of it fits: at T steps there is no room, and diffusers fails."""
    return timesteps + min(noise.steps_offset, noise.train_steps - 1 - int(timesteps[0]))


def sigmas_at(noise: NoiseSchedule, timesteps: Vector) -> Vector:
    """[n], the noise level at each timestep, linear in σ between whole timesteps."""
    return np.interp(timesteps, np.arange(noise.train_steps), noise.sigmas)


def timesteps_at(noise: NoiseSchedule, sigmas: Vector) -> Vector:
    """[n], the timestep that has each noise level, linear in log σ between whole timesteps; held inside [0, T-1]."""
    return np.interp(np.log(sigmas), np.log(noise.sigmas), np.arange(noise.train_steps))


def simple_timesteps(noise: NoiseSchedule, steps: int) -> Vector:
    """[steps] whole timesteps, A1111's "Simple": as evenly as trailing spacing, rounded up."""
    return noise.train_steps - 1 - np.floor(np.arange(steps) * (noise.train_steps / steps))


def sigma_stops(noise: NoiseSchedule, walk: Walk) -> tuple[Vector, Vector]:
    """[n] timesteps and [n] noise levels at the start of each step, as in the diffusers classes that stem from k-diffusion.

    A schedule spans the levels of the checkpoint's spacing; the timesteps of its levels are fractional.
    """
    if walk.sigmas is not None:
        return timesteps_at(noise, walk.sigmas), walk.sigmas
    chosen = walk.timesteps
    timesteps = spaced_timesteps(noise, walk.steps, default="linspace") if chosen is None else chosen
    sigmas = sigmas_at(noise, timesteps)
    if walk.schedule in SIGMA_SCHEDULES:
        sigmas = SIGMA_SCHEDULES[walk.schedule](sigmas[0], sigmas[-1], walk.steps)
        timesteps = timesteps_at(noise, sigmas)
    return timesteps, sigmas


def solver_stops(noise: NoiseSchedule, walk: Walk) -> tuple[Vector, Vector]:
    """[n] timesteps and [n] noise levels at the start of each step, as in diffusers' DPM-Solver, UniPC and DEIS.

    A schedule spans all levels of the training.
    """
    if walk.schedule in SIGMA_SCHEDULES:
        sigmas = SIGMA_SCHEDULES[walk.schedule](noise.sigmas[-1], noise.sigmas[0], walk.steps)
        timesteps = timesteps_at(noise, sigmas)
        return WHOLE_TIMESTEPS.get(walk.schedule, np.asarray)(timesteps), sigmas
    chosen = walk.timesteps
    timesteps = spaced_timesteps_above_zero(noise, walk.steps, default="linspace") if chosen is None else chosen
    return timesteps, sigmas_at(noise, timesteps)


def require_falling(stops: Stops, noise: NoiseSchedule, walk: Walk) -> None:
    """ParameterError for a walk whose noise level rises, as fresh noise leads only down; stops: those of the sampler.

    At zero terminal SNR the first level, 4096, may lie below those of the timesteps next to it; diffusers then gives NaN.
    """

    def falls(walk: Walk) -> bool:
        return not np.any(np.diff(stops(noise, walk)[1][walk.begin :]) > 0)

    if falls(walk):
        return
    rises = f"the noise level rises after the first step's, {noise.sigmas[-1]:g}, which stands for zero terminal SNR"
    if walk.schedule == "custom":
        raise ParameterError(f"timesteps: {rises}; begin with the second")
    simple = walk.schedule == "simple"
    fewer = (
        replace(walk, steps=steps, timesteps=simple_timesteps(noise, steps) if simple else None)
        for steps in range(walk.steps - 1, 0, -1)
    )
    most = next(other.steps for other in fewer if falls(other))
    raise ParameterError(f"num_inference_steps: in {walk.steps} steps {rises}; take at most {most}")


def final_sigma(noise: NoiseSchedule) -> float:
    """The noise level that the last step goes to."""
    return 0.0 if noise.final_sigmas_type == "zero" else float(noise.sigmas[0])


def initial_scale(noise: NoiseSchedule, sigma_max: float) -> float:
    """σ of pure noise for x = x_0 + σ ε. Leading spacing starts below the last training timestep, where some image is
    still in x."""
    return math.hypot(sigma_max, 1.0) if noise.timestep_spacing == "leading" else float(sigma_max)
