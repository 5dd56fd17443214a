"""Euler and Euler ancestral: k-diffusion's samplers, on x = x_0 + σ ε."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import (
    Walk,
    final_sigma,
    karras_sigmas,
    sigmas_at,
    spaced_timesteps,
    timesteps_at,
)
from fastsd.sampling.table import Table, assemble, basis

# One step from σ to σ': (x, eps, noise, σ, σ') → next x
Step = Callable[[Vector, Vector, Vector, float, float], Vector]


def euler(noise: NoiseSchedule, walk: Walk) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1 without its second-order correction."""
    return _table("euler", noise, walk, _euler_step, final_sigma(noise))


def euler_ancestral(noise: NoiseSchedule, walk: Walk) -> Table:
    """k-diffusion's sample_euler_ancestral: an Euler step to below the next noise level, then fresh noise up to it."""
    return _table("euler_ancestral", noise, walk, _ancestral_step, 0.0)


def _euler_step(x: Vector, eps: Vector, z: Vector, sigma: float, sigma_next: float) -> Vector:
    return x + (sigma_next - sigma) * eps


def _ancestral_step(x: Vector, eps: Vector, z: Vector, sigma: float, sigma_next: float) -> Vector:
    up = sigma_next / sigma * math.sqrt(sigma**2 - sigma_next**2)
    down = sigma_next**2 / sigma
    return x + (down - sigma) * eps + up * z


def _table(name: str, noise: NoiseSchedule, walk: Walk, step: Step, final: float) -> Table:
    timesteps, start_sigmas = _stops(noise, walk)
    sigmas = np.append(start_sigmas, final if walk.sigmas is None else 0.0)
    (x,), out, z = basis(1)
    alpha_bars = 1 / (sigmas**2 + 1)
    states = []
    for sigma, sigma_next, alpha_bar in zip(sigmas[:-1], sigmas[1:], alpha_bars[:-1], strict=True):
        _, eps = noise.x0_and_eps(math.sqrt(alpha_bar) * x, out, alpha_bar)
        states.append([step(x, eps, z, sigma, sigma_next)])
    return assemble(
        name,
        walk.schedule,
        timesteps,
        states,
        input_scales=np.sqrt(alpha_bars[:-1]),
        initial_scale=_initial_scale(noise, sigmas[0]),
    )


def _stops(noise: NoiseSchedule, walk: Walk) -> tuple[Vector, Vector]:
    """[n] timesteps and [n] noise levels at the start of each step; fractional timesteps where the levels came first."""
    if walk.sigmas is not None:
        return timesteps_at(noise, walk.sigmas), walk.sigmas
    timesteps = walk.timesteps
    if timesteps is None:
        timesteps = spaced_timesteps(noise, walk.steps, default="linspace")
    sigmas = sigmas_at(noise, timesteps)
    if walk.schedule == "karras":
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], walk.steps)
        timesteps = timesteps_at(noise, sigmas)
    return timesteps, sigmas


def _initial_scale(noise: NoiseSchedule, sigma_max: float) -> float:
    """σ of pure noise. Leading spacing starts below the last training timestep, where some image is still in x."""
    return math.hypot(sigma_max, 1.0) if noise.timestep_spacing == "leading" else float(sigma_max)
