"""What is to be seen in a picture of the procedural data set, by image analysis alone: the inverse of shape_scenes.py.

Regions that differ from the border's colour are objects. Each is taken for a mixture of one colour with the background, which
gives the coverage of its pixels, blurred edges included; its shape is the one of shapes.py whose drawing, laid over it with the
same area and centre of mass, overlaps it most. What fits none of the known colours or shapes is "unclear": half a shape, one of
two colours, a blob.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from fastsd.errors import ImageError
from fastsd.training.shape_scenes import BACKGROUNDS, COLOURS, OUTLINES, SHAPES, SIZES, Colour, Point

UNCLEAR = "unclear"
SMALLEST_SIDE = 32
SPECK = 0.0008
"""A region of a smaller share of the picture is none; the smallest object has 0.008."""
CONTRAST = 40.0
"""A pixel farther from the background, in units of 1/255, is of an object. The weakest pair, purple on gray, is 91 apart."""
CORE = 1 / 3
"""Of a region's largest contrast: what is below it only joins objects whose blurred edges meet."""
FAR_COLOUR, FAR_BACKGROUND = 50.0, 60.0
"""From each known colour: then it is none of them. The nearest two, orange and yellow, are 77 apart."""
STAIN, STAINED = 45.0, 0.08
"""A region is of one colour if at most this share of it is farther than that from every mixture with the background."""
EDGE_ERROR = 0.06
"""An object whose edge is farther than this from the drawing's on average, in radii, is none of the known shapes; half a shape is
from 0.062 on. How much of the overlap a shift of the edge costs depends on the edge's length: no one overlap suits both
circles and stars."""
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2
FRAME, CELLS = 1.4, 56
"""Templates show [−1.4, 1.4]² in 56 × 56 cells, in units of the object's radius."""
BLURS = (0.0, 0.05, 0.1, 0.15, 0.2)
"""Each shape is compared blurred by these too, in radii."""


@dataclass(frozen=True)
class Found:
    """An object. colour, shape: of shapes.py, or "unclear". size: "small" or "large"."""

    colour: str
    shape: str
    size: str
    middle: Point
    """As shapes.py counts it: of its box, from the top left, in fractions of the picture's side."""
    radius: float
    """Half its longer side, likewise."""
    overlap: float
    """Intersection over union with the drawing it fits best, 1 at best."""
    edge_error: float
    """How far its edge is from that drawing's on average, in radii."""


@dataclass(frozen=True)
class Reading:
    background: str
    """Of shapes.py, or "unclear"."""
    objects: tuple[Found, ...]
    """From the top left, row by row."""

    def __str__(self) -> str:
        things = [f"{o.size} {o.colour} {o.shape} at ({o.middle[0]:.2f}, {o.middle[1]:.2f})" for o in self.objects]
        return f"{', '.join(things) or 'nothing'} on {self.background}"


def read(picture: np.ndarray | Image.Image) -> Reading:
    """What a square picture shows: [H, H, 3] uint8 or a PIL image, at least 32 pixels a side. ImageError for another."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ImageError(f"picture: must be [H, W, 3] uint8 or a PIL image, not {pixels.shape} {pixels.dtype}")
    if pixels.shape[0] != pixels.shape[1] or len(pixels) < SMALLEST_SIDE:
        raise ImageError(f"picture: must be square, {SMALLEST_SIDE} pixels or more a side, not {pixels.shape[:2]}")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    offsets = pixels.astype(np.float32) - background.astype(np.float32)  # [H, W, 3]
    found = [
        _object(offsets[box], mask, owned, background, (box[1].start, box[0].start), len(pixels))
        for box, mask, owned in _regions(offsets)
    ]
    return Reading(nearest(background, BACKGROUNDS, FAR_BACKGROUND), tuple(found))


def nearest(colour: np.ndarray, names: Mapping[str, Colour], limit: float) -> str:
    """The name of the colour that is least far from [3]; "unclear" beyond the limit."""
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in names.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= limit else UNCLEAR


def _regions(offsets: np.ndarray) -> list[tuple[tuple[slice, slice], np.ndarray, np.ndarray]]:
    """Of each region its box with a margin, its mask in there, and the pixels in there that are nearest to it."""
    contrast = np.linalg.norm(offsets, axis=-1)
    rough, count = ndimage.label(contrast > CONTRAST)
    if not count:
        return []
    peaks = np.concatenate([[0.0], ndimage.maximum(contrast, rough, range(1, count + 1))])
    labels, count = ndimage.label((rough > 0) & (contrast > CORE * peaks[rough]))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    labels[(areas < SPECK * labels.size)[labels]] = 0
    distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    margin = max(3, round(0.02 * len(offsets)))
    owner = np.where(distance <= margin, labels[rows, columns], 0)
    regions = []
    for label, box in enumerate(ndimage.find_objects(owner), 1):
        if box is not None:
            regions.append((box, labels[box] == label, owner[box] == label))
    return regions


def _object(
    offsets: np.ndarray, mask: np.ndarray, owned: np.ndarray, background: np.ndarray, corner: Point, side: int
) -> Found:
    """offsets: from the background [h, w, 3], in a box whose top left is at `corner` (x, y); mask, owned: as of `_regions`."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    core = offsets[depth >= 0.6 * depth.max()]  # [P, 3], where edges blur it least
    typical = core[np.linalg.norm(core - np.median(core, axis=0), axis=1).argmin()]
    colour = core[np.linalg.norm(core - typical, axis=1) <= STAIN].mean(0)  # of two colours one, not their middle
    share = offsets @ colour / (colour @ colour)
    strays = np.linalg.norm(offsets - np.clip(share, 0, 1.15)[..., None] * colour, axis=-1)[mask]
    name = nearest(background + colour, COLOURS, FAR_COLOUR) if (strays > STAIN).mean() <= STAINED else UNCLEAR
    coverage = np.clip(share, 0, 1) * owned
    best, overlap, (x, y), radius = _best_fit(coverage)
    templates = _templates()
    error = float((1 - overlap) * templates.areas[best] / templates.edges[best])
    return Found(
        colour=name,
        shape=SHAPES[best] if error <= EDGE_ERROR else UNCLEAR,
        size="large" if radius / side > LARGE else "small",
        middle=((x + corner[0]) / side, (y + corner[1]) / side),
        radius=radius / side,
        overlap=overlap,
        edge_error=error,
    )


def _best_fit(coverage: np.ndarray) -> tuple[int, float, Point, float]:
    """Of `SHAPES` which overlaps [h, w] best, how much, and where: middle (x, y) and radius in pixels."""
    templates = _templates()
    mass = float(coverage.sum())
    y, x = (np.arange(length) + 0.5 for length in coverage.shape)
    centroid = np.array([(coverage.sum(0) @ x) / mass, (coverage.sum(1) @ y) / mass])
    radii = np.sqrt(mass / templates.areas)  # [9]
    middles = centroid - radii[:, None] * templates.centroids  # [9, 2]
    steps = _steps()
    xs = middles[:, 0, None, None] + radii[:, None, None] * steps - 0.5  # [9, 1, CELLS]
    ys = middles[:, 1, None, None] + radii[:, None, None] * steps[:, None] - 0.5  # [9, CELLS, 1]
    laid = ndimage.map_coordinates(coverage, np.broadcast_arrays(ys, xs), order=1)  # [9, CELLS, CELLS]
    common = np.minimum(laid[:, None], templates.masks).sum((2, 3)) * (steps[1] - steps[0]) ** 2  # [9, BLURS]
    overlaps = (common / (2 * templates.areas[:, None] - common)).max(1)
    best = int(overlaps.argmax())
    return best, float(overlaps[best]), (float(middles[best, 0]), float(middles[best, 1])), float(radii[best])


@dataclass(frozen=True)
class Templates:
    """The nine shapes of radius 1 round the origin."""

    masks: np.ndarray
    """[9, BLURS, CELLS, CELLS] in [0, 1]."""
    areas: np.ndarray
    """[9]"""
    edges: np.ndarray
    """[9] lengths, of a hole's edge too."""
    centroids: np.ndarray
    """[9, 2]: x, y."""


@cache
def _templates() -> Templates:
    steps = _steps()
    cell = steps[1] - steps[0]
    masks = np.array([_drawn(shape) for shape in SHAPES])
    areas = masks.sum((1, 2)) * cell**2
    centroids = [((m.sum(0) @ steps) / m.sum(), (m.sum(1) @ steps) / m.sum()) for m in masks]
    blurred = [[ndimage.gaussian_filter(mask, blur / cell) for blur in BLURS] for mask in masks]
    edges = [sum(_length(outline) for outline, _ in OUTLINES[shape]()) for shape in SHAPES]
    return Templates(np.array(blurred, np.float32), areas, np.array(edges), np.array(centroids))


def _length(outline: Sequence[Point]) -> float:
    return sum(math.dist(a, b) for a, b in zip(outline, [*outline[1:], outline[0]], strict=True))


@cache
def _steps() -> np.ndarray:
    """The middles of the cells along a side, in radii. [CELLS]."""
    return (np.arange(CELLS) + 0.5) * (2 * FRAME / CELLS) - FRAME


def _drawn(shape: str, samples: int = 8) -> np.ndarray:
    side = CELLS * samples
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for outline, ink in OUTLINES[shape]():
        pen.polygon(
            [((x + FRAME) / (2 * FRAME) * side, (y + FRAME) / (2 * FRAME) * side) for x, y in outline], fill=ink
        )
    return np.asarray(mask.reduce(samples), np.float64) / 255
