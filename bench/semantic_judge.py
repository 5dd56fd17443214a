"""Whether a picture means what its prompt says, how often it does, and whether that is enough. No model is needed here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

from bench.semantic_prompts import SUITES, Prompt
from bench.shape_reader import Found, Reading
from fastsd.training.shape_scenes import POSITIONS

ATTRIBUTES = ("colour", "shape", "size", "position", "relation", "background", "count")
THING = ("colour", "shape", "size")
ALL = "all"
CLEARLY = 0.1
"""Of the picture's side: so far apart the middles of two objects must be for one to be left of or above the other."""
GATE = dict.fromkeys(ATTRIBUTES, 0.97) | {ALL: 0.95}
"""What `--gate` asks."""


@dataclass(frozen=True)
class Verdict:
    """One picture."""

    prompt: Prompt
    reading: Reading
    right: Mapping[str, bool]
    """Attribute → whether it is as stated; and "all"."""


@dataclass(frozen=True)
class Score:
    """How many of how many are right, and Wilson's interval for the share."""

    right: int
    number: int
    accuracy: float
    low: float
    high: float

    @staticmethod
    def of(rights: Iterable[bool]) -> "Score":
        given = list(rights)
        return Score(sum(given), len(given), sum(given) / len(given), *wilson(sum(given), len(given)))


def judge(reading: Reading, stated: Mapping[str, str]) -> dict[str, bool]:
    """Each attribute that the caption states, and "all". The count is always judged: 2 of a pair, else 1 unless stated.

    The things described are matched to the objects found such that most of what is stated is right; of a group, every object
    must be as described. Where an object is missing, what is stated of it is wrong.
    """
    pair = "colour 2" in stated or "shape 2" in stated
    count = 2 if pair else int(stated.get("count", "1"))
    things = [_thing(stated, ""), _thing(stated, " 2")] if pair else [_thing(stated, "")]
    if count > 1 and not pair:
        matched: Sequence[Found | None] = reading.objects or [None]
        things *= len(matched)
    else:
        matched = _assigned(reading.objects, things, stated.get("relation"))
    right = {}
    for attribute in THING:
        asked = [(one, thing[attribute]) for one, thing in zip(matched, things, strict=True) if attribute in thing]
        if asked:
            right[attribute] = all(one is not None and getattr(one, attribute) == value for one, value in asked)
    if "position" in stated:
        right["position"] = matched[0] is not None and nearest_position(matched[0]) == stated["position"]
    if "relation" in stated:
        right["relation"] = holds(stated["relation"], *matched)
    if "background" in stated:
        right["background"] = reading.background == stated["background"]
    right["count"] = len(reading.objects) == count
    return right | {ALL: all(right.values())}


def _thing(stated: Mapping[str, str], suffix: str) -> dict[str, str]:
    return {attribute: stated[attribute + suffix] for attribute in THING if attribute + suffix in stated}


def _assigned(
    objects: Sequence[Found], things: Sequence[Mapping[str, str]], relation: str | None
) -> tuple[Found | None, ...]:
    """One object for each thing, None where there are too few: that which makes most true; the first of equals."""
    pool = [*objects, *[None] * (len(things) - len(objects))]

    def truths(chosen: tuple[Found | None, ...]) -> int:
        fitting = sum(
            one is not None and getattr(one, attribute) == value
            for one, thing in zip(chosen, things, strict=True)
            for attribute, value in thing.items()
        )
        return fitting + (relation is not None and holds(relation, *chosen))

    return max(permutations(pool, len(things)), key=truths)


def nearest_position(one: Found) -> str:
    return min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], one.middle))


def holds(relation: str, first: Found | None = None, second: Found | None = None) -> bool:
    """Whether the first is clearly left of, right of, above or below the second: that way more than across."""
    if first is None or second is None:
        return False
    dx, dy = (b - a for a, b in zip(first.middle, second.middle, strict=True))
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > max(CLEARLY, abs(across))


def wilson(right: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), at 95% by default."""
    share, spread = right / number, z * z / number
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(verdicts: Sequence[Verdict]) -> dict[str, dict[str, dict[str, Any]]]:
    """ "attributes": attribute, and "all" → its score; "suites": suite → the score of "all". What was never stated is absent."""
    attributes = {
        name: [verdict.right[name] for verdict in verdicts if name in verdict.right] for name in (*ATTRIBUTES, ALL)
    }
    suites = {name: [v.right[ALL] for v in verdicts if v.prompt.suite == name] for name in SUITES}
    groups = {"attributes": attributes, "suites": suites}
    return {
        key: {k: asdict(Score.of(rights)) for k, rights in group.items() if rights} for key, group in groups.items()
    }


def failures(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Prompt, seed, what is wrong and what was read, of each picture that is not all right."""
    return [
        {
            "prompt": verdict.prompt.text,
            "suite": verdict.prompt.suite,
            "seed": verdict.prompt.seed,
            "wrong": [name for name, right in verdict.right.items() if not right and name != ALL],
            "read": str(verdict.reading),
            "edge_errors": [round(one.edge_error, 4) for one in verdict.reading.objects],
        }
        for verdict in verdicts
        if not verdict.right[ALL]
    ]


def below_gate(attributes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What `--gate` finds missing, a line each. attributes: as `tally` gives them."""
    return [
        f"{name} is right in {score['accuracy']:.1%}, not {GATE[name]:.0%}"
        for name, score in attributes.items()
        if score["accuracy"] < GATE[name]
    ]


def lost(now: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]], allowed: float) -> list[str]:
    """What became worse by more than `allowed` points (hundredths), a line each. now, before: as `tally` gives attributes."""
    lines = []
    for name, score in before.items():
        points = 100 * (score["accuracy"] - (now[name]["accuracy"] if name in now else 0.0))
        if points > allowed + 1e-9:
            lines.append(f"{name} lost {points:.1f} points, from {score['accuracy']:.1%}; {allowed:g} are allowed")
    return lines
