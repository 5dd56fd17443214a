"""The samplers and schedules without a diffusers twin, against the published algorithms, written out."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from fastsd.sampling import NoiseSchedule, make_table
from fastsd.sampling.sigma_schedules import beta_quantiles
from tests.measured import measured
from tests.sampling.sampler_cases import SD15, SD21, run_table
from tests.tolerances import SAMPLER_FP64

SHAPE = (2, 3)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE)
NOISES = np.random.default_rng(1).standard_normal((64, *SHAPE))
OFFSETS = np.random.default_rng(2).standard_normal((64, *SHAPE))
SCHEDULES = ("uniform", "karras", "exponential", "sgm_uniform", "simple", "beta", "align_your_steps")


def fake_model(x, timestep, call):
    return 0.5 * np.sin(x + timestep / 300) + 0.5 * OFFSETS[call]


def levels(schedule, steps, noise):
    """[steps + 1], as A1111's web UI computes them, on linspace spacing; "sgm_uniform" on diffusers' trailing."""
    train = np.sqrt(1 / noise.alphas_cumprod - 1)
    spread = np.interp(np.linspace(999, 0, steps), np.arange(1000), train)
    high, low, ramp = spread[0], spread[-1], np.linspace(0, 1, steps)
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    if steps == 1:  # linspace spacing of one step is timestep 0, in diffusers
        high = low = spread[0] = train[0]
    sigmas = {
        "uniform": lambda: spread,
        "karras": lambda: (high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7,
        "exponential": lambda: high ** (1 - ramp) * low**ramp,
        "sgm_uniform": lambda: [train[round(1000 - 1000 / steps * i) - 1] for i in range(steps)],
        "simple": lambda: [train[-1 - int(1000 / steps * i)] for i in range(steps)],
        "beta": lambda: low + scipy.stats.beta.ppf(1 - ramp, 0.6, 0.6) * (high - low),
        "align_your_steps": lambda: np.exp(np.interp(ramp, np.linspace(0, 1, 11), np.log(published))),
    }
    return np.append(sigmas[schedule](), 0.0)


class Denoiser:
    """k-diffusion's view of the UNet: (x, σ) → x_0, and how often it was asked."""

    def __init__(self, noise):
        self.calls = 0
        self.timestep = None  # of the next call, where σ is not all that is known
        self.is_v = noise.prediction_type == "v_prediction"
        self.log_sigmas = np.log(1 / noise.alphas_cumprod - 1) / 2

    def __call__(self, x, sigma):
        worked_back = np.interp(np.log(sigma), self.log_sigmas, np.arange(1000))
        timestep, self.timestep = worked_back if self.timestep is None else self.timestep, None
        scale = 1 / np.sqrt(1 + sigma**2)
        out = fake_model(x * scale, timestep, self.calls)
        self.calls += 1
        return x * scale**2 - sigma * scale * out if self.is_v else x - sigma * out


def ancestral(sigma, sigma_next):
    """DDPM's variance between the levels, and what is left to go."""
    up = np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    return np.sqrt(sigma_next**2 - up**2), up


def euler_ancestral(denoise, x, sigma, sigma_next, past):
    down, up = ancestral(sigma, sigma_next)
    slope = (x - denoise(x, sigma)) / sigma
    return x + slope * (down - sigma) + NOISES[denoise.calls - 1] * up


def dpmpp_2s_ancestral(denoise, x, sigma, sigma_next, past):
    """DPM-Solver++, algorithm 1, with r = 1/2, in t = -log σ and α = 1."""
    down, up = ancestral(sigma, sigma_next)
    x0 = denoise(x, sigma)
    if sigma_next == 0:
        return x0
    t, h = -np.log(sigma), np.log(sigma / down)
    middle = np.exp(-(t + h / 2))
    u = middle / sigma * x - np.expm1(-h / 2) * x0
    return down / sigma * x - np.expm1(-h) * denoise(u, middle) + NOISES[denoise.calls - 1] * up


def dpmpp_3m_sde(denoise, x, sigma, sigma_next, past):
    """x' = e^{-2h} x + ∫_0^h 2 e^{-2(h-u)} x_0(u) du + noise: the exact solution of the SDE in λ, where x_0(u) is the
    parabola through the last three images; of its quadratic term half is taken, as by DPM-Solver's authors."""
    x0 = denoise(x, sigma)
    past.append((-np.log(sigma), x0))
    if sigma_next == 0:
        return x0
    h = np.log(sigma / sigma_next)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    u = h * (nodes + 1) / 2
    places = np.array([time - past[-1][0] for time, _ in past[-3:]])
    images = np.array([image.ravel() for _, image in past[-3:]])
    parabola = np.linalg.solve(np.vander(places, increasing=True), images)
    parabola[2:] /= 2
    x0_at = np.vander(u, len(places), increasing=True) @ parabola  # [20, pixels]
    change = (h * weights * np.exp(2 * (u - h)) @ x0_at).reshape(SHAPE)
    return np.exp(-2 * h) * x + change + NOISES[denoise.calls - 1] * sigma_next * np.sqrt(-np.expm1(-2 * h))


ALGORITHMS = {
    "euler_ancestral": euler_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("config", [SD15, SD21], ids=["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ALGORITHMS)
def test_equals_the_published_algorithm(sampler, schedule, config, steps):
    noise = NoiseSchedule.from_config(config)
    table = make_table(noise, steps, sampler, schedule)
    sigmas = levels(schedule, steps, noise)
    denoise, past = Denoiser(noise), []
    x, ends = LATENTS * sigmas[0], []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if schedule == "uniform" and steps > 1:  # worked back from σ they would be off, between whole ones, by 1e-3
            denoise.timestep = np.linspace(999, 0, steps)[i]
        x = ALGORITHMS[sampler](denoise, x, sigma, sigma_next, past)
        ends.append((denoise.calls - 1, x))
    assert table.initial_scale == pytest.approx(sigmas[0], rel=1e-12)
    assert len(table) == denoise.calls
    _, reached = run_table(table, LATENTS, fake_model, NOISES)
    for call, expected in ends:
        error = (np.abs(reached[call] - expected) / (1 + np.abs(expected))).max()
        measured("relative error", error, SAMPLER_FP64)
        assert error <= SAMPLER_FP64, f"call {call}: relative error {error:.1e}"


@pytest.mark.parametrize("shape", [0.2, 0.6, 0.9, 1.0])
def test_beta_quantiles_equal_scipys(shape):
    shares = np.concatenate([np.linspace(0, 1, 101), np.logspace(-9, -1, 30), 1 - np.logspace(-9, -1, 30)])
    expected = scipy.stats.beta.ppf(shares, shape, shape)
    np.testing.assert_allclose(beta_quantiles(shares, shape), expected, rtol=1e-12, atol=1e-14)
