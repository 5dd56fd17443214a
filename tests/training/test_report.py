"""What a run shows of itself: the curves of the log, grids of pictures, and what it does without matplotlib."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.training import report
from fastsd.training.loop import LOG
from fastsd.training.model import Model
from fastsd.training.recipe import SampleOptions
from tests.training.builders import drawings


def write_log(folder: Path, *lines: dict[str, float]) -> None:
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_are_drawn_of_every_value(tmp_path: Path) -> None:
    """A panel each; values that some lines lack, and lines without a number, leave gaps."""
    pytest.importorskip("matplotlib")
    lines = [{"step": step, "loss": 1 / step, "norm": float("inf") if step == 3 else step} for step in range(1, 9)]
    write_log(tmp_path, {"step": 0, "loss": 2.0}, *lines)
    report.draw_losses(tmp_path)
    with Image.open(tmp_path / "losses.png") as image:
        two = image.height
        curve = (np.asarray(image.convert("RGB")).astype(int).max(-1) - np.asarray(image.convert("RGB")).min(-1)) > 60
    assert curve[: two // 2].any(), "no curve in the upper panel"
    assert curve[two // 2 :].any(), "no curve in the lower panel"
    write_log(tmp_path, *({"step": line["step"], "loss": line["loss"]} for line in lines))
    report.draw_losses(tmp_path)
    with Image.open(tmp_path / "losses.png") as image:
        assert image.height == two // 2, "a panel each"


@pytest.mark.parametrize("lines", [[], [{"step": 1}]])
def test_without_values_nothing_is_drawn(lines: list[dict[str, float]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_log(tmp_path, *lines)
    report.draw_losses(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_log(tmp_path, {"step": 1, "loss": 1.0})
    report.draw_losses(tmp_path)
    assert 'losses.png: needs matplotlib; pip install "fastsd[train]"' in caplog.text
    assert not (tmp_path / "losses.png").exists()


def test_reconstructions_stand_below_their_pictures(model: Model, tmp_path: Path) -> None:
    data = drawings()
    path = tmp_path / "samples" / "1.png"
    report.draw_reconstructions(model.vae, data, path, count=3)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 32, 3 * 32, 3)
    image = data.image(2).astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        mean = model.vae.encode(torch.from_numpy(image)[None])
        made = ((model.vae.decode(mean)[0].clamp(-1, 1) + 1) * 127.5).round().numpy()
    assert np.array_equal(sheet[:32, 64:], data.image(2))
    assert np.abs(sheet[32:, 64:].astype(int) - made).max() <= 1, "a rounding apart, as it was in a batch"


def test_samples_are_drawn_from_the_model_as_it_is(model: Model, tmp_path: Path) -> None:
    samples = SampleOptions(("a red circle",), num_inference_steps=2, guidance_scale=2.0)
    sheets = []
    for name in ("a", "b", "changed"):
        if name == "changed":
            model.unet.requires_grad_(False)
            model.unet.conv_out.bias += 0.5
        report.draw_samples(model, samples, tmp_path / f"{name}.png")
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0][:32], sheets[2][:32])
