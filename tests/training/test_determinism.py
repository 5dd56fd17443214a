"""The same command gives the same weights: by PyTorch's deterministic algorithms, or with a warning that says why not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsd.pipeline import BUNDLED
from fastsd.training.data import Batch, Draws
from fastsd.training.determinism import Repeatable
from fastsd.training.loop import fit
from tests.training.builders import (
    Numbers,
    Toy,
    differing,
    files,
    fit_in_parts,
    logged,
    options,
    state_of,
)


def modes() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


class Watched(Toy):
    """Notes the modes that its forward and its backward pass run in. operation: one more, within the backward pass."""

    def __init__(self, operation: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, bool]] = []
        self.operation = operation

    def losses(self, batch: Batch, draws: Draws, progress: float) -> dict[str, Tensor]:
        losses = super().losses(batch, draws, progress)
        self.seen.append(modes())
        losses["loss"].register_hook(self.note)
        return losses

    def note(self, gradient: Tensor) -> None:
        self.seen.append(modes())
        self.operation()


def put() -> object:
    """An operation for which PyTorch has no deterministic algorithm on any device."""
    return torch.zeros(3).put_(torch.tensor([0, 2]), torch.ones(2))


def test_a_step_takes_deterministic_algorithms_and_leaves_others_theirs(tmp_path: Path) -> None:
    before, between = modes(), []
    task = Watched()
    fit(task, Numbers(), options(sample_every=1), tmp_path, lambda step: between.append(modes()))
    assert set(task.seen) == {(True, False, False)}, "a pass ran with algorithms of another kind"
    assert {modes(), *between} == {before}, "what is not training ran otherwise than without it"


def test_without_a_deterministic_algorithm_it_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = modes()
    task = Watched(put)
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        assert fit(task, Numbers(), options(), tmp_path / "put")
    assert task.seen[:3] == [(True, False, False)] * 2 + [(True, True, False)], "the step was not begun anew"
    assert set(task.seen[2:]) == {(True, True, False)}, "each step was tried twice"
    assert modes() == before
    told = [record for record in caplog.messages if "another run may give slightly other weights" in record]
    assert len(told) == 1, f"said {told}"
    assert "put_" in told[0]
    plain = fit_in_parts(tmp_path / "plain", [None])
    assert not differing(state_of(task), state_of(plain)), "the step that was begun twice has other gradients"
    assert logged(tmp_path / "put") == logged(tmp_path / "plain")


def test_other_errors_are_not_its_own() -> None:
    before, calls = modes(), []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Repeatable()(broken)
    assert len(calls) == 1
    assert modes() == before


ON_A_GPU = """
output = {output}
device = "cuda"
base = {base}
[data]
resolution = 128
size = 64
[[stages]]
kind = "autoencoder"
crop = 64
fit = {{ {fit} }}
[[stages]]
kind = "diffusion"
train_text_encoder = true
loss = {{ claims = 0.01 }}
fit = {{ {fit} }}
[[stages]]
kind = "lora"
text_layers = ["q_proj", "out_proj"]
fit = {{ {fit} }}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_the_same_command_gives_the_same_files(precision: str, tmp_path: Path) -> None:
    """In processes of their own, since cuBLAS looks only once how it shall work; with attention of many tokens."""
    fitted = f'steps = 20, batch_size = 16, warmup_steps = 1, precision = "{precision}"'
    found = []
    for name in "ab":
        config, output = tmp_path / f"{name}.toml", tmp_path / name
        config.write_text(ON_A_GPU.format(output=json.dumps(str(output)), base=json.dumps(str(BUNDLED)), fit=fitted))
        command = [sys.executable, "-m", "fastsd", "train", "--config", config]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "another run may give" not in done.stderr, done.stderr
        found.append(files(output))  # of every stage
    assert found[0].keys() == found[1].keys()
    other = [name for name in found[0] if found[0][name] != found[1][name]]
    assert not other, f"a second run wrote other weights to {other}"
