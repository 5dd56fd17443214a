"""Schedules of noise levels: at which σ, between the highest and the lowest, the steps of a walk start."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastsd.sampling.schedule import Vector

BETA_SHAPE = 0.6  # both parameters of the distribution; the paper's choice

# Sabour et al. 2024, "Align Your Steps": the levels optimised for Stable Diffusion 1.5, ten steps and their end.
ALIGNED_SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def karras_sigmas(highest: float, lowest: float, steps: int, rho: float = 7.0) -> Vector:
    """[steps], Karras et al. 2022, "Elucidating the Design Space", equation 5, without its final 0."""
    ramp = np.linspace(0, 1, steps)
    return (highest ** (1 / rho) + ramp * (lowest ** (1 / rho) - highest ** (1 / rho))) ** rho


def exponential_sigmas(highest: float, lowest: float, steps: int) -> Vector:
    """[steps], equal steps in log σ."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def beta_sigmas(highest: float, lowest: float, steps: int) -> Vector:
    """[steps], Lee et al. 2024, "Beta Sampling is All You Need": dense at both ends. As in diffusers and A1111's web UI the
    quantiles are of σ, where the paper's are of t."""
    return lowest + beta_quantiles(1 - np.linspace(0, 1, steps)) * (highest - lowest)


def align_your_steps_sigmas(highest: float, lowest: float, steps: int) -> Vector:
    """[steps], the published levels, interpolated in log σ, whatever the range: as in A1111's web UI."""
    places = np.linspace(0, len(ALIGNED_SIGMAS) - 1, steps)
    return np.exp(np.interp(places, np.arange(len(ALIGNED_SIGMAS)), np.log(ALIGNED_SIGMAS)))


SIGMA_SCHEDULES: dict[str, Callable[[float, float, int], Vector]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
    "align_your_steps": align_your_steps_sigmas,
}


def beta_quantiles(shares: Vector, shape: float = BETA_SHAPE) -> Vector:
    """The x in [0, 1] below which each share, in [0, 1], of a Beta(shape, shape) variable lies; shape in (0, 1].

    Newton's method for I_x(a, a) = share in y = x^a, with I_x's power series at 0 (DLMF 8.17.7): it is convex in y, and
    the start, its tangent at 0, lies above the root. The upper half is the lower one mirrored, so that x ≤ 0.6.
    """
    a = shape
    scale = a * math.gamma(a) ** 2 / math.gamma(2 * a)  # a B(a, a)
    k = np.arange(1, 100)
    series = np.concatenate([[1.0], np.cumprod((k - a) / k) * a / (a + k)])  # (1-a)_k / k! · a / (a + k)
    lower = np.minimum(shares, 1 - shares)
    y = lower * scale
    for _ in range(8):
        x = y ** (1 / a)
        share = y / scale * (x[:, None] ** np.arange(100) @ series)
        y -= (share - lower) * scale * (1 - x) ** (1 - a)
    x = y ** (1 / a)
    return np.where(shares > 0.5, 1 - x, x)
