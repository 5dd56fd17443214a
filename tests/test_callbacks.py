"""A callback's "denoised": what the UNet takes the latents to become, of every sampler, against diffusers and by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import fastsd
from fastsd.errors import NumericsError, ParameterError
from fastsd.ops import REFERENCE, StepRow, guide
from fastsd.sampling import SAMPLERS, make_table
from tests import oracle
from tests.measured import measured
from tests.small_model import SMALL_MODEL
from tests.tolerances import DENOISED, DENOISED_TWIN

PROMPT = "a large red circle in the center on a white background"
SMALL: dict[str, Any] = {"height": 32, "width": 32, "seed": 7, "guidance_scale": 4.0, "output_type": "latent"}

TWINS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}, {"sampler": "ddim"}),
    "ddim, eta 0.7": ("DDIMScheduler", {}, {"sampler": "ddim", "eta": 0.7}),
    "ddpm": ("DDPMScheduler", {}, {"sampler": "ddpm"}),
    "euler": ("EulerDiscreteScheduler", {}, {"sampler": "euler"}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sampler": "euler", "schedule": "karras"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, {"sampler": "euler_ancestral"}),
}


def assert_equal(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    """By relative L2: an estimate from pure noise may be some ten times as large as latents."""
    error = oracle.relative_l2(ours, theirs)
    measured("relative L2", error, bound)
    assert error <= bound, f"{what}: relative error {error:.1e} > {bound:.0e}"


def denoised(pipe: fastsd.Pipeline, **arguments: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    pipe.generate(
        PROMPT, **SMALL | arguments, callback_on_step_end=lambda *given: seen.append(given[-1]["denoised"]) or None
    )
    return seen


@contextmanager
def pred_original_samples(scheduler: Any) -> Iterator[list[Tensor]]:
    """What diffusers' scheduler takes each of its steps' latents to become."""
    step, seen = scheduler.step, []

    @wraps(step)  # the pipeline looks at the signature for what to hand over
    def spy(*arguments: Any, return_dict: bool = True, **options: Any) -> Any:
        answer = step(*arguments, return_dict=True, **options)
        seen.append(answer.pred_original_sample)
        return answer if return_dict else (answer.prev_sample,)

    scheduler.step = spy
    yield seen


@pytest.mark.parametrize("case", TWINS)
def test_equals_what_diffusers_schedulers_predict(
    pipe: fastsd.Pipeline, diffusers_pipe: diffusers.StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, options, arguments = TWINS[case]
    scheduler = getattr(diffusers, name).from_config(diffusers_pipe.scheduler.config, **options)
    monkeypatch.setattr(diffusers_pipe, "scheduler", scheduler)
    eta = {key: value for key, value in arguments.items() if key == "eta"}
    with pred_original_samples(scheduler) as expected:
        diffusers_pipe(
            PROMPT,
            height=32,
            width=32,
            num_inference_steps=5,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
            **eta,
        )
    found = denoised(pipe, num_inference_steps=5, **arguments)
    assert len(found) == len(expected) == 5
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_equal(ours, theirs, DENOISED_TWIN, f"{case}, step {step}")


def test_of_a_model_that_predicts_v(tmp_path: Path) -> None:
    path = oracle.save_random_model(tmp_path / "model", "sd2")
    theirs = oracle.load_pipeline(path)
    ours = fastsd.Pipeline(path, device="cpu", backend="reference")
    with pred_original_samples(theirs.scheduler) as expected:
        theirs(
            PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(7), output_type="latent", height=64, width=64,
            guidance_scale=4.0,
        )  # fmt: skip
    found = denoised(ours, num_inference_steps=3, sampler="ddim", height=64, width=64)
    for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert_equal(mine, other, DENOISED_TWIN, f"v, step {step}")


class Spy:
    """An op set that notes what the UNet saw and said."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def step_input(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, time = REFERENCE.step_input(*arguments)
        self.inputs.append(x.chunk(arguments[-1])[0].clone())
        return x, time

    def sampler_step(self, state: Tensor, out: Tensor, noise: Tensor, row: StepRow, new: Tensor) -> Tensor:
        self.outputs.append(guide(out, row))
        return REFERENCE.sampler_step(state, out, noise, row, new)


@pytest.fixture(scope="module")
def spied() -> tuple[fastsd.Pipeline, Spy]:
    spy = Spy()
    ops = replace(REFERENCE, step_input=spy.step_input, sampler_step=spy.sampler_step)
    return fastsd.Pipeline(SMALL_MODEL, device="cpu", backend=ops), spy


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_what_the_unet_said(spied: tuple[fastsd.Pipeline, Spy], sampler: str) -> None:
    """Of every call, whatever the sampler keeps and adds, also where the callback puts other latents in their place."""
    pipe, spy = spied
    spy.inputs.clear()
    spy.outputs.clear()
    found: list[Tensor] = []

    def change(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any] | None:
        found.append(values["denoised"])
        return {"latents": 0.9 * values["latents"]} if step == 3 else None

    steps = 5
    pipe.generate(PROMPT, **SMALL, num_inference_steps=steps, sampler=sampler, callback_on_step_end=change)
    levels = make_table(pipe.noise_schedule, steps, sampler).noise_levels(pipe.noise_schedule)
    assert len(found) == len(spy.inputs) == len(levels) - 1
    for call, (x, output, (signal, noise)) in enumerate(zip(spy.inputs, spy.outputs, levels[:-1], strict=True)):
        size = np.hypot(signal, noise)
        expected = (x - noise / size * output) / (signal / size)
        assert_equal(found[call], oracle.nchw(expected), DENOISED, f"{sampler}, call {call}")


def test_without_guidance_and_in_a_batch_of_several(spied: tuple[fastsd.Pipeline, Spy], pipe: fastsd.Pipeline) -> None:
    """Requests of other samplers and lengths side by side: each callback sees its own."""
    seen: list[list[Tensor]] = [[], [], []]
    wanted = [("ddim", 3, 1.0), ("euler_ancestral", 5, 1.0), ("dpmpp_2m", 4, 4.0)]
    requests = [
        {
            **SMALL,
            "prompt": PROMPT,
            "sampler": sampler,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "callback_on_step_end": lambda *given, mine=mine: mine.append(given[-1]["denoised"]),
        }
        for mine, (sampler, steps, guidance) in zip(seen, wanted, strict=True)
    ]
    pipe.generate_batch(requests)
    for mine, (sampler, steps, guidance) in zip(seen, wanted, strict=True):
        alone = denoised(pipe, sampler=sampler, num_inference_steps=steps, guidance_scale=guidance)
        assert len(mine) == len(alone) == steps
        for step in range(steps):
            assert_equal(mine[step], alone[step], DENOISED, f"{sampler}, step {step}")


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_outside_the_mask_it_is_the_image(pipe: fastsd.Pipeline, sampler: str) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    seen = denoised(
        pipe,
        image=image,
        mask_image=fastsd.images.Image.fromarray(mask),
        strength=0.8,
        num_inference_steps=5,
        sampler=sampler,
        height=None,
        width=None,
    )
    assert len(seen) == 4
    for one in seen:
        torch.testing.assert_close(one[..., 4:], seen[0][..., 4:], rtol=0, atol=1e-6)
    assert (seen[0][..., :4] - seen[-1][..., :4]).abs().max() > 0.1, "what is painted does not change"
    sample = pipe.encode_image(image)[..., 4:]
    assert oracle.relative_l2(seen[0][..., 4:], sample) < 0.5, "it is not the image's"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
@pytest.mark.parametrize("last", [False, True])
def test_latents_that_are_not_finite_are_refused(pipe: fastsd.Pipeline, value: float, last: bool) -> None:
    """At once, also after the last step, where no UNet would stumble over them; 1e300 is beyond float32."""

    def spoil(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any] | None:
        latents = values["latents"].double()
        latents[0, 0, 0, 0] = value
        return {"latents": latents} if step == (2 if last else 1) else None

    says = f"^callback_on_step_end: the latents it returns at step {3 if last else 2} of 3 are not finite$"
    with pytest.raises(ParameterError, match=says):
        pipe.generate(PROMPT, **SMALL, num_inference_steps=3, callback_on_step_end=spoil)


def test_what_the_unet_spoilt_is_not_the_callbacks_fault() -> None:
    broken = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference")
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NumericsError, match="unet: a non-finite value at step 1"):
        broken.generate(
            PROMPT,
            **SMALL,
            num_inference_steps=3,
            callback_on_step_end=lambda *given: {"latents": 0.9 * given[-1]["latents"]},
        )


def test_it_is_the_callbacks_own(pipe: fastsd.Pipeline) -> None:
    """Written over by the callback, it changes neither the picture nor the next estimate."""

    def spoil(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
        values["denoised"].fill_(torch.nan)
        values["latents"].fill_(torch.nan)

    given: dict[str, Any] = SMALL | {"num_inference_steps": 3}
    spoiled = pipe.generate(PROMPT, **given, callback_on_step_end=spoil).images
    assert torch.equal(spoiled, pipe.generate(PROMPT, **given).images)
