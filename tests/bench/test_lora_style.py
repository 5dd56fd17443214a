"""bench.lora_style: what it takes for an outline, the folder it writes, and that it reports a LoRA that did nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import lora_style
from fastsd.training.folder_data import PictureFolder
from fastsd.training.shape_scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, draw


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
def test_outlines_are_told_from_filled_objects(shape: str, background: str) -> None:
    for size in ("small", "large"):
        scene = Scene((Thing(shape, "red", size),), background, position="center")
        for stroke, wanted in ((None, 0.0), (lora_style.STROKE, 1.0)):
            if size == "small" and stroke and shape in ("star", "heart", "moon", "cross", "triangle", "diamond"):
                continue  # too narrow for a hole that is clearly one
            picture = Image.fromarray(draw(scene, np.random.default_rng(0), 128, stroke))
            assert lora_style.outlined([picture]) == wanted, f"{size} {shape}: {lora_style.filled(picture)}"


def test_an_empty_picture_is_not_outlined() -> None:
    assert lora_style.outlined([Image.new("RGB", (64, 64), "white")]) == 0


def test_the_folder_is_one_to_train_on(tmp_path: Path) -> None:
    lora_style.write_pictures(tmp_path / "pictures", 5, 64)
    data = PictureFolder(tmp_path / "pictures", 64)
    captions = [data.caption(index, np.random.default_rng(0)).text for index in range(len(data))]
    assert len(data) == 5
    assert all(any(colour in caption for colour in COLOURS) for caption in captions)
    assert all(data.image(index).shape == (64, 64, 3) for index in range(5))


def test_a_lora_that_did_nothing_is_not_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step changes next to nothing; that the pictures come back is then true all the same."""
    out = tmp_path / "out.json"
    told = ["--steps", "1", "--pictures", "16", "--device", "cpu", "--folder", str(tmp_path / "run"), "--out", str(out)]
    assert lora_style.main([*told, "--grid", str(tmp_path / "grid.png")]) == 1
    result = json.loads(out.read_text())
    assert result["first_pictures_restored"] is True
    assert result["outlined"]["with"] < 0.5
    assert (tmp_path / "run/run/lora/lora.safetensors").is_file()
    assert "the first pictures are back to the last bit: True" in capsys.readouterr().out
