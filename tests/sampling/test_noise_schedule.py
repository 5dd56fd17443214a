"""Reading scheduler_config.json: the betas of each kind, and what is refused."""

import math

import diffusers
import numpy as np
import pytest

from fastsd.errors import CheckpointError
from fastsd.sampling import NoiseSchedule
from tests.sampling.sampler_cases import SD15, SMALL
from tests.tolerances import ALPHA_BAR, ZERO_SNR


@pytest.mark.parametrize(
    "config",
    [
        SD15,
        SMALL,
        {},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
        {"trained_betas": [0.1, 0.2, 0.4]},
        {"beta_start": 0.001, "beta_end": 0.03, "beta_schedule": "linear", "num_train_timesteps": 50},
    ],
    ids=["sd15", "small", "bare", "cosine", "trained", "linear"],
)
def test_alphas_cumprod_equal_diffusers(config):
    noise = NoiseSchedule.from_config(config)
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
    assert noise.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(noise.alphas_cumprod, expected, rtol=ALPHA_BAR)


def test_sigmas_are_stable_diffusions():
    """0.0292 and 14.6146: the levels every Stable Diffusion program quotes."""
    sigmas = NoiseSchedule.from_config(SD15).sigmas
    assert sigmas[0] == pytest.approx(0.0292, abs=5e-5)
    assert sigmas[-1] == pytest.approx(14.6146, abs=5e-5)


def test_zero_terminal_snr_equals_diffusers():
    config = {**SD15, "rescale_betas_zero_snr": True}
    noise = NoiseSchedule.from_config(config)
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(noise.alphas_cumprod, expected, rtol=ZERO_SNR)
    assert noise.alphas_cumprod[-1] == 0
    assert noise.zero_terminal_snr
    assert not NoiseSchedule.from_config(SD15).zero_terminal_snr
    assert noise.sigmas[-1] == pytest.approx(4096, rel=1e-6)  # as in diffusers' classes that walk σ


def test_reads_what_the_config_says():
    noise = NoiseSchedule.from_config({**SD15, "prediction_type": "v_prediction", "timestep_spacing": "trailing"})
    assert (noise.sampler, noise.prediction_type, noise.timestep_spacing) == ("plms", "v_prediction", "trailing")
    assert (noise.steps_offset, noise.set_alpha_to_one, noise.train_steps) == (1, False, 1000)
    assert NoiseSchedule.from_config({}).timestep_spacing is None


def test_nulls_are_defaults():
    keys = ("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type")
    noise = NoiseSchedule.from_config({**SD15, **dict.fromkeys(keys)})
    assert (noise.prediction_type, noise.steps_offset, noise.final_sigmas_type) == ("epsilon", 0, "zero")


HUGE = 10**400  # JSON's integers have no end; a float's do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr = 'no': must be true or false"),
        ({"rescale_betas_zero_snr": True, "trained_betas": [0.1]}, "rescale_betas_zero_snr = True: needs at least two"),
        ({"original_inference_steps": 0}, "original_inference_steps = 0"),
        ({"timestep_scaling": 0}, "timestep_scaling = 0"),
        ({"thresholding": True}, "thresholding = True: not supported"),
        ({"timestep_type": "continuous"}, "timestep_type = 'continuous': not supported"),
        ({"interpolation_type": "log_linear"}, "interpolation_type"),
        ({"variance_type": "learned_range"}, "variance_type"),
        ({"sigma_max": 700.0}, "sigma_max"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ({"prediction_type": "flow_prediction"}, "prediction_type = .*must be one of epsilon, v_prediction, sample"),
        ({"timestep_spacing": "random"}, "timestep_spacing = .*must be one of leading, trailing, linspace$"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type = .*must be one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = .*must be one of linear, scaled_linear, squaredcos_cap_v2"),
        ({"steps_offset": -1}, "steps_offset = -1: must be an integer from 0"),
        ({"steps_offset": 0.5}, "steps_offset = 0.5: must be an integer from 0"),
        ({"steps_offset": HUGE}, "steps_offset"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0: must be a positive integer, at most 100000"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps = 'many'"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"beta_start": -0.1}, "beta_start = -0.1: must be a finite number above 0 and below 1"),
        ({"beta_end": 1.5}, "beta_end = 1.5: must be a finite number above 0 and below 1"),
        ({"beta_end": math.nan}, "beta_end = nan"),
        ({"beta_start": HUGE}, "beta_start = 1000"),
        ({"beta_end": 10**5000}, "beta_end = a huge int"),
        ({"beta_start": "0.1"}, "beta_start"),
        ({"beta_start": True}, "beta_start"),
        ({"beta_start": 1e-300, "beta_end": 1e-300}, "the betas .* must leave some of the image and of the noise"),
        ({"trained_betas": [0.9] * 1000}, "the betas .*trained_betas.* must leave some of the image"),
        ({"trained_betas": [0.1, 1e-300]}, "the betas .* must add noise at each timestep"),
        ({"trained_betas": [0.1, 0.0]}, "trained_betas"),
        ({"trained_betas": [0.1, 1.0]}, "trained_betas = .*: must be a list of finite numbers above 0 and below 1"),
        ({"trained_betas": [0.1, HUGE]}, "trained_betas"),
        ({"trained_betas": [0.1, True]}, "trained_betas"),
        ({"trained_betas": []}, "trained_betas = .*: must be a list of 1 to 100000 numbers"),
        ({"trained_betas": [1e-6] * 100_001}, "trained_betas = .*: must be a list of 1 to 100000 numbers"),
        ({"trained_betas": ["a"]}, "trained_betas"),
        ({"trained_betas": ["0.1"]}, "trained_betas"),
        ({"trained_betas": [[0.1], [0.2, 0.3]]}, "trained_betas"),
        ({"trained_betas": [[0.1, 0.2], [0.3, 0.4]]}, "trained_betas"),
        ({"trained_betas": 0.1}, "trained_betas"),
        # words that Python takes for true
        ({"lower_order_final": "no"}, "lower_order_final = 'no': must be true or false"),
        ({"euler_at_final": "no"}, "euler_at_final = 'no': must be true or false"),
        ({"set_alpha_to_one": "no"}, "set_alpha_to_one = 'no': must be true or false"),
        ({"use_karras_sigmas": "no"}, "use_karras_sigmas = 'no': must be true or false"),
        ({"_class_name": ["PNDMScheduler"]}, "_class_name"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else None,
)
def test_refuses_what_it_cannot_run(change, message):
    with pytest.raises(CheckpointError, match=f"^scheduler/scheduler_config.json: {message}") as raised:
        NoiseSchedule.from_config({**SD15, **change})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
