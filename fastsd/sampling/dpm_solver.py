"""DPM-Solver++ and its stochastic kin: multistep solvers in the half log signal-to-noise ratio λ = -log σ."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastsd.sampling.euler import assemble_sigmas, denoised_and_eps
from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import Walk, final_sigma, require_falling, sigma_stops, solver_stops
from fastsd.sampling.table import Table, assemble, basis

FEW_STEPS = 15  # below this many, lower_order_final applies


def dpmpp_2m(noise: NoiseSchedule, walk: Walk) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M), midpoint form; a last step to σ = 0 is of first order."""
    return _second_order("dpmpp_2m", noise, walk, stochastic=False)


def dpmpp_2m_sde(noise: NoiseSchedule, walk: Walk) -> Table:
    """SDE-DPM-Solver++(2M) of the same paper, appendix C: fresh noise at every step, otherwise as 2M."""
    return _second_order("dpmpp_2m_sde", noise, walk, stochastic=True)


def dpmpp_2m_sde_heun(noise: NoiseSchedule, walk: Walk) -> Table:
    """The same, with the images' slope integrated over the step instead of taken at its middle: k-diffusion's "heun"."""
    return _second_order("dpmpp_2m_sde_heun", noise, walk, stochastic=True, integrated=True)


def dpmpp_3m_sde(noise: NoiseSchedule, walk: Walk) -> Table:
    """k-diffusion's sample_dpmpp_3m_sde, at η = 1: third order, lower while the history grows; it ends at σ = 0.

    Not diffusers' third order, which takes 1/2 from the weight of the second difference where it should be added, so that it
    does not tend to 0 with the step.
    """
    timesteps, start_sigmas = (stops[walk.begin :] for stops in sigma_stops(noise, walk))
    levels = np.append(start_sigmas, 0.0)
    (x, x0_1, x0_2), out, z = basis(3)
    states = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0, _ = denoised_and_eps(noise, x, out, sigma)
        next_x = x0 if sigma_next == 0 else _third_order_step(x, (x0, x0_1, x0_2), z, levels[max(i - 2, 0) : i + 2])
        states.append([next_x, x0, x0_1])
    return assemble_sigmas("dpmpp_3m_sde", noise, walk, timesteps, start_sigmas, states)


def dpmpp_2s(noise: NoiseSchedule, walk: Walk) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 1 (2S): every second call makes its step and the one before it anew, by the slope
    between their images. As in diffusers the stops are linspace's, whatever the checkpoint's, and a walk that begins in the
    middle of a pair begins with a step of first order."""
    timesteps, start_sigmas = solver_stops(replace(noise, timestep_spacing="linspace"), walk)
    n = len(timesteps)
    sigmas = np.append(start_sigmas, min(final_sigma(noise), start_sigmas[-1]))
    ends_low = noise.final_sigmas_type == "zero" or noise.lower_order_final or n % 2 == 1
    (x, old_x, old_x0), out, _ = basis(3)

    states = []
    for i in range(walk.begin, n):
        second = i % 2 == 1 and i > walk.begin and not (i == n - 1 and ends_low)
        start, sigma, sigma_next = sigmas[i - second], sigmas[i], sigmas[i + 1]
        x0, _ = noise.x0_and_eps(x, out, 1 / (sigma**2 + 1))
        begun, image = (old_x, x0) if second else (x, x0)
        if second and start > sigma:
            image = old_x0 + math.log(start / sigma_next) / (2 * math.log(start / sigma)) * (x0 - old_x0)
        shrink = sigma_next / start
        next_y = shrink * math.sqrt(start**2 + 1) * begun + (1 - shrink) * image
        states.append([next_y / math.sqrt(sigma_next**2 + 1), begun, x0])
    alpha_bars = 1 / (start_sigmas[walk.begin :] ** 2 + 1)
    return assemble("dpmpp_2s", walk.schedule, timesteps[walk.begin :], states, alpha_bars=alpha_bars)


def midpoint_image(x0: Vector, previous_x0: Vector, sigma_before: float, sigma: float, sigma_next: float) -> Vector:
    """x_0 extrapolated to the middle, in λ, of the step from σ to σ_next; previous_x0 was seen at σ_before."""
    h, h_before = math.log(sigma / sigma_next), math.log(sigma_before / sigma)
    return x0 + h / (2 * h_before) * (x0 - previous_x0)


def _third_order_step(x: Vector, images: tuple[Vector, Vector, Vector], z: Vector, levels: Vector) -> Vector:
    """x at levels[-1]; the images seen, newest first, at the levels before it: [2] to [4], as many as there were."""
    h, *before = (math.log(high / low) for low, high in pairwise(levels[::-1]))
    kept = math.exp(-2 * h)
    next_x = kept * x + (1 - kept) * images[0] + levels[-1] * math.sqrt(1 - kept) * z
    phi_2 = 1 - (1 - kept) / (2 * h)
    if before:
        slope = h / before[0] * (images[0] - images[1])
        next_x = next_x + phi_2 * slope
    if len(before) == 2:
        bend = h / sum(before) * (slope - h / before[1] * (images[1] - images[2]))
        next_x = next_x + (phi_2 * before[0] / h - phi_2 / (2 * h) + 0.5) * bend
    return next_x


def _second_order(name: str, noise: NoiseSchedule, walk: Walk, stochastic: bool, integrated: bool = False) -> Table:
    if stochastic:
        require_falling(solver_stops, noise, walk)
    timesteps, start_sigmas = (stops[walk.begin :] for stops in solver_stops(noise, walk))
    sigmas = np.append(start_sigmas, min(final_sigma(noise), start_sigmas[-1]))
    (x, previous_x0), out, z = basis(2)
    n = len(timesteps)

    states = []
    for i in range(n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        alpha_bar, alpha_bar_next = 1 / (sigma**2 + 1), 1 / (sigma_next**2 + 1)
        x0, _ = noise.x0_and_eps(x, out, alpha_bar)
        shrink = sigma_next / sigma  # exp(-h)
        kept, up = (shrink**2, sigma_next * math.sqrt(1 - shrink**2)) if stochastic else (shrink, 0.0)
        image = x0
        # A step of length 0 (rounding makes one at T steps) leaves no slope to the step after it.
        if i > 0 and sigmas[i - 1] != sigma and not (i == n - 1 and _ends_first_order(noise, walk.begin + n)):
            image = midpoint_image(x0, previous_x0, sigmas[i - 1], sigma, sigma_next)
            if integrated and shrink < 1:  # ∫ 2u e^{-2(h-u)} du / ∫ 2 e^{-2(h-u)} du, where the midpoint has h / 2
                image = x0 + (image - x0) * (2 / (1 - kept) + 1 / math.log(shrink))
        next_x = kept / math.sqrt(alpha_bar) * x + (1 - kept) * image + up * z
        states.append([math.sqrt(alpha_bar_next) * next_x, x0])
    return assemble(name, walk.schedule, timesteps, states, alpha_bars=1 / (start_sigmas**2 + 1))


def _ends_first_order(noise: NoiseSchedule, n: int) -> bool:
    few = noise.lower_order_final is not False and n < FEW_STEPS
    return noise.final_sigmas_type == "zero" or noise.euler_at_final or few
