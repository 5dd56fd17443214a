"""Requests of every kind in one batch: each gets what it gets alone; and what one does wrong is its own affair."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastsd
from fastsd.denoise import Denoiser
from fastsd.errors import FastSDError, NumericsError, OutOfMemoryError, ParameterError
from fastsd.graph import Graphs
from fastsd.result import Result
from tests.measured import measured
from tests.small_model import SMALL_MODEL
from tests.test_graph import StandIn
from tests.test_modes import half_mask, picture
from tests.tolerances import MIXED_BATCH

CIRCLE, SQUARE = "a large red circle in the center on a white background", "a small blue square on a black background"


def request(prompt: str = CIRCLE, **change: Any) -> dict[str, Any]:
    asked = {"prompt": prompt, "num_inference_steps": 5, "guidance_scale": 4.0, "seed": 3, "output_type": "np"}
    return asked | change


REQUESTS = {
    "ddim": request(),
    "plms, more steps, two images": request(SQUARE, sampler="plms", num_inference_steps=8, num_images_per_prompt=2),
    "ancestral": request(sampler="euler_ancestral", schedule="karras", guidance_scale=6.0, seed=11),
    "two calls a step": request(SQUARE, sampler="heun", num_inference_steps=3),
    "SDE, another eta": request(sampler="ddim", eta=0.7, negative_prompt="blue"),
    "rescaled": request(guidance_rescale=0.6, clip_skip=1),
    "a variation": request(variation_seed=5, variation_strength=0.4),
    "no guidance": request(guidance_scale=1.0),
    "from an image": request(image=picture(), strength=0.6),
    "inpainting": request(SQUARE, image=picture(), mask_image=half_mask(), num_inference_steps=6),
    "two chunks": request(f"{CIRCLE} BREAK {SQUARE}", prompt_style="a1111"),
    "another size": request(height=48, width=80),
    "a second pass": request(hires_scale=1.5, hires_steps=4),
}


def results(answers: list[Result | FastSDError]) -> list[Result]:
    for answer in answers:
        assert isinstance(answer, Result), repr(answer)
    return [answer for answer in answers if isinstance(answer, Result)]


@pytest.fixture(scope="module")
def alone(pipe: fastsd.Pipeline) -> dict[str, Result]:
    return {name: pipe.generate(**asked) for name, asked in REQUESTS.items()}


@pytest.mark.parametrize("order", [list(REQUESTS), list(REQUESTS)[::-1]], ids=["in order", "backwards"])
def test_each_gets_what_it_gets_alone(pipe: fastsd.Pipeline, alone: dict[str, Result], order: list[str]) -> None:
    together = results(pipe.generate_batch([REQUESTS[name] for name in order]))
    for name, result in zip(order, together, strict=True):
        expected = alone[name]
        error = float(np.abs(result.images - expected.images).max())
        measured("max abs error", error, MIXED_BATCH)
        assert error <= MIXED_BATCH, f"{name}: {error:.1e} from what it is alone"
        assert (result.parameters, result.seeds) == (expected.parameters, expected.seeds)
        assert result.warnings == expected.warnings


def test_a_captured_step_serves_any_mixture(pipe: fastsd.Pipeline, alone: dict[str, Result]) -> None:
    replayed, api = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference"), StandIn()
    replayed.graphs = Graphs(api, 10_000)
    replayed._denoiser = Denoiser(replayed.unet, replayed.ops, replayed.graphs)
    mixtures = [["ddim", "from an image"], ["ancestral", "ddim"], ["SDE, another eta", "a variation"]]
    for names in mixtures:
        for name, result in zip(names, results(replayed.generate_batch([REQUESTS[n] for n in names])), strict=True):
            assert np.abs(result.images - alone[name].images).max() <= MIXED_BATCH, name
    assert api.replays >= 10
    steps = [key for key in replayed.graphs._graphs if isinstance(key, tuple) and key[0] == "step"]
    assert len(steps) == 1, f"one shape of batch needs one captured step, not {steps}"


GENERATOR = torch.Generator().manual_seed(0)


class Counting(torch.nn.Module):
    """A UNet that writes down how many rows each call has."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.rows = unet, []
        self.most: int | None = None
        """More rows than this are more than the memory holds."""
        self.side: int | None = None
        """As many latents a side are."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.rows.append(len(x))
        if (self.most is not None and len(x) > self.most) or (x.shape[1] == self.side and len(x) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.unet(x, *rest)


@pytest.fixture
def counted() -> tuple[fastsd.Pipeline, Counting]:
    pipe = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference")
    unet = Counting(pipe.unet)
    pipe._denoiser = Denoiser(unet, pipe.ops, None)  # type: ignore[arg-type]
    return pipe, unet


def test_they_share_the_unets_calls_and_leave_when_they_are_done(counted: tuple[fastsd.Pipeline, Counting]) -> None:
    pipe, unet = counted
    steps = {"plms": 6, "euler": 4, "ddim": 2}
    asked = [request(sampler=name, num_inference_steps=n, output_type="latent") for name, n in steps.items()]
    results(pipe.generate_batch([*asked, request(guidance_scale=1.0, num_inference_steps=2, output_type="latent")]))
    walk = [*[6] * 2, *[4] * 2, *[2] * 3]  # diffusers' PLMS takes one call more than it has steps
    assert unet.rows == [*walk, 1, 1], "guided ones together, two rows each; then those without guidance"


def test_a_request_that_is_wrong_gets_its_error_and_the_others_their_images(
    pipe: fastsd.Pipeline, alone: dict[str, Result]
) -> None:
    bad = [request(height=63), request(seed="one"), request(prompt="\ud800"), request(image="nowhere.png")]
    first, *errors, last = pipe.generate_batch([REQUESTS["ddim"], *bad, REQUESTS["ancestral"]])
    for error, says in zip(errors, ["height", "seed", "surrogate", "nowhere.png"], strict=True):
        assert isinstance(error, FastSDError)
        assert says in str(error)
    for name, result in (("ddim", first), ("ancestral", last)):
        assert isinstance(result, Result)
        assert np.abs(result.images - alone[name].images).max() <= MIXED_BATCH


def test_what_is_not_finite_in_one_does_not_reach_the_others(pipe: fastsd.Pipeline, alone: dict[str, Result]) -> None:
    def spoil(_: Any, step: int, __: float, values: dict[str, Any]) -> dict[str, Any] | None:
        huge = values["latents"].sign() * 1e38  # finite, but not what the UNet makes of it
        return {"latents": huge} if step == 1 else None

    spoilt = request(num_inference_steps=7, callback_on_step_end=spoil)
    first, error, last = pipe.generate_batch([REQUESTS["ddim"], spoilt, REQUESTS["plms, more steps, two images"]])
    assert isinstance(error, NumericsError)
    assert "step 3 of 7" in str(error), "the UNet's first output that is not finite is the third step's"
    for name, result in (("ddim", first), ("plms, more steps, two images", last)):
        assert isinstance(result, Result)
        assert np.abs(result.images - alone[name].images).max() <= MIXED_BATCH


def test_a_callback_sees_and_changes_its_own_images_alone(pipe: fastsd.Pipeline, alone: dict[str, Result]) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def note(_: Any, step: int, __: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tuple(values["latents"].shape)))
        return {"latents": 0.5 * values["latents"]}

    changed, other = results(
        pipe.generate_batch([request(callback_on_step_end=note, num_images_per_prompt=2), REQUESTS["ancestral"]])
    )
    assert seen == [(step, (2, 4, 16, 16)) for step in range(5)]
    assert np.abs(other.images - alone["ancestral"].images).max() <= MIXED_BATCH
    assert np.abs(changed.images[0] - alone["ddim"].images[0]).max() > 0.1

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        pipe.generate_batch([REQUESTS["ddim"], request(callback_on_step_end=stop)])
    assert np.array_equal(pipe.generate(**REQUESTS["ddim"]).images, alone["ddim"].images)


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ([], "empty"),
        ({"prompt": "x"}, "a list of dicts"),
        (["a red circle"], "a list of dicts"),
        ([request(), request(promt="x")], r"requests\[1\].*promt"),
        ([request(self=1)], "self"),
        ([request(seed=None, generator=GENERATOR), request(generator=[GENERATOR])], r"requests\[1\].*requests\[0\]"),
    ],
)
def test_what_is_no_list_of_requests_is_refused(pipe: fastsd.Pipeline, requests: Any, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        pipe.generate_batch(requests)


def test_requests_with_generators_of_their_own(pipe: fastsd.Pipeline) -> None:
    """One for a batch, a list, and one that draws noise at each step."""

    def asked() -> list[dict[str, Any]]:
        one, two, three = (torch.Generator().manual_seed(number) for number in (1, 2, 3))
        return [
            request(seed=None, generator=one, num_images_per_prompt=2, sampler="euler_ancestral"),
            request(seed=None, generator=[two], sampler="ddpm", num_inference_steps=7),
            request(seed=None, generator=three, image=picture(), strength=0.7),
        ]

    for alone, together in zip(asked(), results(pipe.generate_batch(asked())), strict=True):
        assert np.abs(pipe.generate(**alone).images - together.images).max() <= MIXED_BATCH


# Memory that ends within the UNet.


@pytest.mark.parametrize(("most", "pieces"), [(3, [2]), (2, [2]), (1, [2, 4])])
def test_where_memory_ends_the_unets_batch_is_cut(
    counted: tuple[fastsd.Pipeline, Counting], alone: dict[str, Result], most: int, pieces: list[int]
) -> None:
    pipe, unet = counted
    unet.most = most
    first, second = results(pipe.generate_batch([REQUESTS["ancestral"], REQUESTS["inpainting"]]))
    lines = [f"unet: 4 rows in {count} pieces, after running out of memory" for count in pieces]
    for name, result in (("ancestral", first), ("inpainting", second)):
        error = float(np.abs(result.images - alone[name].images).max())
        assert error <= MIXED_BATCH, f"{name}: {error:.1e} from what it is with memory enough"
        assert [line for line in result.degraded if line.startswith("unet: 4")] == lines
        assert set(result.degraded) <= set(result.warnings)
    unet.most = None
    assert results([pipe.generate(**REQUESTS["ancestral"])])[0].degraded == [], "the next call is whole again"


def test_only_those_whose_batch_was_cut_are_told(counted: tuple[fastsd.Pipeline, Counting]) -> None:
    pipe, unet = counted
    unet.side = 20
    small, large = results(pipe.generate_batch([request(), request(height=80, width=80)]))
    assert small.degraded == []
    assert large.degraded == ["unet: 2 rows in 2 pieces, after running out of memory"]


def test_where_memory_ends_outside_the_unet_no_step_is_taken_twice(
    pipe: fastsd.Pipeline, alone: dict[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the state is written, a step cannot be repeated."""
    calls = 0

    def restore(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        denoise_restore(*arguments)

    denoise_restore = fastsd.denoise.restore
    monkeypatch.setattr(fastsd.denoise, "restore", restore)
    with pytest.raises(OutOfMemoryError):
        pipe.generate(**REQUESTS["inpainting"])
    assert np.array_equal(pipe.generate(**REQUESTS["inpainting"]).images, alone["inpainting"].images)


def test_where_one_row_is_too_much_it_is_said(counted: tuple[fastsd.Pipeline, Counting]) -> None:
    pipe, unet = counted
    unet.most = 0
    with pytest.raises(OutOfMemoryError, match="1 images of 64x64"):
        pipe.generate(**REQUESTS["ddim"])
    unet.most = None
    assert np.isfinite(pipe.generate(**REQUESTS["ddim"]).images).all()


def test_masks_and_images_of_a_request_are_its_own(pipe: fastsd.Pipeline) -> None:
    """Two inpaintings with opposite masks side by side, each keeping its own half."""
    mirrored = Image.fromarray(255 - np.asarray(half_mask()))
    asked = [
        request(image=picture(), mask_image=mask, paste_back=True, num_inference_steps=4)
        for mask in (half_mask(), mirrored)
    ]
    left, right = (result.images[0] for result in results(pipe.generate_batch(asked)))
    original = np.asarray(picture()) / 255.0
    assert np.abs(left[:, 32:] - original[:, 32:]).max() < 1e-6
    assert np.abs(right[:, :32] - original[:, :32]).max() < 1e-6
    assert np.abs(left[:, :32] - original[:, :32]).max() > 0.1
