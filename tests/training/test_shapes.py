"""The drawings: every picture again the same, held-out pairs kept apart, and captions that say what is to be seen."""

import re
from collections import Counter

import numpy as np
import pytest

from fastsd.training.shape_captions import SLOTS, describe
from fastsd.training.shape_scenes import BACKGROUNDS, COLOURS, HELD_OUT, RELATIONS, SHAPES, Scene, Thing, draw
from fastsd.training.shapes import Shapes, Split

COUNT = 2000


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.shape, thing.colour) for thing in scene.things}


@pytest.fixture(scope="module", params=["train", "held_out"])
def scenes(request: pytest.FixtureRequest) -> tuple[Split, list[Scene]]:
    data = Shapes(COUNT, split=request.param)
    return request.param, [data.scene(index) for index in range(COUNT)]


def test_training_never_shows_a_held_out_pair(scenes: tuple[Split, list[Scene]]) -> None:
    split, found = scenes
    assert {scene for scene in found if pairs(scene) & HELD_OUT} == (set() if split == "train" else set(found))
    shown = Counter(pair for scene in found for pair in pairs(scene))
    wanted = {(shape, colour) for shape in SHAPES for colour in COLOURS}
    assert set(shown) >= (wanted - HELD_OUT if split == "train" else HELD_OUT), "some pairs are never shown"


def test_every_shape_and_colour_is_held_out_and_shown() -> None:
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)
    assert len(HELD_OUT) == len(SHAPES)


def test_scenes_come_at_their_rates(scenes: tuple[Split, list[Scene]]) -> None:
    """Within 4 standard errors of 45%, 30% and 25%."""
    kinds = Counter("pair" if s.relation else "group" if s.count > 1 else "one" for s in scenes[1])
    assert {kind: n / COUNT for kind, n in kinds.items()} == pytest.approx(
        {"one": 0.45, "pair": 0.3, "group": 0.25}, abs=0.045
    )


def test_a_picture_is_always_the_same() -> None:
    data, again, other = Shapes(5, 32), Shapes(9, 32), Shapes(5, 32, seed=1)
    assert np.array_equal(data.image(3), again.image(3)), "it depends on how many there are"
    assert not np.array_equal(data.image(3), other.image(3))
    assert not np.array_equal(data.image(3), data.image(4))
    assert data.scene(3) == again.scene(3)


def test_a_picture_shows_its_scene() -> None:
    """By its pixels, whose colours are jittered by up to 5: some are of each colour of the scene, and none of another.

    Edges are mixtures, which may come near a third colour, but at a few pixels only.
    """
    data = Shapes(60, 64)
    palette = {name: colour for colours in (COLOURS, BACKGROUNDS) for name, colour in colours.items()}
    for index in range(60):
        scene, picture = data.scene(index), data.image(index).astype(int)
        counts = {name: int((abs(picture - colour).max(-1) <= 5).sum()) for name, colour in palette.items()}
        seen = {name for name, count in counts.items() if count >= 12}
        assert seen == {scene.background, *(thing.colour for thing in scene.things)}, f"picture {index}: {scene}"


def said(text: str) -> dict[str, str]:
    """A reading of a caption by its words alone, which knows nothing of how it was written."""
    found: dict[str, str] = {}
    background = re.search(r"(\w+) background|on (white|black|gr[ae]y|cyan)$", text)
    if background:
        found["background"] = (background[1] or background[2]).replace("grey", "gray")
    names = {plural: shape for shape in SHAPES for plural in (shape, f"{shape}s", f"{shape}es")}
    sizes = dict.fromkeys(("small", "little", "tiny"), "small") | dict.fromkeys(("large", "big"), "large")
    things = re.findall(
        rf"(?:({'|'.join(sizes)}) )?({'|'.join(COLOURS)}) ({'|'.join(sorted(names, reverse=True))})\b", text
    )
    for (size, colour, shape), ending in zip(things, ("", " 2"), strict=False):
        found |= {f"colour{ending}": colour, f"shape{ending}": names[shape]} | (
            {f"size{ending}": sizes[size]} if size else {}
        )
    if len(things) == 1:
        several = re.search(r"\b(two|three|2|3)\b", text)
        found["count"] = {"two": "2", "three": "3"}.get(several[1], several[1]) if several else "1"
        place = [("top", r"top|upper"), ("bottom", r"bottom|lower"), ("left", r"left"), ("right", r"right")]
        words = [name for name, pattern in place if re.search(rf"\b({pattern})\b", text)]
        if words or re.search(r"\b(center|middle)\b", text):
            found["position"] = " ".join(words) or "center"
    else:
        relations = {"left of": "left of", "right of": "right of", "above|over|on top of": "above"}
        for pattern, relation in (relations | {"below|under|beneath": "below"}).items():
            if re.search(rf"\b({pattern})\b", text):
                found["relation"] = relation
    return found


@pytest.mark.parametrize("reworded", [False, True])
def test_captions_say_what_they_state(reworded: bool) -> None:
    data = Shapes(COUNT)
    for index in range(COUNT):
        caption = describe(data.scene(index), np.random.default_rng(index), reworded)
        assert said(caption.text) == caption.stated, caption.text


def test_brief_captions_say_no_more_than_they_must() -> None:
    data = Shapes(COUNT)
    for index in range(COUNT):
        caption, scene = data.brief_caption(index, np.random.default_rng(index)), data.scene(index)
        assert said(caption.text) == caption.stated, caption.text
        things = [f" {number}" if number > 1 else "" for number in range(1, len(scene.things) + 1)]
        least = {f"{slot}{ending}" for slot in ("colour", "shape") for ending in things}
        least |= set() if scene.relation else {"count"}
        assert caption.stated.keys() - {"relation"} == least, caption.text
        assert caption.stated.items() <= truth(scene.things, scene.relation, scene).items()


def test_captions_state_what_is_drawn() -> None:
    """Every claim holds of the scene; of two things in either order."""
    data = Shapes(COUNT)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for index in range(COUNT):
        scene = data.scene(index)
        stated = data.caption(index, np.random.default_rng(index)).stated
        truths = [truth(scene.things, scene.relation, scene)]
        if scene.relation:
            truths.append(truth(scene.things[::-1], opposite[scene.relation], scene))
        assert any(stated.items() <= one.items() for one in truths), f"{stated} of {scene}"
        assert set(stated) <= set(SLOTS)
        assert all(value in SLOTS[slot] for slot, value in stated.items())


def truth(things: tuple[Thing, ...], relation: str | None, scene: Scene) -> dict[str, str]:
    found = {"background": scene.background}
    for thing, ending in zip(things, ("", " 2"), strict=False):
        found |= {f"colour{ending}": thing.colour, f"shape{ending}": thing.shape, f"size{ending}": thing.size}
    if relation:
        return found | {"relation": relation}
    return found | {"count": str(scene.count)} | ({"position": scene.position} if scene.position else {})


def test_every_value_is_stated_and_left_out_at_times() -> None:
    data, seen, left_out = Shapes(COUNT), Counter[tuple[str, str]](), Counter[str]()
    for index in range(COUNT):
        stated = data.caption(index, np.random.default_rng(index)).stated
        seen.update(stated.items())
        left_out.update(slot for slot in SLOTS if slot not in stated)
    assert {slot: {value for name, value in seen if name == slot} for slot in SLOTS} == {
        slot: set(values) for slot, values in SLOTS.items()
    }
    assert left_out["size"] > COUNT / 4
    assert left_out["background"] > COUNT / 5


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_first_thing_is_where_the_relation_says(relation: str) -> None:
    scene = Scene((Thing("circle", "red", "large"), Thing("square", "blue", "large")), "white", relation=relation)
    picture = draw(scene, np.random.default_rng(0), 64).astype(int)
    middles = []
    for colour in ("red", "blue"):
        y, x = np.nonzero(abs(picture - COLOURS[colour]).max(-1) <= 5)
        middles.append((x.mean(), y.mean()))
    dx, dy = (round((a - b) / 64, 1) for a, b in zip(*middles, strict=True))
    sides = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    assert (np.sign(round(dx / 2, 1)), np.sign(round(dy / 2, 1))) == sides
