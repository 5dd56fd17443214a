"""What must hold on a GPU: `make test-gpu`. Pipelines and whole nets; the kernels' own cases are in `tests/kernels`."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

import fastsd
from fastsd.errors import OutOfMemoryError
from tests.oracle import psnr
from tests.small_model import SMALL_MODEL
from tests.test_graph import CHANGES, draw
from tests.tolerances import HALF_PSNR, IMAGE_PSNR, NET

pytestmark = pytest.mark.gpu

PROMPT = "a large red circle in the center on a white background"
ARGUMENTS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "np"}


@pytest.fixture(scope="module")
def on_gpu() -> fastsd.Pipeline:
    return fastsd.Pipeline(SMALL_MODEL, device="cuda", dtype="float32", backend="reference")


@pytest.fixture(autouse=True)
def _full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds fp32 convolutions to TF32 unless told not to: 1e-3 instead of 1e-6."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m", "euler", "euler_ancestral", "ddpm"])
def test_a_seed_draws_on_the_gpu_what_it_draws_on_the_cpu(
    on_gpu: fastsd.Pipeline, pipe: fastsd.Pipeline, sampler: str
) -> None:
    ours = on_gpu.generate(PROMPT, seed=3, sampler=sampler, **ARGUMENTS).images
    expected = pipe.generate(PROMPT, seed=3, sampler=sampler, **ARGUMENTS).images
    assert psnr(ours, expected) >= IMAGE_PSNR


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("dtype", "least"), HALF_PSNR.items())
def test_half_precision_pictures(pipe: fastsd.Pipeline, backend: str, dtype: str, least: float) -> None:
    half = fastsd.Pipeline(SMALL_MODEL, device="cuda", dtype=dtype, backend=backend)
    quality = psnr(half.generate(PROMPT, seed=3, **ARGUMENTS).images, pipe.generate(PROMPT, seed=3, **ARGUMENTS).images)
    assert quality >= least, f"{dtype}: {quality:.1f} dB against fp32 on the CPU"


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m", "euler", "euler_ancestral", "ddpm"])
def test_the_kernels_draw_what_the_reference_draws(pipe: fastsd.Pipeline, sampler: str) -> None:
    ours = fastsd.Pipeline(SMALL_MODEL, device="cuda", dtype="float32", backend="triton")
    expected = pipe.generate(PROMPT, seed=3, sampler=sampler, **ARGUMENTS).images
    assert psnr(ours.generate(PROMPT, seed=3, sampler=sampler, **ARGUMENTS).images, expected) >= IMAGE_PSNR


def test_auto_is_cuda_in_fp16() -> None:
    auto = fastsd.Pipeline()
    assert (auto.device.type, auto.dtype) == ("cuda", torch.float16)


def test_an_image_of_a_batch_comes_out_alone(on_gpu: fastsd.Pipeline) -> None:
    together = on_gpu.generate(PROMPT, seed=5, num_images_per_prompt=3, **ARGUMENTS).images
    for index in range(3):
        alone = on_gpu.generate(PROMPT, seed=5 + index, **ARGUMENTS).images[0]
        assert psnr(together[index], alone) >= IMAGE_PSNR


def test_threads_on_one_pipeline_give_what_serial_gives(on_gpu: fastsd.Pipeline) -> None:
    serial = [on_gpu.generate(PROMPT, seed=seed, **ARGUMENTS).images for seed in range(3)]
    drawn: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        drawn[seed] = np.asarray(on_gpu.generate(PROMPT, seed=seed, **ARGUMENTS).images)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == [0, 1, 2], "a thread died"
    for seed in range(3):
        assert psnr(drawn[seed], serial[seed]) >= IMAGE_PSNR


def test_encode_and_decode_on_the_gpu(on_gpu: fastsd.Pipeline, pipe: fastsd.Pipeline) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = on_gpu.encode_image(image, seed=2)
    assert latents.device.type == "cuda"
    torch.testing.assert_close(latents.cpu(), pipe.encode_image(image, seed=2), rtol=NET, atol=NET)
    decoded = on_gpu.decode_latents(latents, output_type="np")
    assert psnr(decoded, pipe.decode_latents(latents.cpu(), output_type="np")) >= IMAGE_PSNR


def test_running_out_of_memory_leaves_the_next_call_whole(on_gpu: fastsd.Pipeline) -> None:
    expected = on_gpu.generate(PROMPT, seed=1, **ARGUMENTS).images
    with pytest.raises(OutOfMemoryError, match="ask for fewer images"):
        on_gpu.generate(PROMPT, height=4096, width=4096, num_images_per_prompt=64, num_inference_steps=1)
    torch.cuda.empty_cache()
    assert np.array_equal(on_gpu.generate(PROMPT, seed=1, **ARGUMENTS).images, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_pictures_from_graphs_equal_eager_ones(backend: str) -> None:
    """Bit by bit: the first, which runs eagerly, those after it, and whatever changes from one to the next."""
    eager = fastsd.Pipeline(SMALL_MODEL, device="cuda", backend=backend, graphs=False)
    ours = fastsd.Pipeline(SMALL_MODEL, device="cuda", backend=backend)
    assert ours.graphs is not None
    for name, change in [*CHANGES.items()] * 3:
        assert np.array_equal(draw(ours, **change), draw(eager, **change)), (
            f"{name}: another picture than without graphs"
        )
    captures = ours.graphs.captures
    assert captures >= 3
    for _ in range(3):
        draw(ours, prompt="another prompt", sampler="plms", num_inference_steps=9)
    assert ours.graphs.captures == captures
    assert ours.graphs.held <= ours.graphs.budget


def test_a_replayed_step_allocates_nothing() -> None:
    """Memory is asked for before the loop and after it, however many steps there are."""
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cuda", backend="triton")

    def allocations(steps: int) -> int:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        draw(pipe, num_inference_steps=steps)
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before

    for steps in (2, 20, 2, 20):
        draw(pipe, num_inference_steps=steps)
    assert allocations(20) == allocations(2)


def test_weights_changed_under_live_graphs() -> None:
    """The packed copies are refilled where the graphs read them: another picture, and the first one back to the bit."""
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cuda", backend="triton")
    first = [draw(pipe) for _ in range(3)][-1]
    net = pipe.unet.mid_block
    weights = [
        net.attentions[0].proj_in.weight,
        net.resnets[0].conv1.weight,
        net.attentions[0].transformer_blocks[0].attn1.to_k.weight,
    ]
    for weight in weights:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
            assert not np.array_equal(draw(pipe), first), "the graph reads the old weight"
            weight.copy_(kept)
        assert np.array_equal(draw(pipe), first)
