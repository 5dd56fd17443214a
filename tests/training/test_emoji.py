"""Emoji of an Iconify package as a folder of pictures with captions."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastsd.training import emoji
from fastsd.training.folder_data import PictureFolder

BODY = '<path fill="{}" d="M{} 0h4v8H{}z"/>'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Two things, one of them in a box of its own; a face and something hidden, which are not wanted."""
    folder = tmp_path / "package"
    folder.mkdir()
    icons = {
        "red-apple": {"body": BODY.format("#f00", 0, 0)},  # the left half
        "blue-car": {"body": BODY.format("#00f", 12, 12), "left": 8},  # the right half of a box that begins at 8
        "grinning-face": {"body": BODY.format("#ff0", 0, 0)},
        "old-car": {"body": BODY.format("#000", 0, 0), "hidden": True},
    }
    groups = {
        "Food & Drink": ["red-apple"],
        "Travel & Places": ["blue-car", "old-car"],
        "Smileys & Emotion": ["grinning-face"],
    }
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 8, "height": 8}))
    (folder / "metadata.json").write_text(json.dumps({"categories": groups}))
    return folder


def test_things_become_pictures_on_white_with_their_names(package: Path, tmp_path: Path) -> None:
    assert emoji.write_pictures(package, tmp_path / "out", 16) == 2
    data = PictureFolder(tmp_path / "out", 16)
    assert [file.name for file in data.files] == ["blue-car.png", "red-apple.png"]
    assert data.captions[1] == ["red apple", "a picture of red apple", "an emoji of red apple"]
    car, apple = data.image(0), data.image(1)
    assert np.array_equal(apple[8, 2], [255, 0, 0])
    assert np.array_equal(apple[8, 13], [255, 255, 255])
    assert np.array_equal(car[8, 13], [0, 0, 255]), "the box of an icon of its own is not heeded"
    assert np.array_equal(car[8, 2], [255, 255, 255])


def test_another_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoji.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no icons.json of Iconify's; unpack one of its npm packages" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
