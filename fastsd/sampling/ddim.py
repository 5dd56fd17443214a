"""DDPM and DDIM: the samplers that walk ᾱ_t directly."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import Walk, spaced_timesteps
from fastsd.sampling.table import Table, assemble, basis


def ddpm(noise: NoiseSchedule, walk: Walk) -> Table:
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7, with the small fixed variance."""
    timesteps = walk.timesteps
    if timesteps is None:
        timesteps = spaced_timesteps(noise, walk.steps, default="leading").round()
    (x,), out, z = basis(1)
    alpha_bars = np.append(noise.alphas_cumprod[timesteps.astype(int)], 1.0)

    states = []
    for a_t, a_prev in pairwise(alpha_bars):
        x0, _ = noise.x0_and_eps(x, out, a_t)
        alpha = a_t / a_prev
        mean = (math.sqrt(a_prev) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - a_prev) * x) / (1 - a_t)
        states.append([mean + _posterior_std(a_t, a_prev) * z])
    return assemble("ddpm", walk.schedule, timesteps, states)


def ddim(noise: NoiseSchedule, walk: Walk) -> Table:
    """Song et al. 2020, "Denoising Diffusion Implicit Models", equation 12; η of equation 16 is walk.eta, by default 0."""
    timesteps = spaced_timesteps(noise, walk.steps, default="leading").round()
    # As in diffusers, every step has this length, even where rounding or the spacing puts the next timestep elsewhere.
    stride = noise.train_steps // walk.steps
    (x,), out, z = basis(1)

    states = []
    for t in timesteps:
        a_t = float(noise.alphas_cumprod[int(t)])
        a_prev = alpha_bar_or_final(noise, int(t) - stride, to_one=True)
        x0, eps = noise.x0_and_eps(x, out, a_t)
        std = (walk.eta or 0.0) * _posterior_std(a_t, a_prev)
        states.append([math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - std**2) * eps + std * z])
    return assemble("ddim", walk.schedule, timesteps, states)


def alpha_bar_or_final(noise: NoiseSchedule, timestep: int, to_one: bool) -> float:
    """ᾱ at a timestep; below 0 the end of the walk, ᾱ = 1 or ᾱ_0, as the checkpoint says, else `to_one`."""
    if timestep >= 0:
        return float(noise.alphas_cumprod[timestep])
    ends_at_one = to_one if noise.set_alpha_to_one is None else noise.set_alpha_to_one
    return 1.0 if ends_at_one else float(noise.alphas_cumprod[0])


def transfer(x0: Vector, eps: Vector, alpha_bar: float) -> Vector:
    """The same image with the same noise at another noise level."""
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps


def _posterior_std(a_t: float, a_prev: float) -> float:
    """Standard deviation of q(x_prev | x_t, x_0)."""
    return math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
