"""Running out of memory in the VAE: less at a time, told as degraded; and where that is not enough, one clear error."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsd
from fastsd.device import is_out_of_memory
from fastsd.errors import OutOfMemoryError, ParameterError
from fastsd.ops import REFERENCE
from fastsd.result import Result
from fastsd.vae_tiles import tiled
from tests import oracle
from tests.small_model import SMALL_MODEL
from tests.tolerances import IMAGE_PSNR

SIDE = 16  # latents of a tile of the small model, whose pictures of 64x64 pixels it was trained on
TILE = 64 * 64 * 16  # elements of the largest input of `Ops.conv2d` while one tile goes through the VAE
TILED = "vae: tiled, after running out of memory"
APART = "vae: one picture at a time, after running out of memory"
FAST: dict[str, Any] = {"num_inference_steps": 1, "seed": 3, "output_type": "np"}


class Memory:
    """An op set on a device with little memory: convolutions of more elements than the limit find none."""

    def __init__(self) -> None:
        self.limit = 10**9
        self.largest = 0
        self.failures = 0
        self.held: list[weakref.ref[Tensor]] = []
        """What the failed attempts held."""
        self.spoil: torch.dtype | None = None
        """In which convolutions give infinite values."""

    def conv2d(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if x.numel() > self.limit:
            self.failures += 1
            self.held.append(weakref.ref(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, x.numel())
        assert all(held() is None for held in self.held), "the failed attempt's tensors are kept during the next"
        y = REFERENCE.conv2d(x, *arguments, **options)
        return y * torch.inf if x.dtype == self.spoil else y


@pytest.fixture(scope="module")
def shared() -> Memory:
    return Memory()


@pytest.fixture
def memory(shared: Memory) -> Memory:
    vars(shared).update(vars(Memory()))
    return shared


@pytest.fixture(scope="module")
def poor(shared: Memory) -> fastsd.Pipeline:
    return fastsd.Pipeline(SMALL_MODEL, device="cpu", backend=replace(REFERENCE, conv2d=shared.conv2d))


def latents(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(6))


def picture(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


def in_tiles(pipe: fastsd.Pipeline, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return (tiled(pipe.vae, SIDE).decode(oracle.nhwc(x)) * 0.5 + 0.5).clamp(0, 1).numpy()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("can't allocate memory"), False),
    ],
    ids=["cuda", "cpu", "another", "another type"],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cpus_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_a_large_picture_is_decoded_in_tiles(
    pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    x = latents(1, 20, 17)
    memory.limit = TILE
    with caplog.at_level(logging.WARNING, "fastsd"):
        decoded = poor.decode_latents(x, output_type="np")
    assert memory.failures == 1
    oracle.assert_same_picture(decoded, in_tiles(pipe, x), "in tiles")
    assert caplog.messages == [TILED]
    assert oracle.psnr(decoded, pipe.decode_latents(x, output_type="np")) > 20, "the picture is another one"


@pytest.mark.parametrize("seed", [None, 5])
def test_a_large_picture_is_encoded_in_tiles(
    pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory, seed: int | None
) -> None:
    x = picture(2, 80, 64)
    memory.limit = TILE
    encoded = poor.encode_image(x, seed=seed)
    assert memory.failures == 1
    expected = pipe.encode_image(x, seed=seed, vae_tiling=True)
    oracle.assert_close(encoded, expected, 1e-4, "latents")


def test_generate_tells_what_was_degraded(pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory) -> None:
    large: dict[str, Any] = {"height": 80, "width": 64, **FAST}
    expected = pipe.generate("a square", vae_tiling=True, **large)
    assert expected.degraded == [], "it is what was asked for"
    memory.limit = TILE
    result = poor.generate("a square", **large)
    assert result.degraded == [TILED]
    assert TILED in result.warnings
    assert result.parameters == expected.parameters, "tiles are said of the picture, asked for or not"
    assert ", VAE tiling: True, " in result.parameters[0]
    assert oracle.psnr(result.images, expected.images) >= IMAGE_PSNR
    memory.limit = 10**9
    whole = poor.generate("a square", **large)
    assert whole.degraded == [], "once is not always"
    assert oracle.psnr(whole.images, pipe.generate("a square", **large).images) >= IMAGE_PSNR


def test_image_to_image_in_tiles(poor: fastsd.Pipeline, memory: Memory) -> None:
    """Out of memory in both directions is told of both."""
    memory.limit = TILE
    result = poor.generate("a square", image=picture(1, 80, 64), strength=0.5, **FAST | {"num_inference_steps": 2})
    assert result.degraded == [TILED, TILED]


def test_a_batch_of_small_pictures_is_decoded_one_by_one(
    pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory
) -> None:
    x = latents(3, SIDE, SIDE)
    memory.limit = TILE
    degraded: list[str] = []
    decoded = poor._finite("decode", [oracle.nhwc(x)], [], degraded)
    assert degraded == [APART]
    expected = pipe._finite("decode", [oracle.nhwc(x)], [])
    oracle.assert_close(decoded, expected, 1e-4, "pictures")


@pytest.mark.parametrize(("tiling", "told"), [(True, APART), (None, TILED), (False, APART)])
def test_a_batch_of_large_pictures(
    pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory, tiling: bool | None, told: str
) -> None:
    """Whoever asked for tiles, or for none, keeps that: then it is fewer at a time."""
    x = oracle.nhwc(latents(2, 20, 12))
    memory.limit = TILE
    degraded: list[str] = []
    decoded = poor._finite("decode", [x], [], degraded, tiling)
    assert degraded == [told]
    expected = pipe._finite("decode", [x], [], [], tiling is not False)
    oracle.assert_close(decoded, expected, 1e-4, "pictures")


def test_never_in_tiles_where_that_was_refused(poor: fastsd.Pipeline, memory: Memory) -> None:
    memory.limit = TILE
    with pytest.raises(OutOfMemoryError, match=r"64x80 in torch\.float32; ask for fewer images"):
        poor.generate("a square", height=80, width=64, vae_tiling=False, **FAST)
    assert memory.failures == 1


def test_tiles_that_were_asked_for(pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory) -> None:
    x = latents(1, 20, 17)
    decoded = poor.decode_latents(x, output_type="np", vae_tiling=True)
    assert memory.largest <= TILE
    assert oracle.psnr(decoded, in_tiles(pipe, x)) >= IMAGE_PSNR
    small = latents(1, SIDE, SIDE)
    assert np.array_equal(
        pipe.decode_latents(small, output_type="np", vae_tiling=True), pipe.decode_latents(small, output_type="np")
    ), "a picture that fits into one tile is not cut"


@pytest.mark.parametrize("call", ["generate", "decode", "encode"])
def test_a_second_failure_is_an_error_and_the_next_call_works(
    pipe: fastsd.Pipeline, poor: fastsd.Pipeline, memory: Memory, call: str
) -> None:
    calls: dict[str, Callable[[fastsd.Pipeline], Any]] = {
        "generate": lambda p: p.generate("a square", height=80, width=64, **FAST).images,
        "decode": lambda p: p.decode_latents(latents(1, 20, 16), output_type="np"),
        "encode": lambda p: p.encode_image(picture(1, 80, 64)).numpy(),
    }
    memory.limit = TILE // 4
    with pytest.raises(OutOfMemoryError, match="has not the memory for"):
        calls[call](poor)
    assert memory.failures >= 2, "it was not tried again with less"
    memory.limit = 10**9
    np.testing.assert_allclose(calls[call](poor), calls[call](pipe), atol=1e-4)


def test_the_retry_in_fp32_is_tiled_as_well(memory: Memory) -> None:
    """bf16 overflows, and fp32 takes more memory than there is."""
    ops = replace(REFERENCE, conv2d=memory.conv2d)
    half = fastsd.Pipeline(SMALL_MODEL, device="cpu", dtype="bfloat16", backend=ops)
    x = oracle.nhwc(latents(1, 20, 16))
    memory.spoil = torch.bfloat16
    memory.limit = TILE
    notes: list[str] = []
    degraded: list[str] = []
    result = half._finite("decode", [x], notes, degraded)
    assert notes == ["vae: non-finite values in torch.bfloat16; computed again in float32"]
    assert degraded == [TILED, TILED]
    assert result.dtype == torch.float32
    assert result.isfinite().all()


def test_each_request_of_a_batch_is_told_of_its_own(poor: fastsd.Pipeline, memory: Memory) -> None:
    memory.limit = TILE
    asked = {"prompt": "a square", "num_inference_steps": 1, "seed": 3, "output_type": "np"}
    small, large = poor.generate_batch([asked, asked | {"height": 80}])
    assert isinstance(small, Result)
    assert isinstance(large, Result)
    assert (small.degraded, large.degraded) == ([], [TILED])


@pytest.mark.parametrize("value", ["yes", 1, 0, torch.tensor(True)])
def test_vae_tiling_is_true_false_or_none(pipe: fastsd.Pipeline, value: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: pipe.generate("a square", vae_tiling=value, **FAST),
        lambda: pipe.decode_latents(latents(1, 16, 16), vae_tiling=value),
        lambda: pipe.encode_image(picture(1, 64, 64), vae_tiling=value),
    ]
    for call in calls:
        with pytest.raises(ParameterError, match=r"^vae_tiling: must be True, False or None, not "):
            call()


def test_another_error_is_not_tried_again(poor: fastsd.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(x: Tensor) -> Tensor:
        calls.append(1)
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(poor.vae.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        poor.decode_latents(latents(2, 20, 20))
    assert len(calls) == 1
