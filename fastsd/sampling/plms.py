"""PLMS: DDIM's step, taken with an extrapolated model output."""

from __future__ import annotations

import numpy as np

from fastsd.sampling.ddim import alpha_bar_or_final, transfer
from fastsd.sampling.schedule import NoiseSchedule
from fastsd.sampling.spacing import Walk, spaced_timesteps
from fastsd.sampling.table import Table, assemble, basis


def plms(noise: NoiseSchedule, walk: Walk) -> Table:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models", equations 9 and 12, without Runge-Kutta steps.

    The first step is taken twice, the second time with the mean of the outputs at both its ends (as CompVis does): n is
    steps + 1, or 1 for a single step. Orders 2, 3, 4 follow as the history grows. Raw outputs are mixed, whatever the
    prediction type, and the mix is read at the current x: diffusers does so, and for epsilon it is the paper.

    A walk that begins later takes its first step twice as well, but from the timesteps of the whole walk, as diffusers does:
    from then on x is a step noisier than the UNet is told.
    """
    stops = spaced_timesteps(noise, walk.steps, default="leading").round()
    timesteps = np.concatenate([stops[:2], stops[1:]])[walk.begin :]
    stride = noise.train_steps // walk.steps
    # The saved x of the first step shares a slot with the oldest output, which is not needed before the fifth call.
    (x, e1, e2, e3), out, _ = basis(4)
    saved_x = e3

    states = []
    for i, t in enumerate(timesteps.astype(int)):
        start, end, origin = t, t - stride, x
        if i == 0:
            e = out
        elif i == 1:
            start, end, origin = t + stride, t, saved_x
            e = (out + e1) / 2
        elif i == 2:
            e = (3 * out - e1) / 2
        elif i == 3:
            e = (23 * out - 16 * e1 + 5 * e2) / 12
        else:
            e = (55 * out - 59 * e1 + 37 * e2 - 9 * e3) / 24
        x0, eps = noise.x0_and_eps(origin, e, noise.alphas_cumprod[start])
        next_x = transfer(x0, eps, alpha_bar_or_final(noise, end, to_one=False))
        if i == 0:
            states.append([next_x, out, e2, x])
        elif i == 1:  # the history keeps the output at the start of the first step only
            states.append([next_x, e1, e2, e3])
        else:
            states.append([next_x, out, e1, e2])
    return assemble("plms", walk.schedule, timesteps, states)
