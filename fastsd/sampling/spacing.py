"""Where a sampler stops on its way from noise to image: timesteps, and the noise levels σ that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsd.errors import ParameterError
from fastsd.sampling.schedule import NoiseSchedule, Vector


@dataclass(frozen=True, eq=False)
class Walk:
    """What the caller asked of a sampler, already checked: see `make_table`.

    timesteps [n] or sigmas [n], without the final 0, are set where the caller chose the stops; schedule is then "custom".
    """

    steps: int
    schedule: str
    eta: float = 0.0
    timesteps: Vector | None = None
    sigmas: Vector | None = None


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
            f"num_inference_steps: {steps} is out of range; it must be at most {T - 1} for dpmpp_2m with leading spacing"
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


def karras_sigmas(highest: float, lowest: float, steps: int, rho: float = 7.0) -> Vector:
    """[steps], Karras et al. 2022, "Elucidating the Design Space", equation 5, without its final 0."""
    ramp = np.linspace(0, 1, steps)
    return (highest ** (1 / rho) + ramp * (lowest ** (1 / rho) - highest ** (1 / rho))) ** rho


def final_sigma(noise: NoiseSchedule) -> float:
    """The noise level that the last step goes to."""
    return 0.0 if noise.final_sigmas_type == "zero" else float(noise.sigmas[0])
