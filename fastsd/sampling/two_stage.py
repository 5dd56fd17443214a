"""Heun, DPM2, DPM++ 2S and DPM++ SDE: k-diffusion's samplers of two UNet calls a step, on x = x_0 + σ ε.

The first call takes x from σ to a middle level; the second, there, gives the slope or the image by which the step is made
anew from the x it began with. The last step, to σ = 0, is Euler's, of one call: n is 2 · steps - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fastsd.sampling.euler import ancestral_levels, assemble_sigmas, denoised_and_eps
from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import Walk, sigma_stops, timesteps_at
from fastsd.sampling.table import Table, basis


class Step(NamedTuple):
    """A step from σ to σ' > 0, between its two calls."""

    sigma: float
    sigma_next: float
    x: Vector
    """At σ."""
    eps: Vector
    """At σ: the first slope dx/dσ."""
    middle_x0: Vector
    middle_eps: Vector
    z: Vector


Finish = Callable[[Step], Vector]  # → x at σ'
Middle = Callable[[float, float], float]  # (σ, σ') → the level of the second call


def heun(noise: NoiseSchedule, walk: Walk) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1: the mean of the slopes at both ends."""

    def finish(step: Step) -> Vector:
        return step.x + (step.sigma_next - step.sigma) * (step.eps + step.middle_eps) / 2

    return _table("heun", noise, walk, finish, middle=None)


def dpm2(noise: NoiseSchedule, walk: Walk) -> Table:
    """Lu et al. 2022, "DPM-Solver", algorithm 1 (DPM-Solver-2), in k-diffusion's form (sample_dpm_2): the slope at the
    geometric mean of the levels."""

    def finish(step: Step) -> Vector:
        return step.x + (step.sigma_next - step.sigma) * step.middle_eps

    return _table("dpm2", noise, walk, finish, _geometric_mean, whole_karras=True)


def dpm2_ancestral(noise: NoiseSchedule, walk: Walk) -> Table:
    """k-diffusion's sample_dpm_2_ancestral: DPM2 to below the next noise level, then fresh noise up to it."""

    def finish(step: Step) -> Vector:
        down, up = ancestral_levels(step.sigma, step.sigma_next)
        return step.x + (down - step.sigma) * step.middle_eps + up * step.z

    return _table("dpm2_ancestral", noise, walk, finish, _ancestral_middle, whole_karras=True)


def dpmpp_2s_ancestral(noise: NoiseSchedule, walk: Walk) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 1 (2S), to below the next noise level, then fresh noise up to it:
    k-diffusion's sample_dpmpp_2s_ancestral."""
    return _table("dpmpp_2s_ancestral", noise, walk, _to_middle_image, _ancestral_middle)


def dpmpp_sde(noise: NoiseSchedule, walk: Walk) -> Table:
    """DPM-Solver++(2S) with fresh noise at both calls: k-diffusion's sample_dpmpp_sde, at r = 1/2.

    There and in diffusers both noises of a step come from one Brownian path: see `fastsd.brownian`.
    """
    return _table("dpmpp_sde", noise, walk, _to_middle_image, _geometric_mean, noisy_middle=True)


def _to_middle_image(step: Step) -> Vector:
    """Toward the image that the second call sees, to below the next noise level, then fresh noise up to it."""
    down, up = ancestral_levels(step.sigma, step.sigma_next)
    return down / step.sigma * step.x + (1 - down / step.sigma) * step.middle_x0 + up * step.z


def _geometric_mean(sigma: float, sigma_next: float) -> float:
    return math.sqrt(sigma * sigma_next)


def _ancestral_middle(sigma: float, sigma_next: float) -> float:
    return math.sqrt(sigma * ancestral_levels(sigma, sigma_next)[0])


def _table(
    name: str,
    noise: NoiseSchedule,
    walk: Walk,
    finish: Finish,
    middle: Middle | None,
    noisy_middle: bool = False,
    whole_karras: bool = False,
) -> Table:
    """middle: None where the second call is at the step's end, with the next step's timestep. whole_karras: whether a step's
    start has a whole timestep in Karras' schedule, as in diffusers' DPM2."""
    timesteps, sigmas = sigma_stops(noise, walk)
    if whole_karras and walk.schedule == "karras":
        timesteps = timesteps.round()
    middles = sigmas[1:] if middle is None else np.array([middle(*pair) for pair in pairwise(sigmas)])
    middle_timesteps = timesteps[1:] if middle is None else timesteps_at(noise, middles)
    (x, old_x, old_eps), out, z = basis(3)

    states = []
    for sigma, sigma_next, level in zip(sigmas[:-1], sigmas[1:], middles, strict=True):
        x0, eps = denoised_and_eps(noise, x, out, sigma)
        down, up = ancestral_levels(sigma, level) if noisy_middle else (level, 0.0)
        states.append([x0 + down * eps + up * z, x, eps])
        x0, eps = denoised_and_eps(noise, x, out, level)
        states.append([finish(Step(sigma, sigma_next, old_x, old_eps, x0, eps, z)), old_x, old_eps])
    x0, _ = denoised_and_eps(noise, x, out, sigmas[-1])
    states.append([x0, old_x, old_eps])
    calls = _interleaved(timesteps, middle_timesteps)
    return assemble_sigmas(name, noise, walk, calls, _interleaved(sigmas, middles), states, calls=2)


def _interleaved(starts: Sequence[float] | Vector, middles: Sequence[float] | Vector) -> Vector:
    """[2n - 1] of [n] and [n - 1]."""
    merged = np.empty(len(starts) + len(middles))
    merged[::2], merged[1::2] = starts, middles
    return merged
