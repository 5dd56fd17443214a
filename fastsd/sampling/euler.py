"""Euler, Euler ancestral and LMS: k-diffusion's samplers of one UNet call a step, on x = x_0 + σ ε."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import Walk, final_sigma, initial_scale, require_falling, sigma_stops
from fastsd.sampling.table import Table, assemble, basis

GAUSS_NODES = np.array([-1.0, 1.0]) / math.sqrt(3)  # with weights 1 they integrate cubics over [-1, 1] exactly

# One step from σ to σ': (x, eps, noise, σ, σ') → next x
Step = Callable[[Vector, Vector, Vector, float, float], Vector]


def euler(noise: NoiseSchedule, walk: Walk) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space", algorithm 1 without its second-order correction."""
    return _table("euler", noise, walk, _euler_step, final_sigma(noise))


def euler_ancestral(noise: NoiseSchedule, walk: Walk) -> Table:
    """k-diffusion's sample_euler_ancestral: an Euler step to below the next noise level, then fresh noise up to it."""
    require_falling(sigma_stops, noise, walk)
    return _table("euler_ancestral", noise, walk, _ancestral_step, 0.0)


def lms(noise: NoiseSchedule, walk: Walk) -> Table:
    """k-diffusion's sample_lms: Adams-Bashforth of fourth order in σ, lower while the history grows; it ends at σ = 0.

    A walk that begins later has the full order from its start and zeros for history, as in diffusers.
    """
    timesteps, start_sigmas = sigma_stops(noise, walk)
    sigmas = np.append(start_sigmas, 0.0)
    (x, *history), out, _ = basis(4)
    states = []
    for i, sigma in enumerate(start_sigmas):
        slopes = [denoised_and_eps(noise, x, out, sigma)[1], *history]
        weights = _adams_bashforth(sigmas[max(i - 3, 0) : i + 1][::-1], sigmas[i + 1])
        next_x = x + sum(weight * slope for weight, slope in zip(weights, slopes, strict=False))
        states.append([next_x, *slopes[:3]])
    return assemble_sigmas("lms", noise, walk, timesteps, start_sigmas, states)


def ancestral_levels(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(σ_down, σ_up): where an ancestral step goes, and the noise that then takes it up to σ_next, as in DDPM.

    Of steps to a higher level, which only a part of a walk that is not taken may have, σ_up is 0.
    """
    return sigma_next**2 / sigma, sigma_next / sigma * math.sqrt(max(sigma**2 - sigma_next**2, 0.0))


def denoised_and_eps(noise: NoiseSchedule, x: Vector, out: Vector, sigma: float) -> tuple[Vector, Vector]:
    """The image and the noise that the UNet's output says x = x_0 + σ ε is made of."""
    alpha_bar = 1 / (sigma**2 + 1)
    return noise.x0_and_eps(math.sqrt(alpha_bar) * x, out, alpha_bar)


def assemble_sigmas(
    name: str,
    noise: NoiseSchedule,
    walk: Walk,
    timesteps: Vector,
    sigmas: Vector,
    states: list[list[Vector]],
    calls: int = 1,
) -> Table:
    """A table on x = x_0 + σ ε; sigmas [n], the noise level that each UNet call sees. calls: see `Table`."""
    scales = 1 / np.sqrt(sigmas**2 + 1)
    first = initial_scale(noise, sigmas[0])
    return assemble(name, walk.schedule, timesteps, states, scales, first, calls=calls)


def _euler_step(x: Vector, eps: Vector, z: Vector, sigma: float, sigma_next: float) -> Vector:
    return x + (sigma_next - sigma) * eps


def _ancestral_step(x: Vector, eps: Vector, z: Vector, sigma: float, sigma_next: float) -> Vector:
    down, up = ancestral_levels(sigma, sigma_next)
    return x + (down - sigma) * eps + up * z


def _table(name: str, noise: NoiseSchedule, walk: Walk, step: Step, final: float) -> Table:
    timesteps, start_sigmas = sigma_stops(noise, walk)
    sigmas = np.append(start_sigmas, final if walk.sigmas is None else 0.0)
    (x,), out, z = basis(1)
    states = []
    for sigma, sigma_next in pairwise(sigmas):
        _, eps = denoised_and_eps(noise, x, out, sigma)
        states.append([step(x, eps, z, sigma, sigma_next)])
    return assemble_sigmas(name, noise, walk, timesteps, start_sigmas, states)


def _adams_bashforth(sigmas: Vector, sigma_next: float) -> list[float]:
    """The integral, from σ = sigmas[0] to sigma_next, of each Lagrange polynomial on the levels sigmas [≤ 4], newest first."""
    half = (sigma_next - sigmas[0]) / 2
    at = sigmas[0] + half * (GAUSS_NODES + 1)
    others = [np.delete(sigmas, k) for k in range(len(sigmas))]
    values = [np.prod((at[:, None] - other) / (own - other), axis=1) for own, other in zip(sigmas, others, strict=True)]
    return [float(half * value.sum()) for value in values]
