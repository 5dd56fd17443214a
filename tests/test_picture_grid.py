"""Sheets of pictures: each whole and in its place, labels below them, frames around them."""

import numpy as np
import pytest
from PIL import Image

from fastsd.picture_grid import grid

HEIGHT, WIDTH = 16, 20


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((HEIGHT, WIDTH, 3), 20 * index + 10, np.uint8)) for index in range(count)]


@pytest.mark.parametrize(
    ("count", "columns", "rows", "across"),
    [(1, None, 1, 1), (2, None, 1, 2), (3, None, 2, 2), (5, None, 2, 3), (1, 8, 1, 1), (3, 2, 2, 2), (9, 8, 2, 8)],
)
@pytest.mark.parametrize("framed", [False, True])
def test_every_picture_is_in_its_place(count: int, columns: int | None, rows: int, across: int, framed: bool) -> None:
    sheet = np.asarray(grid(pictures(count), columns, frames=["red"] * count if framed else []))
    assert sheet.shape[0] % rows == sheet.shape[1] % across == 0
    height, width, border = sheet.shape[0] // rows, sheet.shape[1] // across, 3 if framed else 0
    assert (height, width) == ((HEIGHT + 8, WIDTH + 8) if framed else (HEIGHT, WIDTH))
    for index, picture in enumerate(pictures(count)):
        cell = sheet[index // across * height :, index % across * width :][:height, :width]
        found = cell[border : border + HEIGHT, border : border + WIDTH]
        assert np.array_equal(found, np.asarray(picture)), f"picture {index}"
        if framed:
            around = cell[: HEIGHT + 6, : WIDTH + 6].reshape(-1, 3)
            assert ((around == (255, 0, 0)).all(1)).sum() == (HEIGHT + 6) * (WIDTH + 6) - HEIGHT * WIDTH, "the frame"


def test_labels_stand_below_their_pictures() -> None:
    plain = np.asarray(grid(pictures(2), 2, ["", "."]))
    sheet = np.asarray(grid(pictures(2), 2, ["", "circle"]))
    assert sheet.shape == plain.shape == (HEIGHT + 2 + 12, 2 * (WIDTH + 2), 3)
    written = np.argwhere((sheet != plain).any(-1))
    assert len(written) > 10, "nothing is written"
    assert written[:, 0].min() >= HEIGHT, "the label is in the picture"
    assert written[:, 1].min() >= WIDTH + 2, "the label is under the other picture"


def test_there_is_room_for_the_longest_label() -> None:
    one, three = (grid(pictures(2), 2, ["circle", label]) for label in ("star", "a large red circle on black"))
    lines = (three.height - one.height) // 12 + 1
    assert lines >= 3
    last = np.asarray(three)[HEIGHT + 12 * (lines - 1) :, WIDTH + 2 :]
    assert (last < 128).any(), "the last line is not written"
