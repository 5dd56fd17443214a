"""Coloured shapes on plain backgrounds, drawn from a description.

A `Scene` says what is to be seen; `draw` makes the picture. There are nine shapes in eight colours, in two sizes, on four
backgrounds: one object in one of nine places, two objects in one of four relations, or two or three equal objects. Whole pairs
of a shape and a colour are held out (`HELD_OUT`): no training scene shows one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
Split = Literal["train", "held_out"]

COLOURS: Mapping[str, Colour] = {
    "red": (220, 38, 38),
    "orange": (245, 140, 25),
    "yellow": (248, 216, 40),
    "green": (45, 165, 70),
    "blue": (45, 85, 220),
    "purple": (135, 55, 180),
    "pink": (248, 130, 190),
    "brown": (130, 78, 36),
}
BACKGROUNDS: Mapping[str, Colour] = {
    "white": (248, 248, 248),
    "black": (14, 14, 14),
    "gray": (132, 132, 132),
    "cyan": (120, 216, 224),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "moon")
SIZES: Mapping[str, tuple[float, float]] = {"small": (0.105, 0.13), "large": (0.175, 0.195)}
"""Half of an object's longer side, as a fraction of the picture's."""
NEAR, MIDDLE, FAR = 0.27, 0.5, 0.73
POSITIONS: Mapping[str, Point] = {
    "center": (MIDDLE, MIDDLE),
    "left": (NEAR, MIDDLE),
    "right": (FAR, MIDDLE),
    "top": (MIDDLE, NEAR),
    "bottom": (MIDDLE, FAR),
    "top left": (NEAR, NEAR),
    "top right": (FAR, NEAR),
    "bottom left": (NEAR, FAR),
    "bottom right": (FAR, FAR),
}
"""Where an object's middle is, from the top left, before it is jittered by up to `JITTER` each way."""
JITTER = 0.02
RELATIONS: Mapping[str, tuple[Point, Point]] = {
    "left of": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "right of": ((FAR, MIDDLE), (NEAR, MIDDLE)),
    "above": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "below": ((MIDDLE, FAR), (MIDDLE, NEAR)),
}
"""Where the first and the second object are."""
GROUPS: Mapping[int, Sequence[Sequence[Point]]] = {
    2: (
        ((NEAR, MIDDLE), (FAR, MIDDLE)),
        ((MIDDLE, NEAR), (MIDDLE, FAR)),
    ),
    3: (
        ((0.17, MIDDLE), (MIDDLE, MIDDLE), (0.83, MIDDLE)),
        ((NEAR, FAR), (MIDDLE, NEAR), (FAR, FAR)),
    ),
}
"""Layouts of equal objects; like the sizes, such that no two of them touch."""
HELD_OUT = frozenset(
    (shape, tuple(COLOURS)[(3 * index + 1) % len(COLOURS)]) for index, shape in enumerate(SHAPES)
)  # one colour of each shape; each colour once, orange twice


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """things: one or two objects; of one there may be up to three. relation: of two things; position: of one alone."""

    things: tuple[Thing, ...]
    background: str
    count: int = 1
    position: str | None = None
    relation: str | None = None


def random_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """One object in 45% of the scenes, two different ones in 30%, two or three equal ones in 25%."""
    background = str(rng.choice(tuple(BACKGROUNDS)))
    kind = rng.random()
    held_out = split == "held_out"
    if kind < 0.45:
        position = str(rng.choice(tuple(POSITIONS)))
        return Scene((_random_thing(rng, held_out),), background, position=position)
    if kind < 0.75:
        things = [_random_thing(rng, held_out)]
        while len(things) < 2:
            other = _random_thing(rng, held_out=False)
            things += [other] if (other.shape, other.colour) != (things[0].shape, things[0].colour) else []
        order = rng.permutation(2)
        relation = str(rng.choice(tuple(RELATIONS)))
        return Scene((things[order[0]], things[order[1]]), background, relation=relation)
    count = int(rng.integers(2, 4))
    thing = _random_thing(rng, held_out)
    thing = Thing(thing.shape, thing.colour, "small") if count == 3 else thing  # three large ones do not fit in a row
    return Scene((thing,), background, count=count)


def _random_thing(rng: np.random.Generator, held_out: bool) -> Thing:
    size = str(rng.choice(tuple(SIZES)))
    while True:
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(tuple(COLOURS))), size)
        if thing.held_out == held_out:
            return thing


def draw(scene: Scene, rng: np.random.Generator, resolution: int = 128, stroke: float | None = None) -> np.ndarray:
    """The picture [resolution, resolution, 3] uint8: places, sizes and colours jittered, edges smoothed by 4×4 samples.

    stroke: the objects are outlines of that width, a fraction of the picture's side, instead of filled.
    """
    picture = np.empty((resolution, resolution, 3), np.float32)
    picture[:] = _jittered(BACKGROUNDS[scene.background], rng)
    for thing, middle in _placed(scene, rng):
        low, high = SIZES[thing.size]
        coverage = _coverage(thing.shape, rng.uniform(low, high), middle, resolution, stroke)[..., None]
        picture += coverage * (_jittered(COLOURS[thing.colour], rng) - picture)
    return picture.round().astype(np.uint8)


def _placed(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, Point]]:
    """Each object and its middle."""
    if scene.relation is not None:
        middles: Sequence[Point] = RELATIONS[scene.relation]
        things = scene.things
    elif scene.count > 1:
        middles = GROUPS[scene.count][int(rng.integers(len(GROUPS[scene.count])))]
        things = scene.things * scene.count
    else:
        middles = [POSITIONS[scene.position or "center"]]
        things = scene.things
    jitter = rng.uniform(-JITTER, JITTER, (len(middles), 2))
    return [(thing, (x + dx, y + dy)) for thing, (x, y), (dx, dy) in zip(things, middles, jitter, strict=True)]


def _jittered(colour: Colour, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) + rng.integers(-5, 6, 3), 0, 255).astype(np.float32)


def _coverage(
    shape: str, radius: float, middle: Point, resolution: int, stroke: float | None, samples: int = 4
) -> np.ndarray:
    """How much of each pixel the shape covers, in [0, 1]. [resolution, resolution] float32."""
    side = resolution * samples
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for outline, ink in OUTLINES[shape]():
        points = [((middle[0] + radius * x) * side, (middle[1] + radius * y) * side) for x, y in outline]
        if stroke is None:
            pen.polygon(points, fill=ink)
        else:
            pen.line([*points, *points[:2]], fill=255, width=round(stroke * side), joint="curve")
    return np.asarray(mask.reduce(samples), np.float32) / 255


Outlines = Sequence[tuple[Sequence[Point], int]]
"""Polygons within [−1, 1]², y downwards, the longer side 2; each with 255 to fill it or 0 to cut it out."""


def _circle(radius: float = 1.0, middle: Point = (0.0, 0.0), points: int = 64) -> list[Point]:
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(middle[0] + radius * math.cos(a), middle[1] + radius * math.sin(a)) for a in angles]


def _fitted(outline: Sequence[Point]) -> list[Point]:
    """Moved and enlarged so that its longer side is [−1, 1] and its other one centred."""
    low, high = np.min(outline, 0), np.max(outline, 0)
    scale = 2 / (high - low).max()
    return [((x - (low[0] + high[0]) / 2) * scale, (y - (low[1] + high[1]) / 2) * scale) for x, y in outline]


@cache
def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 64 for i in range(64)]
    return _fitted(
        [
            (16 * math.sin(a) ** 3, -13 * math.cos(a) + 5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a))
            for a in angles
        ]
    )


@cache
def _star() -> list[Point]:
    radii = [1.0, 0.45] * 5
    return _fitted([(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)])


@cache
def _cross(arm: float = 0.34) -> list[Point]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turned = [quarter]
    for _ in range(3):
        turned.append([(-y, x) for x, y in turned[-1]])
    return [point for part in turned for point in part]


@cache
def _moon() -> list[Point]:
    """A crescent open to the right: the outer arc, and back along the inner one."""
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.30 * math.pi, 1.70 * math.pi, 48)]
    x, y = outer[0]
    bow = math.atan2(y, x - 0.62)  # the inner arc is of a circle round (0.62, 0) through the same tips
    radius = math.hypot(x - 0.62, y)
    inner = [(0.62 + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(2 * math.pi - bow, bow, 48)]
    return _fitted([*outer, *inner])


OUTLINES: Mapping[str, Callable[[], Outlines]] = {
    "circle": lambda: [(_circle(), 255)],
    "square": lambda: [([(-1, -1), (1, -1), (1, 1), (-1, 1)], 255)],
    "triangle": lambda: [([(0, -0.9), (1, 0.9), (-1, 0.9)], 255)],
    "star": lambda: [(_star(), 255)],
    "heart": lambda: [(_heart(), 255)],
    "ring": lambda: [(_circle(), 255), (_circle(0.56), 0)],
    "cross": lambda: [(_cross(), 255)],
    "diamond": lambda: [([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)], 255)],
    "moon": lambda: [(_moon(), 255)],
}
