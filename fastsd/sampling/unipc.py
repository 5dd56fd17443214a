"""UniPC and DEIS: multistep solvers on x = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε, over the stops of DPM-Solver."""

from __future__ import annotations

import math

import numpy as np

from fastsd.sampling.dpm_solver import FEW_STEPS, midpoint_image
from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.sigma_schedules import SIGMA_SCHEDULES
from fastsd.sampling.spacing import Walk, solver_stops
from fastsd.sampling.table import Table, assemble, basis


def unipc(noise: NoiseSchedule, walk: Walk) -> Table:
    """Zhao et al. 2023, "UniPC", algorithms 5 to 8 with p = 2, B(h) = e^h - 1 and x_0 predicted.

    Each call's image first corrects the step that led to it, then predicts the next, by DPM-Solver++(2M)'s formula.
    """
    timesteps, sigmas = _stops(noise, walk, ends_at_zero=noise.final_sigmas_type == "zero")
    (x, old_y, x0_1, x0_2), out, _ = basis(4)  # old_y: the corrected x / sqrt(ᾱ) that the last step began with
    n = len(timesteps)

    states, order = [], 0
    for i in range(n):
        alpha_bar, alpha_bar_next = 1 / (sigmas[i] ** 2 + 1), 1 / (sigmas[i + 1] ** 2 + 1)
        x0, _ = noise.x0_and_eps(x, out, alpha_bar)
        y = x / math.sqrt(alpha_bar)
        if i > 0 and sigmas[i - 1] != sigmas[i]:
            y = _corrected(old_y, (x0, x0_1, x0_2), sigmas[i - order : i + 1])
        order = 2 if _has_slope(sigmas, i) and not (i == n - 1 and noise.lower_order_final is not False) else 1
        image = midpoint_image(x0, x0_1, *sigmas[i - 1 : i + 2]) if order == 2 else x0
        shrink = sigmas[i + 1] / sigmas[i]
        next_y = shrink * y + (1 - shrink) * image
        states.append([math.sqrt(alpha_bar_next) * next_y, y, x0, x0_1])
    return assemble("unipc", walk.schedule, timesteps, states, alpha_bars=1 / (sigmas[:-1] ** 2 + 1))


def deis(noise: NoiseSchedule, walk: Walk) -> Table:
    """Zhang & Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator": ρAB-DEIS of order 2, the slope
    linear in log ρ = log σ as in diffusers.

    It ends at the noise of timestep 0, not at 0, and at the last level of a schedule of levels, where the last step stands
    still: as in diffusers.
    """
    timesteps, sigmas = _stops(noise, walk, ends_at_zero=False)
    (x, old_eps), out, _ = basis(2)
    n = len(timesteps)

    states = []
    for i in range(n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        alpha_bar, alpha_bar_next = 1 / (sigma**2 + 1), 1 / (sigma_next**2 + 1)
        _, eps = noise.x0_and_eps(x, out, alpha_bar)
        few = noise.lower_order_final is not False and walk.begin + n < FEW_STEPS
        if _has_slope(sigmas, i) and not (i == n - 1 and few):
            before = sigmas[i - 1]
            change = _log_area(sigma, sigma_next, before) * eps - _log_area(sigma, sigma_next, sigma) * old_eps
            change = change / math.log(sigma / before)
        else:
            change = (sigma_next - sigma) * eps
        states.append([math.sqrt(alpha_bar_next) * (x / math.sqrt(alpha_bar) + change), eps])
    return assemble("deis", walk.schedule, timesteps, states, alpha_bars=1 / (sigmas[:-1] ** 2 + 1))


def _stops(noise: NoiseSchedule, walk: Walk, ends_at_zero: bool) -> tuple[Vector, Vector]:
    """[n] timesteps, and [n+1] noise levels: at the start of each step and after the last."""
    timesteps, sigmas = solver_stops(noise, walk)
    last = sigmas[-1] if walk.schedule in SIGMA_SCHEDULES else float(noise.sigmas[0])
    return timesteps[walk.begin :], np.append(sigmas[walk.begin :], 0.0 if ends_at_zero else last)


def _has_slope(sigmas: Vector, i: int) -> bool:
    """Whether step i can be of second order: there was a step before it, not of length 0 (rounding makes one at T steps),
    and it does not go to σ = 0."""
    return i > 0 and sigmas[i - 1] != sigmas[i] and sigmas[i + 1] > 0


def _corrected(y: Vector, images: tuple[Vector, Vector, Vector], sigmas: Vector) -> Vector:
    """UniC: the step from sigmas[-2] to sigmas[-1] again, with the image seen at its end.

    images: at the step's end, at its start, at the start of the step before it; sigmas [3], or [2] for the first order.
    """
    end, start, before = images
    h = math.log(sigmas[-2] / sigmas[-1])
    shrink = math.exp(-h)
    if len(sigmas) == 2:
        return shrink * y + (1 - shrink) * (start + (end - start) / 2)
    # The two equations of the paper's (5): the weights' sum, and their sum times the places r = (-h_before / h, 1).
    r = -math.log(sigmas[0] / sigmas[1]) / h
    phi_2 = (1 - shrink) / h - 1
    phi_3 = -phi_2 / h - 1 / 2
    total, moment = phi_2 / (shrink - 1), 2 * phi_3 / (shrink - 1)
    of_before = (moment - total) / (r - 1)
    return shrink * y + (1 - shrink) * (start + of_before * (before - start) / r + (total - of_before) * (end - start))


def _log_area(sigma: float, sigma_next: float, zero: float) -> float:
    """The integral of log(ρ / zero) from ρ = sigma to sigma_next."""
    return sigma_next * (math.log(sigma_next / zero) - 1) - sigma * (math.log(sigma / zero) - 1)
