"""LCM and TCD: samplers of few steps, for consistency models distilled from Stable Diffusion."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from fastsd.errors import ParameterError
from fastsd.sampling.ddim import transfer
from fastsd.sampling.schedule import NoiseSchedule, Vector
from fastsd.sampling.spacing import Walk
from fastsd.sampling.table import Table, assemble, basis

SIGMA_DATA = 0.5  # of the latents, in the consistency function's boundary condition
TCD_ETA = 0.3  # diffusers' default


def lcm(noise: NoiseSchedule, walk: Walk) -> Table:
    """Luo et al. 2023, "Latent Consistency Models", algorithm 3: to the image, by the consistency function of appendix C,
    then fresh noise up to the next level; the last step ends at the image."""
    timesteps = _timesteps(noise, walk)
    (x,), out, z = basis(1)
    states = []
    for i, t in enumerate(timesteps):
        x0, _ = noise.x0_and_eps(x, out, _alpha_bar(noise, t))
        scaled = t * noise.timestep_scaling
        radius = math.hypot(scaled, SIGMA_DATA)
        image = (SIGMA_DATA / radius) ** 2 * x + scaled / radius * x0
        ends = i == len(timesteps) - 1
        states.append([image if ends else transfer(image, z, _alpha_bar(noise, timesteps[i + 1]))])
    return assemble("lcm", walk.schedule, timesteps, states)


def tcd(noise: NoiseSchedule, walk: Walk) -> Table:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4: along the trajectory to s = (1 - γ) t', then
    fresh noise up to t'. γ is walk.eta, by default 0.3.

    As in diffusers, the walk ends at timestep 0 and its noise, and s is cut to a whole number in float32.
    """
    timesteps = _timesteps(noise, walk)
    gamma = TCD_ETA if walk.eta is None else walk.eta
    (x,), out, z = basis(1)
    states = []
    for t, t_next in pairwise(np.append(timesteps, 0.0)):
        x0, eps = noise.x0_and_eps(x, out, _alpha_bar(noise, t))
        a_next = _alpha_bar(noise, t_next)
        a_s = _alpha_bar(noise, np.floor(np.float32(1 - gamma) * np.float32(t_next)))
        states.append([math.sqrt(a_next / a_s) * transfer(x0, eps, a_s) + math.sqrt(1 - a_next / a_s) * z])
    return assemble("tcd", walk.schedule, timesteps, states)


def _timesteps(noise: NoiseSchedule, walk: Walk) -> Vector:
    """[n], evenly taken of those the model was distilled on."""
    if walk.timesteps is not None:
        return walk.timesteps
    most = min(noise.distilled_steps, noise.train_steps)
    if walk.steps > most:
        raise ParameterError(
            f"num_inference_steps: {walk.steps} is out of range; the model was distilled on {most} timesteps, so at most {most}"
        )
    distilled = np.arange(most, 0.0, -1) * (noise.train_steps // most) - 1
    return distilled[np.floor(np.arange(walk.steps) * (most / walk.steps)).astype(int)]


def _alpha_bar(noise: NoiseSchedule, timestep: float) -> float:
    return float(noise.alphas_cumprod[int(timestep)])
