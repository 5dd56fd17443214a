"""What `bench.semantic` asks for: sentences of the training's kind for scenes that the training never showed, in three suites."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastsd.training.shape_captions import barest, describe
from fastsd.training.shape_scenes import Split
from fastsd.training.shapes import Shapes

SUITES = {
    "captions": "as the training's",
    "reworded": "the background first, an order that the training never used",
    "short": "colour and shape, how many, which relation: nothing else",
}
ORDER = ("captions", "reworded", "captions", "short", "captions")
"""60, 20 and 20%; the first prompts of a long list are the short list."""


@dataclass(frozen=True)
class Prompt:
    suite: str
    text: str
    stated: Mapping[str, str]
    """What the text claims: slots of shape_captions.py → values."""
    seed: int
    """Of its picture."""


def make_prompts(count: int, split: Split = "held_out", seed: int = 0) -> list[Prompt]:
    """The same at each call. Picture i has seed + i."""
    scenes = Shapes(split=split, seed=seed)
    prompts = []
    for index in range(count):
        suite, scene = ORDER[index % len(ORDER)], scenes.scene(index)
        rng = np.random.default_rng((seed, index))
        caption = barest(scene, rng) if suite == "short" else describe(scene, rng, reworded=suite == "reworded")
        prompts.append(Prompt(suite, caption.text, caption.stated, seed + index))
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """The same for the same texts with the same seeds: 16 hex digits."""
    lines = "\n".join(f"{prompt.seed} {prompt.text}" for prompt in prompts)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
