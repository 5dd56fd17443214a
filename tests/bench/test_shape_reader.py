"""The reader sees what shapes.py drew, also through what an autoencoder does to a picture, and takes nothing else for it."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from bench.shape_reader import UNCLEAR, Reading, read
from fastsd.errors import ImageError
from fastsd.training.shape_scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing, draw
from fastsd.training.shapes import Shapes

DEGRADED_RIGHT = 0.99
"""The share of degraded pictures in which every attribute must be right."""


def wrong(reading: Reading, scene: Scene) -> str:
    """What is read otherwise than drawn; empty if nothing is."""
    drawn = scene.things * scene.count
    seen = sorted((one.colour, one.shape, one.size) for one in reading.objects)
    right = seen == sorted((one.colour, one.shape, one.size) for one in drawn)
    return "" if right and reading.background == scene.background else f"{scene} was read as {reading}"


def degraded(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges that waver by about a pixel, a blur of 1 pixel, a cast of 8/255 in each channel, and noise of 6/255."""
    side = len(picture)
    bend = ndimage.gaussian_filter(rng.normal(size=(2, side, side)), (0, 2.5, 2.5))
    where = np.indices((side, side)) + bend * (0.5 / bend.std())
    bent = [
        ndimage.map_coordinates(picture[..., c].astype(np.float32), where, order=1, mode="nearest") for c in range(3)
    ]
    blurred = ndimage.gaussian_filter(np.stack(bent, -1), (1, 1, 0))
    spoilt = blurred + rng.choice([-8, 8], 3) + rng.normal(0, 6, blurred.shape)
    return np.clip(spoilt.round(), 0, 255).astype(np.uint8)


def alone(shape: str = "circle", colour: str = "red", size: str = "large", background: str = "white") -> np.ndarray:
    scene = Scene((Thing(shape, colour, size),), background, position="center")
    return draw(scene, np.random.default_rng(0))


def every_thing() -> list[Scene]:
    """Each shape in each colour and size on each background, the places in turn."""
    combinations = product(SHAPES, COLOURS, SIZES, BACKGROUNDS)
    return [
        Scene((Thing(shape, colour, size),), background, position=tuple(POSITIONS)[i % len(POSITIONS)])
        for i, (shape, colour, size, background) in enumerate(combinations)
    ]


def test_every_shape_colour_size_and_background_is_read() -> None:
    rng = np.random.default_rng(1)
    faults = [fault for scene in every_thing() if (fault := wrong(read(draw(scene, rng)), scene))]
    assert not faults, f"{len(faults)}, first {faults[:3]}"


def test_where_and_how_large_an_object_is() -> None:
    for i, scene in enumerate(every_thing()[::7]):
        place, (low, high) = POSITIONS[scene.position or ""], SIZES[scene.things[0].size]
        (one,) = read(draw(scene, np.random.default_rng(i))).objects
        assert np.abs(np.subtract(one.middle, place)).max() < 0.03 + 0.006, (
            f"{scene}: {one.middle}, of jitter 0.03 at most"
        )
        assert low - 0.006 < one.radius < high + 0.006, f"{scene}: radius {one.radius}"


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize(("resolution", "count"), [(64, 100), (128, 200), (256, 25)])
def test_scenes_are_read(split: str, resolution: int, count: int) -> None:
    shapes = Shapes(split=split, resolution=resolution, seed=3)  # type: ignore[arg-type]
    faults = [fault for i in range(count) if (fault := wrong(read(shapes.image(i)), shapes.scene(i)))]
    assert not faults, f"{len(faults)} of {count}, first {faults[:3]}"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_degraded_scenes_are_read(split: str) -> None:
    shapes, count = Shapes(split=split, seed=4), 100  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    faults = [fault for i in range(count) if (fault := wrong(read(degraded(shapes.image(i), rng)), shapes.scene(i)))]
    assert len(faults) <= (1 - DEGRADED_RIGHT) * count, f"{len(faults)} of {count}, first {faults[:3]}"


def test_each_shape_is_read_degraded() -> None:
    rng = np.random.default_rng(6)
    scenes = every_thing()[::4]  # on white: all shapes, colours and sizes
    faults = [fault for scene in scenes if (fault := wrong(read(degraded(draw(scene, rng), rng)), scene))]
    assert len(faults) <= (1 - DEGRADED_RIGHT) * len(scenes), f"{len(faults)} of {len(scenes)}, first {faults[:3]}"


@pytest.mark.parametrize("colours", [("yellow", "brown", "black"), ("red", "pink", "white")])
def test_neighbours_whose_blurred_edges_meet_are_two(colours: tuple[str, str, str]) -> None:
    left, right, background = colours
    picture, other = (alone("square", colour, background=background) for colour in (left, right))
    first, last = np.flatnonzero((picture[64] != picture[0, 0]).any(-1))[[0, -1]]  # of the columns; both stand alike
    picture[:, :64] = np.roll(picture, 61 - last, axis=1)[:, :64]
    picture[:, 64:] = np.roll(other, 64 - first, axis=1)[:, 64:]  # 2 pixels between them and two half covered
    found = read(ndimage.gaussian_filter(picture, (1.6, 1.6, 0))).objects
    assert sorted((one.colour, one.shape) for one in found) == sorted([(left, "square"), (right, "square")]), found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_shape_is_not_that_shape(shape: str, size: str) -> None:
    whole = alone(shape, size=size)
    (one,) = read(whole).objects
    columns = slice(round(one.middle[0] * len(whole)), None)
    rows = slice(round(one.middle[1] * len(whole)), None)
    for part in ((slice(None), columns), (rows, slice(None)), (rows, columns)):
        if shape == "triangle" and part[1] == slice(None):
            continue  # its upper half is a triangle
        half = whole.copy()
        half[part] = whole[0, 0]
        found = read(half).objects
        assert found, f"{shape}: half of it was not seen at all"
        assert all(other.shape != shape for other in found), f"{shape}, {part} painted over: {found}"


@pytest.mark.parametrize("second", [colour for colour in COLOURS if colour != "red"])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_object_of_two_colours_has_none(second: str, background: str) -> None:
    mixed, other = alone(background=background), alone(colour=second, background=background)
    mixed[:, :64] = other[:, :64]
    found = read(mixed).objects
    clear = [one for one in found if UNCLEAR not in (one.colour, one.shape)]
    assert found, "the object was not seen"
    assert not clear, f"half red, half {second} was read as {clear}"


def test_colours_that_cancel_out_are_unclear() -> None:
    picture = np.full((128, 128, 3), 132, np.uint8)
    picture[50:70, 50:60], picture[50:70, 60:70] = 232, 32
    with np.errstate(all="raise"):
        found = read(picture).objects
    assert [one.colour for one in found] == [UNCLEAR], found


@pytest.mark.parametrize("place", [(100, 20), (64, 110), (3, 3)])
def test_an_extra_blob_is_counted(place: tuple[int, int]) -> None:
    picture = alone("star", "blue")
    x, y = place
    picture[y - 3 : y + 3, x - 3 : x + 3] = (220, 38, 38)
    assert len(read(picture).objects) == 2, str(read(picture))


def test_a_blob_at_the_shape_makes_it_unclear() -> None:
    picture = alone("circle", "blue")
    (one,) = read(picture).objects
    x, y = round(one.middle[0] * 128), round((one.middle[1] - one.radius) * 128)
    picture[y - 10 : y + 4, x - 7 : x + 7] = picture[round(one.middle[1] * 128), x]
    (grown,) = read(picture).objects
    assert grown.shape == UNCLEAR, str(grown)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_has_no_objects(background: str) -> None:
    picture = np.tile(np.array(BACKGROUNDS[background], np.uint8), (128, 128, 1))
    assert read(picture) == Reading(background, ())
    picture[60, 60] = 255 - picture[60, 60]
    assert read(picture).objects == (), "a single pixel is a speck"


def test_an_unknown_background_is_unclear() -> None:
    picture = np.tile(np.array((200, 40, 200), np.uint8), (128, 128, 1))
    assert read(picture).background == UNCLEAR


def unknown_pictures() -> Sequence[np.ndarray]:
    rng = np.random.default_rng(7)
    noise = rng.integers(0, 256, (96, 96, 3))
    tiles = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((12, 12, 1)))
    clouds = ndimage.gaussian_filter(rng.normal(128, 900, (96, 96, 3)), (4, 4, 0)).clip(0, 255)
    opposite = np.where(rng.random((96, 96, 1)) < 0.5, [0, 255, 255], [255, 0, 0])
    return [picture.astype(np.uint8) for picture in (noise, tiles, clouds, opposite)]


@pytest.mark.parametrize("picture", unknown_pictures(), ids=["noise", "tiles", "clouds", "opposite"])
def test_nothing_clear_is_read_in_other_pictures(picture: np.ndarray) -> None:
    found = read(picture).objects
    assert found, "a picture full of colours was read as empty"
    assert all(UNCLEAR in (one.colour, one.shape) for one in found), str(found)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((64, 96, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
    ],
    ids=["grey", "floats", "oblong", "tiny"],
)
def test_other_arrays_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ImageError, match="picture: must be"):
        read(picture)
