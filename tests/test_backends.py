"""Which ops a device gets, and that nothing is routed elsewhere unseen."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

import fastsd
from fastsd import backends
from fastsd.errors import ParameterError
from fastsd.kernels import gemm, tuned
from fastsd.ops import REFERENCE, StepRow
from tests.kernels.case import DEVICE, draw
from tests.oracle import assert_same_picture
from tests.small_model import SMALL_MODEL

CPU = torch.device("cpu")


def test_triton_runs_on_a_gpu_and_where_it_is_interpreted() -> None:
    assert backends.select_ops("triton", torch.device(DEVICE)).name == "triton"


def test_triton_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ParameterError, match="needs Triton and a CUDA GPU, not cpu; choose auto or reference"):
        backends.select_ops("triton", CPU)


def test_auto_takes_triton_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("fastsd.kernels.launch.arch_of", lambda device: 90)
    for measured, name in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(tuned, "has", lambda arch, measured=measured: measured)
        assert backends.select_ops("auto", gpu).name == name
    assert backends.select_ops("triton", gpu).name == "triton"


def entry(use: str, config: tuple | None) -> tuned.Entry:
    return tuned.Entry("linear", "fp32", 4, "", use, config, 1.0 if config else None, 2.0)


def test_the_tuned_choice_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config reaches the kernel; "library" reaches PyTorch, and no kernel runs."""
    x, w = draw(4, 8, seed=0), draw(3, 8, seed=1)
    seen = []
    kernel = gemm.linear

    def watched(*arguments, **options):
        seen.append(options["config"])
        return kernel(*arguments, **options)

    monkeypatch.setattr(gemm, "linear", watched)
    linear = backends.triton_ops().linear
    for found, expected in (
        (entry("kernel", (16, 16, 16, 4, 2, 1)), [gemm.Config(16, 16, 16, 4, 2, 1)]),
        (entry("library", None), []),
        (None, [None]),
    ):
        seen.clear()
        monkeypatch.setattr(tuned, "lookup", lambda problem, arch, found=found: found)
        torch.testing.assert_close(linear(x, w), x @ w.T)
        assert seen == expected


def test_a_view_is_made_contiguous_and_what_no_kernel_serves_is_refused() -> None:
    linear = backends.triton_ops().linear
    x, w = draw(8, 4, seed=0).T, draw(3, 8, seed=1)
    torch.testing.assert_close(linear(x, w), x @ w.T)
    with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
        linear(x.double(), w.double())


def test_a_gradient_is_refused() -> None:
    """The kernels would give none, and training would stand still without a word."""
    w = draw(3, 8, seed=0).requires_grad_()
    linear = backends.triton_ops().linear
    with pytest.raises(ValueError, match="no gradient"):
        linear(draw(4, 8, seed=0), w)
    with pytest.raises(ValueError, match="no gradient"):
        backends.triton_ops().project_heads(draw(1, 4, 8, seed=0), [w], None, 1)
    with torch.no_grad():
        linear(draw(4, 8, seed=0), w)


@pytest.mark.parametrize("rescale", [None, 0.7], ids=["kernel", "rescaled, by PyTorch"])
@pytest.mark.parametrize("noisy", [True, False])
def test_sampler_step(rescale: float | None, noisy: bool) -> None:
    state, out = draw(2, 3, 4, 4, 4, seed=0), draw(6, 4, 4, 4, seed=1).half()
    noise = draw(3, 4, 4, 4, seed=2) if noisy else None
    phi = None if rescale is None else torch.full((3,), rescale, device=DEVICE)
    row = StepRow(draw(3, 2, 4, seed=3), torch.tensor([1.0, 4.0, 7.5], device=DEVICE), phi)
    found = backends.triton_ops().sampler_step(state, out, noise, row)
    torch.testing.assert_close(found, REFERENCE.sampler_step(state, out, noise, row))


def test_a_picture_on_the_kernels(pipe: fastsd.Pipeline) -> None:
    """The whole way, from `backend="triton"` on: strides, layouts and dtypes as the pipeline really hands them over."""
    arguments: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 3}
    ours = fastsd.Pipeline(SMALL_MODEL, device=DEVICE, dtype="float32", backend="triton")
    drawn, expected = (one.generate("a blue square", output_type="np", **arguments).images for one in (ours, pipe))
    assert_same_picture(drawn, expected, "on the kernels")


def test_ops_of_ones_own_mixing() -> None:
    """How an error is bisected: one op swapped, and it is that op that runs."""
    calls = []
    counted = replace(REFERENCE, geglu=lambda *arguments: calls.append(1) or REFERENCE.geglu(*arguments))
    mixed = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend=counted)
    mixed.generate("a blue square", num_inference_steps=1, seed=3)
    assert calls
