"""The logic round CUDA graphs, on a stand-in: what is captured when, what reaches the buffers, what is let go."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from fastsd.denoise import Denoiser
from fastsd.graph import Graphs, capture
from tests.oracle import assert_equal
from tests.small_model import SMALL_MODEL

PROMPT = "a large red circle in the center on a white background"


class StandIn:
    """Replays by calling again: on the buffers of the capture, into the output of the capture, as a graph would."""

    def __init__(self, size: int = 100) -> None:
        self.size = size
        self.bytes = 0
        self.replays = 0
        self.replaying = False
        self.error: Exception | None = None

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        function()  # the warm-up, which moves the buffers on
        output = function()
        self.bytes += self.size

        def replay() -> None:
            self.replays += 1
            self.replaying = True
            new = function()
            self.replaying = False
            if isinstance(output, Tensor):
                output.copy_(new)

        return replay, output

    def held(self) -> int:
        return self.bytes


def doubled(graphs: Graphs, key: str, x: Tensor) -> Tensor:
    return graphs.call(key, lambda x: x * 2, x)


def test_the_second_call_is_captured_and_later_ones_replayed() -> None:
    api = StandIn()
    graphs = Graphs(api, 1000)
    for call, (captures, replays) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        assert doubled(graphs, "a", torch.tensor([call])).tolist() == [2 * call], "a stale input"
        assert (graphs.captures, api.replays) == (captures, replays)


def test_an_output_is_a_clone() -> None:
    graphs = Graphs(StandIn(), 1000)
    doubled(graphs, "a", torch.zeros(1))
    first = doubled(graphs, "a", torch.ones(1))
    second = doubled(graphs, "a", torch.full((1,), 5.0))
    assert (first.item(), second.item()) == (2, 10), "the next replay wrote over an output that was given away"


def test_the_least_recently_used_goes_when_the_budget_is_spent() -> None:
    graphs = Graphs(StandIn(100), 250)
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        doubled(graphs, key, torch.ones(1))
    assert (len(graphs), graphs.held) == (2, 200)
    captures = graphs.captures
    for key in ("a", "c"):
        doubled(graphs, key, torch.ones(1))
    assert graphs.captures == captures, "b was the oldest, and not the one that went"
    assert doubled(graphs, "b", torch.ones(1)).item() == 2
    assert graphs.captures == captures + 1


def test_buffers_count_with_the_graph_that_reads_them() -> None:
    api = StandIn(100)
    graphs = Graphs(api, 1000)

    def make() -> tuple[Tensor, Callable[[], Tensor]]:
        api.bytes += 40
        buffer = torch.ones(1)
        return buffer, lambda: buffer * 2

    for _ in range(2):
        with graphs.lease("a", make):
            pass
    assert graphs.held == 140


def test_one_graph_may_pass_the_budget_alone() -> None:
    graphs = Graphs(StandIn(1000), 10)
    for _ in range(3):
        doubled(graphs, "a", torch.ones(1))
    assert (len(graphs), graphs.captures) == (1, 1)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: operation not permitted"), torch.OutOfMemoryError("no memory")]
)
def test_a_failed_capture_is_told_once_and_never_tried_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    api = StandIn()
    api.error = error
    graphs = Graphs(api, 1000)
    with caplog.at_level(logging.WARNING, "fastsd"):
        for _ in range(4):
            assert doubled(graphs, "a", torch.ones(1)).item() == 2
    assert [record.getMessage() for record in caplog.records] == [f"no CUDA graph for a, running without: {error}"]
    api.error = None
    doubled(graphs, "a", torch.ones(1))
    assert graphs.captures == 0


def test_who_finds_a_graph_in_use_runs_eagerly() -> None:
    graphs = Graphs(StandIn(), 1000)
    doubled(graphs, "a", torch.ones(1))
    doubled(graphs, "a", torch.ones(1))
    with graphs.lease("a", lambda: ([], lambda: None)) as mine:
        assert mine is not None
        with graphs.lease("a", lambda: ([], lambda: None)) as other:
            assert other is None
    with graphs.lease("a", lambda: ([], lambda: None)) as again:
        assert again is not None


def test_capture_alone() -> None:
    x = torch.ones(1)
    captured = capture(lambda: x + 1, api=StandIn())
    x.fill_(5)
    captured.replay()
    assert captured.output.item() == 6


# Pipelines on the stand-in.


@pytest.fixture
def replayed() -> tuple[fastsd.Pipeline, Graphs, StandIn]:
    pipe, api = fastsd.Pipeline(SMALL_MODEL, device="cpu", backend="reference"), StandIn()
    pipe.graphs = Graphs(api, 10_000)
    pipe._denoiser = Denoiser(pipe.unet, pipe.ops, pipe.graphs)
    return pipe, pipe.graphs, api


def draw(pipe: fastsd.Pipeline, prompt: str = PROMPT, **change: Any) -> np.ndarray:
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "seed": 3, "output_type": "np"}
    return np.asarray(pipe.generate(prompt, **arguments | change).images)


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "prompt": {"prompt": "a small blue square"},
    "negative prompt": {"negative_prompt": "red"},
    "seed": {"seed": 11},
    "guidance": {"guidance_scale": 1.5},
    "steps": {"num_inference_steps": 7},
    "a sampler with noise": {"sampler": "euler_ancestral"},
    "a sampler with history": {"sampler": "plms"},
    "a schedule": {"sampler": "dpmpp_2m", "schedule": "karras"},
    "no guidance": {"guidance_scale": 1.0},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "size": {"height": 48, "width": 80},
    "batch": {"num_images_per_prompt": 2},
    "latents": {"latents": torch.ones(1, 4, 16, 16), "seed": None},
    "a picture to begin from": {"image": np.full((64, 64, 3), 0.3), "strength": 0.5},
    "a mask": {"image": np.full((64, 64, 3), 0.3), "mask_image": np.tri(64)},
    "another mask": {"image": np.full((64, 64, 3), 0.8), "mask_image": 1 - np.tri(64), "sampler": "euler_ancestral"},
}


def test_a_masked_walk_is_replays_too(replayed: tuple[fastsd.Pipeline, Graphs, StandIn]) -> None:
    """What is kept of the picture is put back inside the step; walks without a mask have a step of their own, without that."""
    ours, graphs, api = replayed
    masked = CHANGES["a mask"] | {"output_type": "latent"}
    draw(ours)
    draw(ours)
    captures = graphs.captures
    for _ in range(2):
        draw(ours, **masked)
    assert graphs.captures == captures + 2, "the encoder, and the masked step"
    with Watch(api) as watch:
        draw(ours, **masked, num_inference_steps=6)
    replays = [index for index, name in enumerate(watch.seen) if name == "replay"]
    assert set(watch.seen[replays[-6] : replays[-1]]) == {"replay"}
    draw(ours, **CHANGES["another mask"])
    draw(ours)
    assert graphs.captures == captures + 2


def test_whatever_changes_reaches_the_buffers(
    pipe: fastsd.Pipeline, replayed: tuple[fastsd.Pipeline, Graphs, StandIn]
) -> None:
    """In turn on one pipeline, each after another has left its values in the buffers."""
    ours, graphs, api = replayed
    for _ in range(2):
        draw(ours)
    for name, change in [*CHANGES.items()] * 2:
        assert_equal(draw(ours, **change), draw(pipe, **change), f"{name}, with graphs and without")
    assert api.replays > 100
    assert len(graphs) == graphs.captures


def test_one_step_serves_every_sampler_and_step_count(replayed: tuple[fastsd.Pipeline, Graphs, StandIn]) -> None:
    ours, graphs, _ = replayed
    draw(ours)
    draw(ours)
    captures = graphs.captures
    assert captures == 3, "text, step, decode"
    for name in ("prompt", "seed", "guidance", "steps", "a sampler with noise", "a sampler with history", "a schedule"):
        draw(ours, **CHANGES[name])
        assert graphs.captures == captures, f"captured again for another {name}"


class Watch(TorchDispatchMode):
    """What is asked of PyTorch, in order; a replay counts as one."""

    def __init__(self, api: StandIn) -> None:
        super().__init__()
        self.api = api
        self.seen: list[str] = []
        self.replays = api.replays

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.api.replaying:
            self.seen.append(op.__name__)
        elif self.api.replays > self.replays:
            self.seen.append("replay")
            self.replays = self.api.replays
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sampler", "noise"), [("ddim", False), ("dpmpp_2m", False), ("euler_ancestral", True)])
def test_a_walk_is_replays_and_nothing_between_them(
    replayed: tuple[fastsd.Pipeline, Graphs, StandIn], sampler: str, noise: bool
) -> None:
    """No tensor is made and no operation asked for from the first step to the last, but for noise where a sampler adds some."""
    ours, _, api = replayed
    for _ in range(2):
        draw(ours)
    steps = 6
    with Watch(api) as watch:
        draw(ours, "a small blue square", sampler=sampler, num_inference_steps=steps, output_type="latent")
    replays = [index for index, name in enumerate(watch.seen) if name == "replay"]
    assert len(replays) == 1 + steps, "text, and every step"
    between = set(watch.seen[replays[1] : replays[-1]]) - {"replay"}
    drawing = {"randn.generator", "stack.default", "permute.default", "clone.default", "copy_.default"}
    assert between == (drawing if noise else set())


def test_what_was_captured_in_inference_mode_serves_outside_of_it(
    pipe: fastsd.Pipeline, replayed: tuple[fastsd.Pipeline, Graphs, StandIn]
) -> None:
    ours, _, api = replayed
    with torch.inference_mode():
        for _ in range(3):
            draw(ours)
    assert api.replays > 0
    assert_equal(draw(ours, seed=4), draw(pipe, seed=4), "captured inside, replayed outside")


def test_the_first_picture_equals_the_tenth(replayed: tuple[fastsd.Pipeline, Graphs, StandIn]) -> None:
    ours, _, _ = replayed
    first = draw(ours, num_inference_steps=2)
    for _ in range(9):
        assert np.array_equal(draw(ours, num_inference_steps=2), first)


def test_a_cancelled_walk_leaves_nothing_behind(
    pipe: fastsd.Pipeline, replayed: tuple[fastsd.Pipeline, Graphs, StandIn]
) -> None:
    ours, _, api = replayed
    draw(ours)
    draw(ours)

    def cancel(pipe: fastsd.Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(ours, callback_on_step_end=cancel)
    before = api.replays
    assert np.array_equal(draw(ours), draw(pipe))
    assert api.replays > before, "the graph was not given back"


def test_latents_from_a_callback_reach_the_buffers(
    pipe: fastsd.Pipeline, replayed: tuple[fastsd.Pipeline, Graphs, StandIn]
) -> None:
    ours, _, _ = replayed

    def halve(pipe: fastsd.Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.5} if step == 1 else {}

    for _ in range(3):
        assert np.array_equal(draw(ours, callback_on_step_end=halve), draw(pipe, callback_on_step_end=halve))


def test_a_non_finite_value_is_told_with_its_step(replayed: tuple[fastsd.Pipeline, Graphs, StandIn]) -> None:
    ours, _, _ = replayed
    draw(ours)
    draw(ours)

    def spoil(pipe: fastsd.Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        huge = values["latents"].sign() * 1e38  # finite, but not what the UNet makes of it
        return {"latents": huge} if step == 1 else {}

    with pytest.raises(fastsd.errors.NumericsError, match="step 3 of 4"):
        draw(ours, callback_on_step_end=spoil)
    assert np.isfinite(draw(ours)).all()


def test_threads_get_what_serial_gives(
    pipe: fastsd.Pipeline, replayed: tuple[fastsd.Pipeline, Graphs, StandIn]
) -> None:
    ours, _, _ = replayed
    draw(ours)
    expected = {seed: draw(pipe, seed=seed) for seed in range(4)}
    drawn: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        drawn[seed] = draw(ours, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, image in expected.items():
        assert np.array_equal(drawn[seed], image), f"seed {seed}"


def test_weights_changed_in_place_change_the_picture_and_back(
    replayed: tuple[fastsd.Pipeline, Graphs, StandIn],
) -> None:
    ours, graphs, _ = replayed
    first = [draw(ours) for _ in range(3)][-1]
    weight = ours.unet.mid_block.attentions[0].proj_in.weight
    kept = weight.detach().clone()
    captures = graphs.captures
    with torch.no_grad():
        weight.mul_(1.5)
        assert not np.array_equal(draw(ours), first)
        weight.copy_(kept)
    assert np.array_equal(draw(ours), first)
    assert graphs.captures == captures, "a change in place needs no new capture"


def test_weights_that_were_moved_are_captured_anew(
    pipe: fastsd.Pipeline, replayed: tuple[fastsd.Pipeline, Graphs, StandIn]
) -> None:
    """A graph would go on reading the memory where they lay."""
    ours, graphs, _ = replayed
    draw(ours)
    draw(ours)
    captures = graphs.captures
    ours.unet.conv_in.weight.data = ours.unet.conv_in.weight.data.clone()
    change = CHANGES["prompt"]  # what was encoded already is not encoded again
    assert np.array_equal(draw(ours, **change), draw(pipe, **change))
    assert graphs.captures == 2 * captures


def test_warmup_captures_what_a_picture_needs(replayed: tuple[fastsd.Pipeline, Graphs, StandIn]) -> None:
    ours, graphs, _ = replayed
    ours.warmup([(64, 64), (48, 64)])
    captures = graphs.captures
    assert captures == 1 + 4 + 2, "text; a step with and without guidance at each size; decode at each"
    for change in ({}, {"guidance_scale": 1.0}, {"height": 48}):
        draw(ours, **change)
    assert graphs.captures == captures
