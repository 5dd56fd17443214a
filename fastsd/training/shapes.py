"""The procedural data set: drawings of random scenes, with captions in many phrasings."""

import numpy as np

from fastsd.training.data import Caption
from fastsd.training.shape_captions import SLOTS, barest, describe
from fastsd.training.shape_scenes import Scene, Split, draw, random_scene


class Shapes:
    """`size` pictures, each drawn from its own random numbers, so that picture i is the same in every run. A `Dataset`.

    split "train" shows no held-out pair, "held_out" at least one in each picture.
    """

    slots = SLOTS

    def __init__(self, size: int = 100_000, resolution: int = 128, seed: int = 0, split: Split = "train") -> None:
        self.size, self.resolution, self.seed, self.split = size, resolution, seed, split

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8."""
        rng = self._rng(index)
        return draw(random_scene(rng, self.split), rng, self.resolution)

    def caption(self, index: int, rng: np.random.Generator) -> Caption:
        return describe(self.scene(index), rng)

    def brief_caption(self, index: int, rng: np.random.Generator) -> Caption:
        return barest(self.scene(index), rng)

    def scene(self, index: int) -> Scene:
        return random_scene(self._rng(index), self.split)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, ("train", "held_out").index(self.split), index))
