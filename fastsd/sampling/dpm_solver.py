"""DPM-Solver++(2M): a second-order multistep solver in the half log signal-to-noise ratio λ = -log σ."""

from __future__ import annotations

import math

import numpy as np

from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import (
    Walk,
    final_sigma,
    karras_sigmas,
    sigmas_at,
    spaced_timesteps_above_zero,
    timesteps_at,
)
from fastsd.sampling.table import Table, assemble, basis

FEW_STEPS = 15  # below this many, lower_order_final applies


def dpmpp_2m(noise: NoiseSchedule, walk: Walk) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M), midpoint form; a last step to σ = 0 is of first order."""
    timesteps, start_sigmas = _stops(noise, walk)
    sigmas = np.append(start_sigmas, final_sigma(noise))
    (x, previous_x0), out, _ = basis(2)
    n = len(timesteps)

    states = []
    for i in range(n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        alpha_bar, alpha_bar_next = 1 / (sigma**2 + 1), 1 / (sigma_next**2 + 1)
        x0, _ = noise.x0_and_eps(x, out, alpha_bar)
        extrapolated = x0
        # A step of length 0 (rounding makes one at T steps) leaves no slope to the step after it.
        if i > 0 and sigmas[i - 1] > sigma and not (i == n - 1 and _ends_first_order(noise, n)):
            h, h_before = math.log(sigma / sigma_next), math.log(sigmas[i - 1] / sigma)
            extrapolated = x0 + h / (2 * h_before) * (x0 - previous_x0)
        shrink = sigma_next / sigma  # exp(-h)
        next_x = math.sqrt(alpha_bar_next) * (shrink / math.sqrt(alpha_bar) * x + (1 - shrink) * extrapolated)
        states.append([next_x, x0])
    return assemble("dpmpp_2m", walk.schedule, timesteps, states)


def _ends_first_order(noise: NoiseSchedule, n: int) -> bool:
    few = noise.lower_order_final and n < FEW_STEPS
    return noise.final_sigmas_type == "zero" or noise.euler_at_final or few


def _stops(noise: NoiseSchedule, walk: Walk) -> tuple[Vector, Vector]:
    """[n] timesteps and [n] noise levels at the start of each step; Karras' span all levels of the training."""
    if walk.schedule == "karras":
        sigmas = karras_sigmas(noise.sigmas[-1], noise.sigmas[0], walk.steps)
        return timesteps_at(noise, sigmas).round(), sigmas
    timesteps = walk.timesteps
    if timesteps is None:
        timesteps = spaced_timesteps_above_zero(noise, walk.steps, default="linspace")
    return timesteps, sigmas_at(noise, timesteps)
