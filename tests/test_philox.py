"""rng="gpu": a CUDA device's random numbers, made on any machine, and the pictures drawn from them."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import triton
import triton.language as tl

import fastsd
from fastsd.errors import ParameterError
from fastsd.jobs import check_job, check_requests
from fastsd.metadata import parse_parameters
from fastsd.noise import NoiseSource
from fastsd.philox import FEWEST_THREADS, Philox, philox4x32
from fastsd.replay import read_replay
from tests import oracle
from tests.measured import measured
from tests.tolerances import CUDA_NOISE

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result. The last are digits of π.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# What torch.manual_seed(0); torch.randn(8, 8, device="cuda") prints, as published with PyTorch 2.2 in a lecture of GPU MODE on
# fused kernels; its first 12 are in many places, the web UI's among them.
PRINTED = [
    [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284],
    [-1.0745, -0.3631, -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820],
    [-0.1271, 1.2169, 1.4353, 1.0605, -0.4941, -1.4244, -0.7244, -1.2973],
    [0.0697, -0.0074, 1.8969, 0.6878, -0.0779, -0.8373, 1.3506, -0.2879],
    [-0.5965, -0.3283, -0.9086, -0.8059, -0.7407, -0.0504, 0.5435, 1.5150],
    [0.0141, 0.4532, 1.6349, 0.7124, -0.1806, 1.0252, -1.4622, -0.7554],
    [-0.1836, 0.3824, 0.3918, -0.0830, 0.8971, -1.1123, 0.1116, 0.4863],
    [-0.5499, -0.3231, -0.5469, 0.9049, 0.2837, 0.1210, 0.4730, -1.0823],
]
RED = "a large red circle in the center on a white background"
FAST: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_answers(counter: str, key: str, expected: str) -> None:
    oracle.assert_equal(philox4x32(words(counter)[:, None], words(key))[:, 0], words(expected), "Philox4x32-10")


@triton.jit
def philox_kernel(seed_ptr, counter_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    c0, c1 = tl.load(counter_ptr + at), tl.load(counter_ptr + N + at)
    c2, c3 = tl.load(counter_ptr + 2 * N + at), tl.load(counter_ptr + 3 * N + at)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out_ptr + at, r0)
    tl.store(out_ptr + N + at, r1)
    tl.store(out_ptr + 2 * N + at, r2)
    tl.store(out_ptr + 3 * N + at, r3)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 + 5, 2**63 - 1])
def test_the_cipher_is_tritons(seed: int) -> None:
    counter = np.random.default_rng(seed).integers(0, 2**32, (4, 64), dtype=np.uint32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = torch.from_numpy(counter.view(np.int32)).to(device)
    found = torch.empty_like(given)
    philox_kernel[(1,)](torch.tensor(seed, device=device), given, found, 64)
    ours = philox4x32(counter, Philox(seed).key)
    oracle.assert_equal(ours.view(np.int32), found.cpu(), f"words of seed {seed}")


def test_what_cuda_prints_for_seed_0() -> None:
    oracle.assert_equal(Philox(0).normal(8, 8).round(4), np.array(PRINTED, np.float32), "published numbers")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
def test_draws_are_the_devices(seed: int) -> None:
    """Draw after draw, up to as many numbers as any card from a T4 on has threads for."""
    generator, ours = torch.Generator("cuda").manual_seed(seed), Philox(seed)
    for shape in [(12,), (4, 64, 64), (1,), (4, 100, 100)]:
        theirs = torch.randn(shape, generator=generator, device="cuda").cpu().numpy()
        error = np.abs(ours.normal(*shape) - theirs).max()
        measured("max abs error", error, CUDA_NOISE)
        assert error <= CUDA_NOISE, f"{shape}: {error:.1e}"


def test_numbers_are_normal_and_independent() -> None:
    source = Philox(3)
    first, second = source.normal(4, 100, 100), source.normal(4, 100, 100)
    assert first.dtype == np.float32
    for drawn in (first, second, Philox(4).normal(4, 100, 100), Philox(3 + 2**32).normal(4, 100, 100)):
        assert scipy.stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
        assert drawn is first or abs(np.corrcoef(first.ravel(), drawn.ravel())[0, 1]) < 0.03
    assert np.array_equal(Philox(3).normal(10), first.ravel()[:10]), "a number hangs on the size of the draw"


def test_a_batch_draws_each_image_from_its_own_seed() -> None:
    source = NoiseSource.from_seeds([5, 2**64 - 1], rng="gpu")
    alone = [Philox(5), Philox(2**64 - 1)]
    for noise in (source.draw(6, 8, 4, torch.device("cpu")) for _ in range(3)):
        expected = np.stack([generator.normal(4, 6, 8) for generator in alone])
        oracle.assert_equal(oracle.nchw(noise), expected, "a draw")
    again = source.again().draw(6, 8, 4, torch.device("cpu"))
    oracle.assert_equal(oracle.nchw(again)[0], Philox(5).normal(4, 6, 8), "the first draw again")


def test_a_picture_is_drawn_from_the_devices_noise(pipe: fastsd.Pipeline) -> None:
    latents = torch.from_numpy(np.stack([Philox(seed).normal(4, 16, 16) for seed in (7, 8)]))
    expected = pipe.generate(RED, latents=latents, num_images_per_prompt=2, seed=7, sampler="ddim", **FAST).images
    ours = pipe.generate(RED, num_images_per_prompt=2, seed=7, rng="gpu", sampler="ddim", **FAST)
    oracle.assert_equal(ours.images, expected, "latents")
    alone = pipe.generate(RED, seed=8, rng="gpu", sampler="ddim", **FAST).images
    oracle.assert_close(alone[0], ours.images[1], 1e-4, "the second image alone")
    assert not torch.equal(pipe.generate(RED, seed=8, sampler="ddim", **FAST).images, alone), "rng changes nothing"


def test_variations_are_between_the_devices_noises(pipe: fastsd.Pipeline) -> None:
    given: dict[str, Any] = {"rng": "gpu", "sampler": "ddim", **FAST}
    at_the_end = pipe.generate(RED, seed=1, variation_seed=9, variation_strength=1.0, **given).images
    oracle.assert_close(at_the_end, pipe.generate(RED, seed=9, **given).images, 1e-3, "all the way")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rng": "tpu"}, "rng: 'tpu' is unknown; choose one of cpu, gpu"),
        ({"rng": None}, "rng: None is unknown"),
        ({"rng": "gpu", "generator": torch.Generator()}, "rng: .* give seed instead of generator"),
    ],
)
def test_wrong_arguments(pipe: fastsd.Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^{message}"):
        pipe.generate(RED, **FAST, **arguments)


def test_where_gpus_differ_one_is_told(pipe: fastsd.Pipeline) -> None:
    """512x512 of the small model are 65,536 numbers."""
    notes = {}
    for pixels in (64, 512):
        [asked] = check_requests([{"prompt": RED, "rng": "gpu", "height": pixels, "width": pixels}], pipe.generate)
        notes[pixels] = check_job(pipe.config, pipe.noise_schedule, asked).notes
    assert notes[64] == []
    assert [line for line in notes[512] if line.startswith("rng: for 65536 numbers a draw GPUs differ")]
    assert FEWEST_THREADS < 65536


@pytest.mark.parametrize(("rng", "label"), [("cpu", "CPU"), ("gpu", "NV")])
def test_the_file_says_it_and_replay_heeds_it(pipe: fastsd.Pipeline, rng: str, label: str) -> None:
    drawn = pipe.generate(RED, seed=3, rng=rng, **FAST)
    assert parse_parameters(drawn.parameters[0])["rng"] == label
    again = pipe.generate(**read_replay(drawn.parameters[0]).arguments | {"output_type": "latent"})
    oracle.assert_equal(again.images, drawn.images, "the replayed picture")
    assert "rng" not in parse_parameters(pipe.generate(RED, generator=torch.Generator(), **FAST).parameters[0])


@pytest.mark.parametrize(
    ("said", "expected"), [("", "gpu"), ("RNG: GPU, ", "gpu"), ("RNG: NV, ", "gpu"), ("RNG: CPU, ", "cpu")]
)
def test_a_web_uis_file(said: str, expected: str) -> None:
    replay = read_replay(f"red\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, {said}Version: v1.9.3")
    assert replay.arguments["rng"] == expected
    assert replay.lost == []


def test_a_source_that_nobody_knows_is_named() -> None:
    replay = read_replay("red\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, RNG: MLX, Version: v1.9.3")
    assert replay.lost == ["RNG: fastsd has not MLX; it has CPU, NV, GPU"]
    assert "rng" not in replay.arguments
