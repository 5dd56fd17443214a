"""Sentences for the scenes of shapes.py, in many phrasings, and what each of them says.

A caption may leave out the article, the size, the place, the relation or the background, down to "red circle"; what it leaves
out, it leaves open. `stated` are the claims it makes: a picture fits a caption if it fits these.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fastsd.training.data import Caption
from fastsd.training.shape_scenes import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene, Thing

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
PLACES = {
    "center": ("in the center", "in the middle", "at the center"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "in the upper part", "on the upper side"),
    "bottom": ("at the bottom", "in the lower part", "on the lower side"),
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: ("two", "two", "2"), 3: ("three", "three", "3")}
OPENINGS = ("a picture of ", "a drawing of ", "an image of ", "there is ")
PLURALS = {"cross": "crosses"}
SLOTS: Mapping[str, Sequence[str]] = {
    "count": ("1", "2", "3"),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "relation": tuple(RELATIONS),
    "colour 2": tuple(COLOURS),
    "shape 2": SHAPES,
    "size 2": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}
"""What a caption may state, and the values; "… 2" are of the second thing it names, whose relation is of the first to it."""


def describe(scene: Scene, rng: np.random.Generator, reworded: bool = False) -> Caption:
    """A sentence for the scene. reworded: in an order of its parts that is otherwise never used, the background first."""
    sizes = [thing.size if rng.random() < 0.5 else None for thing in scene.things]
    names_background = reworded or rng.random() < 0.7
    bare = not reworded and rng.random() < 0.25  # "red circle left of blue square": no article
    if scene.relation is not None:
        body, stated = _pair(scene, sizes, scene.relation, bare, rng)
    else:
        body, stated = _single(scene, sizes[0], bare, rng)
    opening = "" if bare or rng.random() < 0.6 else _one(OPENINGS, rng)
    opening = "there are " if opening == "there is " and (scene.count > 1 or len(scene.things) > 1) else opening
    if not names_background:
        return Caption(opening + body, stated)
    stated["background"] = scene.background
    name = "grey" if scene.background == "gray" and rng.random() < 0.3 else scene.background
    if reworded:
        return Caption(f"a {name} background with {body}", stated)
    full = (f" on a {name} background", f" on a {name} background", f" with a {name} background")
    brief = (f" on {name}", f", {name} background")
    ending = _one(brief if bare else full + brief, rng)
    if rng.random() < 0.15:
        return Caption(f"on a {name} background, {opening}{body}", stated)
    return Caption(opening + body + ending, stated)


def barest(scene: Scene, rng: np.random.Generator) -> Caption:
    """ "red circle", "3 blue stars", "red circle and blue star", "red circle above blue star": no article, size or place."""
    if scene.relation is None:
        (thing,) = scene.things
        number = f"{_one(NUMBERS[scene.count], rng)} " if scene.count > 1 else ""
        text = f"{number}{thing.colour} {_noun(thing, scene.count)}"
        return Caption(text, {"count": str(scene.count)} | _stated(thing, None))
    first, second = scene.things
    stated, joint = _stated_pair(first, second, (None, None)), "and"
    if rng.random() < 0.5:
        joint = stated["relation"] = scene.relation
    return Caption(f"{first.colour} {first.shape} {joint} {second.colour} {second.shape}", stated)


def _single(scene: Scene, size: str | None, bare: bool, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """One thing, once or several times, and perhaps its place."""
    (thing,) = scene.things
    stated = {"count": str(scene.count)} | _stated(thing, size)
    body = _phrase(thing, size, scene.count, bare, rng)
    if scene.position is not None and rng.random() < 0.7:
        stated["position"] = scene.position
        body = f"{body} {_one(PLACES[scene.position], rng)}"
    return body, stated


def _pair(
    scene: Scene, sizes: Sequence[str | None], relation: str, bare: bool, rng: np.random.Generator
) -> tuple[str, dict[str, str]]:
    """Two things in either order, with their relation or joined by "and"."""
    order = [0, 1] if rng.random() < 0.5 else [1, 0]
    first, second = (scene.things[i] for i in order)
    sizes = [sizes[i] for i in order]
    relation = relation if order == [0, 1] else OPPOSITE[relation]
    stated = _stated_pair(first, second, sizes)
    joint = "and"
    if rng.random() < 0.85:
        stated["relation"] = relation
        joint = _one(RELATION_WORDS[relation], rng)
    phrases = [_phrase(thing, size, 1, bare, rng) for thing, size in zip((first, second), sizes, strict=True)]
    return f"{phrases[0]} {joint} {phrases[1]}", stated


def _stated(thing: Thing, size: str | None) -> dict[str, str]:
    return {"colour": thing.colour, "shape": thing.shape} | ({} if size is None else {"size": size})


def _stated_pair(first: Thing, second: Thing, sizes: Sequence[str | None]) -> dict[str, str]:
    return _stated(first, sizes[0]) | {f"{slot} 2": value for slot, value in _stated(second, sizes[1]).items()}


def _noun(thing: Thing, count: int) -> str:
    return thing.shape if count == 1 else PLURALS.get(thing.shape, thing.shape + "s")


def _phrase(thing: Thing, size: str | None, count: int, bare: bool, rng: np.random.Generator) -> str:
    words = ([] if size is None else [_one(SIZE_WORDS[size], rng)]) + [thing.colour, _noun(thing, count)]
    if count > 1:
        words.insert(0, _one(NUMBERS[count], rng))
    elif rng.random() < 0.05:
        words.insert(0, "one")
    elif not bare:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def _one(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
