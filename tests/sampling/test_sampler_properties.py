"""What must hold of every table, whatever diffusers does."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.sampling import SAMPLERS, NoiseSchedule, make_table
from tests.sampling.sampler_cases import SD15, SD21, WALKS, run_table
from tests.tolerances import LANDING, NOISE_VARIANCE

# A 1000-step table: measured 5 to 10 ms, bounded where a user would begin to notice.
BUILD_SECONDS = 0.5

SLOTS = 5  # of fastsd.denoise, which needs torch
TWO_STAGE = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "unipc", "deis")  # spaced above timestep 0
T = 1000
SMALL_T = 40  # few enough timesteps to try every step count
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = (None, "leading", "trailing", "linspace")
NOISY = (
    "ddpm",
    "lcm",
    "tcd",
    "euler_ancestral",
    "dpm2_ancestral",
    "dpmpp_2s_ancestral",
    *(s for s in SAMPLERS if "sde" in s),
)
# DEIS ends at the noise of timestep 0, or of its last level.
LANDING_WALKS = [walk for walk in WALKS if walk[0] not in (*NOISY, "deis")]
NOISY_WALKS = [walk for walk in WALKS if walk[0] in NOISY and walk[0] not in ("lcm", "tcd")]
MOST_STEPS = {"lcm": 50, "tcd": 50}  # of those the model was distilled on


def schedule_for(prediction="epsilon", **change):
    return NoiseSchedule.from_config({**SD15, "set_alpha_to_one": True, "prediction_type": prediction, **change})


def alpha_bars(table, noise):
    """ᾱ at each UNet call."""
    signal, sigma = table.noise_levels(noise)[:-1].T
    return 1 / (1 + (sigma / signal) ** 2)


def perfect_model(table, noise, x0_of):
    """The exact output for data whose denoised image is x0_of(x, ᾱ)."""
    levels = alpha_bars(table, noise)

    def model(x, _, call):
        a, s = np.sqrt(levels[call]), np.sqrt(1 - levels[call])
        x0 = x0_of(x, levels[call])
        eps = (x - a * x0) / s
        return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[noise.prediction_type]

    return model


@given(
    steps=st.one_of(st.integers(1, 60), st.sampled_from([250, T])),
    walk=st.sampled_from(LANDING_WALKS),
    prediction=st.sampled_from(PREDICTIONS),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_lands_on_the_only_image_of_the_data(steps, walk, prediction):
    """x_0 is one fixed image: then the ideal ε is the same all the way, and no deterministic sampler errs at all.

    Leading spacing, steps_offset 0 and set_alpha_to_one: so DDIM's and PLMS' strides meet their timesteps and end at x_0
    (elsewhere diffusers stops just short of it at some step counts, and so do we). PLMS mixes
    raw outputs of several timesteps (as diffusers does), which is exact for ε and x_0 only.
    """
    sampler, schedule = walk
    if sampler == "plms" and prediction == "v_prediction":
        prediction = "epsilon"
    if sampler == "lms":
        steps = min(steps, 250)  # its alternating weights gather rounding errors: 5e-9 after 1000 steps
    noise = schedule_for(prediction, steps_offset=0)
    image = np.array([-3.0, -0.2, 0.0, 1.0, 7.0])
    latents = np.array([0.5, -2.0, 1.0, 3.0, -0.1])
    table = make_table(noise, steps, sampler, schedule)
    model = perfect_model(table, noise, lambda x, alpha_bar: image)
    _, reached = run_table(table, latents, model, np.zeros((len(table), 5)))
    np.testing.assert_allclose(reached[-1], image, rtol=LANDING, atol=LANDING)


@given(
    steps=st.integers(1, 60),
    walk=st.sampled_from(NOISY_WALKS),
    eta=st.sampled_from([None, 0.0, 0.4, 1.0]),
    prediction=st.sampled_from(PREDICTIONS),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_noisy_steps_keep_the_right_amount_of_noise(steps, walk, eta, prediction):
    """For a single image, x_0 = 0, the covariance of the state is known: state[0] is s ε before each step, whatever is saved."""
    sampler, schedule = walk if eta is None else ("ddim", "uniform")
    noise = schedule_for(prediction)
    table = make_table(noise, steps, sampler, schedule, eta=eta)
    sigmas = table.noise_levels(noise)[:, 1]
    model = perfect_model(table, noise, lambda x, alpha_bar: 0.0)  # x = s ε
    covariance = np.zeros((table.state_size, table.state_size))
    covariance[0, 0] = sigmas[0] ** 2
    for i, update in enumerate(table.update):
        of_state = update[:, :-2] + np.outer(update[:, -2] * model(1.0, None, i), table.model_input[i])
        covariance = of_state @ covariance @ of_state.T + np.outer(update[:, -1], update[:, -1])
        assert covariance[0, 0] == pytest.approx(sigmas[i + 1] ** 2, rel=1e-9, abs=NOISE_VARIANCE), (
            f"call {i} of {steps}"
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("sampler", "schedule"), WALKS)
def test_every_step_count_gives_a_sound_table(sampler, schedule, spacing, prediction):
    noise = schedule_for(prediction, num_train_timesteps=SMALL_T, timestep_spacing=spacing)
    for steps in (
        range(1, SMALL_T + 1) if schedule == "uniform" and prediction == "epsilon" else (1, 2, SMALL_T - 1, SMALL_T)
    ):
        if spacing == "leading" and schedule == "uniform" and steps == SMALL_T and sampler in SOLVERS:
            continue  # refused: see test_sampler_names
        table = make_table(noise, steps, sampler, schedule, eta=1.0)
        calls = 2 * steps - 1 if sampler in TWO_STAGE else steps + 1 if sampler == "plms" and steps > 1 else steps
        assert len(table) == calls
        assert table.state_size <= SLOTS
        for part in (table.timesteps, table.model_input, table.update, table.initial_scale):
            assert np.all(np.isfinite(part)), f"{steps} steps"
        assert table.timesteps.min() >= 0, f"{steps} steps"
        assert table.timesteps.max() <= SMALL_T - 1 + 1e-9, f"{steps} steps"
        assert np.all(np.diff(table.timesteps) <= (0.5 if sampler in TWO_STAGE else 0)), f"{steps} steps"
        # DDIM's stride may stop short of x_0 (as in diffusers), and then eta = 1 calls for noise.
        assert sampler == "ddim" or not table.needs_noise(len(table) - 1), f"{steps} steps"


@pytest.mark.parametrize("steps", [T - 1, T])
@pytest.mark.parametrize(
    ("sampler", "schedule"), [walk for walk in WALKS if walk[1] in ("uniform", "beta") and walk[0] not in MOST_STEPS]
)
def test_as_many_steps_as_training_had(sampler, schedule, steps):
    """No room is left for steps_offset = 1 here: diffusers' PNDM, DDIM and DDPM fail on timestep 1000."""
    start = time.perf_counter()
    table = make_table(NoiseSchedule.from_config(SD15), steps, sampler, schedule)
    seconds = time.perf_counter() - start
    assert np.all(np.isfinite(table.update))
    assert table.timesteps.max() <= T - 1 + 1e-9
    assert seconds < BUILD_SECONDS


def flow_error(sampler, schedule, steps):
    """Relative error at the end, for data N(0, 2²): the exact flow carries x along with the standard deviation of x_t."""
    noise = schedule_for(timestep_spacing="leading" if sampler in ("ddim", "plms") else "linspace")
    table = make_table(noise, steps, sampler, schedule)

    def variance(alpha_bar):
        return 4.0 * alpha_bar + 1 - alpha_bar

    model = perfect_model(table, noise, lambda x, alpha_bar: 4.0 * np.sqrt(alpha_bar) / variance(alpha_bar) * x)
    (first, *_), reached = run_table(table, np.ones(1), model, np.zeros((len(table), 1)))
    exact = 2.0 * first / np.sqrt(variance(alpha_bars(table, noise)[0]))
    return abs(reached[-1] / exact - 1)[0]


@pytest.mark.parametrize(
    ("sampler", "schedule", "ratio", "largest"),
    [
        ("ddim", "uniform", 2, 3e-2),
        ("euler", "uniform", 2, 3e-2),
        ("euler", "karras", 2, 3e-2),
        # Multistep, but the last step to σ = 0 is of first order and, in uniform spacing, starts the higher the fewer steps.
        ("plms", "uniform", 2, 1e-3),
        ("dpmpp_2m", "uniform", 2, 3e-3),
        ("dpmpp_2m", "karras", 4, 2e-3),
        ("unipc", "karras", 4, 2e-3),
        ("heun", "karras", 4, 2e-3),
        ("dpm2", "karras", 4, 2e-3),
        ("lms", "karras", 4, 2e-3),
    ],
)
def test_samplers_converge_to_the_same_flow(sampler, schedule, ratio, largest):
    coarse, fine = flow_error(sampler, schedule, 25), flow_error(sampler, schedule, 50)
    assert fine < largest, f"50 steps err by {fine:.2e}"
    assert coarse / fine > 0.85 * ratio, f"25 steps err by {coarse:.2e}, 50 steps by {fine:.2e}"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_ddim_is_euler_on_the_same_timesteps(steps, prediction):
    """Song et al. 2020, section 4.3: DDIM is Euler's method in σ, here to the last digits."""
    noise = schedule_for(prediction, timestep_spacing="leading")
    latents = np.linspace(-2, 2, 7)
    ends = []
    for sampler in ("ddim", "euler"):
        table = make_table(noise, steps, sampler)
        model = lambda x, timestep, call: np.sin(2 * x + timestep)  # noqa: E731
        ends.append(run_table(table, latents, model, np.zeros((steps, 7)))[1][-1])
    np.testing.assert_allclose(*ends, rtol=LANDING, atol=LANDING)


@given(
    walk=st.sampled_from(WALKS),
    steps=st.integers(1, 30),
    a=st.floats(-5, 5),
    b=st.floats(-5, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_whole_walk_is_linear(walk, steps, a, b):
    """For a linear model the walk maps a·u + b·v to a·U + b·V, also through PLMS' and DPM-Solver's histories."""
    table = make_table(NoiseSchedule.from_config(SD21), steps, *walk)
    rng = np.random.default_rng(steps)
    weight = rng.standard_normal((6, 6)) / 6
    u, v = rng.standard_normal((2, 6))
    noise_u, noise_v = rng.standard_normal((2, len(table), 6))

    def end(latents, noises):
        return run_table(table, latents, lambda x, timestep, call: weight @ x, noises)[1][-1]

    expected = a * end(u, noise_u) + b * end(v, noise_v)
    np.testing.assert_allclose(end(a * u + b * v, a * noise_u + b * noise_v), expected, rtol=1e-8, atol=1e-8)


def test_eta_is_for_those_that_say_so():
    noise = NoiseSchedule.from_config(SD15)
    for sampler, info in SAMPLERS.items():
        still, stirred, default = (make_table(noise, 10, sampler, eta=eta).update for eta in (0.0, 1.0, None))
        assert np.array_equal(still, stirred) == (info.default_eta is None), sampler
        assert np.array_equal(default, make_table(noise, 10, sampler, eta=info.default_eta or 0.0).update), sampler
