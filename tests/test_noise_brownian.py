"""step_noise="brownian": the SDE samplers' noise from a Brownian path, as torchsde makes it and k-diffusion uses it."""

from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
import torchsde
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor

import fastsd
from fastsd.brownian import BrownianNoise, BrownianPath
from fastsd.errors import ParameterError
from fastsd.noise import randn, seeded
from fastsd.philox import Philox
from fastsd.replay import read_replay
from fastsd.sampling import SAMPLERS, NoiseSchedule, make_table
from tests import oracle
from tests.sampling.sampler_cases import SD15, SD21
from tests.test_modes import generators, with_scheduler

SHAPE = (4, 6, 5)
RED = "a large red circle in the center on a white background"
SEEDS = [0, 7, 2**31, 2**64 - 1]
CPU = torch.device("cpu")
BROWNIAN = [info.id for info in SAMPLERS.values() if info.brownian]

# torchsde warns that a float32 level lies beyond the walk's end, which it has rounded.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t")


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def levels(steps: int) -> Tensor:
    """Karras', in float32 as k-diffusion computes them."""
    ramp = torch.linspace(0, 1, steps)
    return (14.6146 ** (1 / 7) + ramp * (0.0292 ** (1 / 7) - 14.6146 ** (1 / 7))) ** 7


@pytest.mark.parametrize("steps", [2, 5, 30])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_path_is_torchsdes(seed: int, steps: int) -> None:
    """To the last bit, and also half-way down a step, as DPM++ SDE asks."""
    sigmas = levels(steps)
    theirs = BrownianTreeNoiseSampler(torch.zeros(1, *SHAPE), sigmas[-1], sigmas[0], seed=[seed])
    ours = BrownianPath(seed, float(sigmas[-1]), float(sigmas[0]), draw)
    for sigma, sigma_next in pairwise(sigmas):
        for to in ((sigma * sigma_next).sqrt(), sigma_next):
            found, expected = ours.unit_noise(float(sigma), float(to)), theirs(sigma, to)[0]
            oracle.assert_equal(found, expected, f"noise from {sigma:.4f} to {to:.4f}")


def test_a_path_is_not_on_the_callers_default_device() -> None:
    ours = [BrownianPath(3, 0.03, 14.6, draw).unit_noise(9.0, 2.5)]
    with torch.device("meta"):
        path = BrownianPath(3, 0.03, 14.6, lambda seed: randn(SHAPE, seeded(seed, "cpu")))
        ours.append(path.unit_noise(9.0, 2.5))
    oracle.assert_equal(ours[1], ours[0], "with another default device")


@pytest.mark.parametrize("high", [14.6146, 4096.0, 1e4])
def test_no_noise_is_drawn_twice_in_a_walk(high: float) -> None:
    """What lies on the way to both ends of a step is kept for the step that begins where it ended."""
    drawn: list[int] = []
    path = BrownianPath(3, 0.0292, high, lambda seed: drawn.append(seed) or torch.zeros(1))
    for sigma, sigma_next in pairwise(np.geomspace(high, 0.0292, 30).tolist()):
        path.unit_noise(sigma, sigma_next)
    assert len(set(drawn)) == len(drawn), f"{len(drawn)} noises drawn, where the walk has {len(set(drawn))}"


def test_a_path_does_not_hang_on_what_is_asked() -> None:
    first, second = (BrownianPath(3, 0.03, 14.6, draw) for _ in range(2))
    expected = [first.unit_noise(high, low) for high, low in ((14.6, 9.0), (9.0, 2.5), (2.5, 0.03))]
    found = [second.unit_noise(high, low) for high, low in ((2.5, 0.03), (9.0, 2.5), (14.6, 9.0))]
    oracle.assert_equal(torch.stack(found[::-1]), torch.stack(expected), "asked backwards")
    whole = sum(n * length**0.5 for n, length in zip(expected, (5.6, 6.5, 2.47), strict=True)) / 14.57**0.5
    oracle.assert_close(second.unit_noise(14.6, 0.03), whole, 1e-5, "the pieces together")


def test_increments_are_unit_and_independent() -> None:
    path = BrownianPath(5, 0.03, 14.6, lambda seed: randn((4, 60, 60), seeded(seed, "gpu")))
    drawn = [path.unit_noise(high, low).flatten().numpy() for high, low in ((14.6, 3.0), (3.0, 0.5), (0.5, 0.03))]
    for noise in drawn:
        assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    correlation = np.corrcoef(drawn) - np.eye(3)
    assert np.abs(correlation).max() < 0.04, f"the steps' noises hang together: {correlation}"


@pytest.mark.parametrize("rng", ["cpu", "gpu"])
@pytest.mark.parametrize("sampler", BROWNIAN)
def test_noise_of_a_walk(sampler: str, rng: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image's from its own seed, between the levels that k-diffusion asks: from a step's start, also at its second call.
    With rng="gpu" torchsde's own draws are a CUDA device's, as the web UI has it."""
    module = torchsde._brownian.brownian_interval
    if rng == "gpu":
        monkeypatch.setattr(module, "_randn", lambda size, *_: torch.from_numpy(Philox(int(_[-1])).normal(*size)))
    noise = NoiseSchedule.from_config(SD15)
    table = make_table(noise, 6, sampler, "karras")
    alpha_bars = table.model_input[:, 0] ** 2 if table.alpha_bars is None else table.alpha_bars
    starts = np.append(np.sqrt(1 / alpha_bars - 1), 0.0)
    calls = 2 if sampler == "dpmpp_sde" else 1
    spans = [(starts[i - i % calls], starts[i + 1]) for i in range(len(table) - 1)]
    ours = BrownianNoise([3, 8], rng, table, noise)
    size = (5, 6, 4)
    theirs = BrownianTreeNoiseSampler(
        torch.zeros(2, 4, 5, 6), np.float32(starts[-2]).item(), np.float32(starts[0]).item(), seed=[3, 8]
    )
    for sigma, sigma_next in spans:
        expected = theirs(torch.tensor(sigma, dtype=torch.float32), torch.tensor(sigma_next, dtype=torch.float32))
        oracle.assert_equal(oracle.nchw(ours.draw(*size, CPU)), expected, f"noise from {sigma:.4f} to {sigma_next:.4f}")


@pytest.mark.parametrize("schedule", ["uniform", "karras"])
def test_dpmpp_sde_draws_what_diffusers_draws(
    pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline, schedule: str
) -> None:
    """The whole picture: diffusers' DPMSolverSDEScheduler draws from a path of its `noise_sampler_seed`."""
    theirs = with_scheduler(
        diffusers.StableDiffusionPipeline(**diffusers_pipe.components, requires_safety_checker=False),
        "dpmpp_sde",
        schedule,
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler.noise_sampler_seed = 5
    given: dict[str, Any] = {"num_inference_steps": 6, "output_type": "np"}
    expected = theirs(RED, generator=generators(5), **given).images
    asked = {"sampler": "dpmpp_sde", "schedule": schedule, "seed": 5} | given
    ours = pipe.generate(RED, step_noise="brownian", **asked).images
    oracle.assert_same_picture(ours, expected, schedule)
    assert oracle.psnr(pipe.generate(RED, **asked).images, expected) < 40, "independent noise gives the same picture"


@pytest.mark.parametrize("sampler", BROWNIAN)
def test_an_image_of_a_batch_comes_out_alone(pipe: fastsd.Pipeline, sampler: str) -> None:
    given: dict[str, Any] = {"sampler": sampler, "schedule": "karras", "num_inference_steps": 3}
    given |= {"step_noise": "brownian", "output_type": "np"}
    together = pipe.generate(RED, seed=5, num_images_per_prompt=2, **given).images
    alone = pipe.generate(RED, seed=6, **given).images
    oracle.assert_same_picture(alone[0], together[1], sampler)


ZERO_SNR = SD21 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize(
    ("sampler", "config"), [*((id, SD15) for id in BROWNIAN), ("dpmpp_2m_sde", ZERO_SNR)], ids=[*BROWNIAN, "zero SNR"]
)
def test_every_step_count(sampler: str, config: dict[str, Any], steps: int) -> None:
    """One step needs no noise; of a thousand some are of length 0 and need none."""
    noise = NoiseSchedule.from_config(config)
    table = make_table(noise, steps, sampler)
    needed = sum(table.needs_noise(step) for step in range(len(table)))
    source = BrownianNoise([1], "cpu", table, noise)
    for _ in range(min(needed, 3)):
        assert source.draw(2, 2, 4, CPU).isfinite().all()
    assert len(source.spans) == needed


def test_steps_that_are_too_short_are_refused() -> None:
    noise = NoiseSchedule.from_config(SD15)
    table = make_table(noise, 20, "dpmpp_3m_sde", sigmas=[3.0, 1.0000001, 1.0])
    with pytest.raises(ParameterError, match=r"^step_noise: brownian takes no step as short as σ 1 to 1$"):
        BrownianNoise([1], "cpu", table, noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_noise": "pink"}, "step_noise: 'pink' is unknown; choose one of independent, brownian"),
        ({"step_noise": "brownian", "generator": torch.Generator()}, "step_noise: .* give seed instead of generator"),
    ],
)
def test_wrong_arguments(pipe: fastsd.Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^{message}"):
        pipe.generate(RED, num_inference_steps=1, **arguments)


def test_samplers_that_take_none_say_so(pipe: fastsd.Pipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latent", "sampler": "Euler a"}
    ours = pipe.generate(RED, step_noise="brownian", **given)
    assert any(line.startswith("step_noise: brownian has no effect on euler_ancestral") for line in ours.warnings)
    oracle.assert_equal(ours.images, pipe.generate(RED, **given).images, "latents")


def test_the_file_says_it_and_replay_heeds_it(pipe: fastsd.Pipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "sampler": "DPM++ 2M SDE", "schedule": "karras"}
    drawn = pipe.generate(RED, step_noise="brownian", output_type="latent", **given)
    again = pipe.generate(**read_replay(drawn.parameters[0]).arguments | {"output_type": "latent"})
    oracle.assert_equal(again.images, drawn.images, "the replayed picture")
    independent = pipe.generate(RED, output_type="latent", **given)
    assert "step_noise" not in read_replay(independent.parameters[0]).arguments


def test_the_web_uis_sde_samplers_are_brownian() -> None:
    text = "red\nSteps: 20, Sampler: {}, Schedule type: Karras, CFG scale: 7, Seed: 5, Version: v1.9.3"
    for label in ("DPM++ 2M SDE", "DPM++ SDE", "DPM++ 3M SDE"):
        assert read_replay(text.format(label)).arguments["step_noise"] == "brownian"
    assert "step_noise" not in read_replay(text.format("DPM++ 2S a")).arguments
