"""Noise that is the increments of one Brownian path: what k-diffusion, diffusers and the web UI give the SDE samplers.

As in torchsde's BrownianTree (Li et al. 2020, "Scalable Gradients for Stochastic Differential Equations", algorithm 3), a path is
halved again and again until the ends of a step are met, each half drawn from a seed of its own: so it is the same whatever is
asked of it, and in which order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastsd.errors import ParameterError
from fastsd.noise import NoiseSource, randn, seeded
from fastsd.sampling import NoiseSchedule, Table

STEP_NOISES = ("independent", "brownian")
Draw = Callable[[int], Tensor]  # a seed → unit Gaussian noise, fp32, always of one shape

DIGITS = 6
"""Levels are rounded to so many decimals: the halving ends after log₂(σ · 10⁶) times. Of σ = 14.6 that is 24, of zero terminal
SNR's 4096 it is 32, of 10⁴, the highest that a caller may choose, 34."""
POOL = 24  # words of entropy that the seeds of a tree are mixed of
KEPT = 3 * 34  # noises that are not drawn again: the ways to both ends of a step, and to the end of the next


class BrownianNoise(NoiseSource):
    """The noise of the steps of one walk, drawn step after step: each image's from a path of its own, by its seed alone."""

    def __init__(self, seeds: Sequence[int], rng: str, table: Table, schedule: NoiseSchedule) -> None:
        """table: of the steps that are taken. rng: one of `noise.RNGS`. ParameterError for steps that are too short."""
        super().__init__([], len(seeds))
        self.seeds, self.rng = list(seeds), rng
        spans = table.noise_spans(schedule).tolist()
        self.spans = [span for step, span in enumerate(spans) if table.needs_noise(step)]
        self.paths: list[BrownianPath] = []
        self.drawn = 0
        for sigma, sigma_next in self.spans:
            if round(_single(sigma), DIGITS) == round(_single(sigma_next), DIGITS):
                raise ParameterError(f"step_noise: brownian takes no step as short as σ {sigma:g} to {sigma_next:g}")

    def draw(self, height: int, width: int, channels: int, device: torch.device, shared: int | None = None) -> Tensor:
        """The noise of the next step that adds some, fp32 [B, H, W, C], unit Gaussian."""

        def noise(seed: int) -> Tensor:
            return randn((channels, height, width), seeded(seed, self.rng))

        if not self.paths:
            low, high = self.spans[-1][1], self.spans[0][0]
            self.paths = [BrownianPath(seed, low, high, noise) for seed in self.seeds or ()]
        sigma, sigma_next = self.spans[self.drawn]
        self.drawn += 1
        drawn = torch.stack([path.unit_noise(sigma, sigma_next) for path in self.paths])
        return drawn.permute(0, 2, 3, 1).contiguous().to(device)


class BrownianPath:
    """W(σ) over the levels [low, high] of a walk, from its seed alone; the same bits as torchsde's with that `entropy`."""

    def __init__(self, seed: int, low: float, high: float, draw: Draw) -> None:
        """draw: what makes noise of the seeds, 32 bits each, that the path derives from its own."""
        low, high = _single(low), _single(high)
        self.low, self.high = round(low, DIGITS), round(high, DIGITS)
        whole = np.random.SeedSequence(seed, pool_size=POOL).generate_state(3)[0]
        self.whole = draw(int(whole)) * math.sqrt(high - low)

        def noise(place: int, depth: int) -> Tensor:
            sequence = np.random.SeedSequence(seed, spawn_key=(place, depth), pool_size=POOL)
            return draw(int(sequence.generate_state(4)[0]))

        self._noise = lru_cache(KEPT)(noise)

    def unit_noise(self, sigma: float, sigma_next: float) -> Tensor:
        """What the path adds from one level down to the next, by its standard deviation: unit Gaussian noise."""
        start, end = _single(sigma_next), _single(sigma)
        # torch's root, as k-diffusion takes it: math.sqrt's has other bits
        scale = torch.tensor(end - start, dtype=torch.float32, device="cpu").sqrt()
        low, high = (min(max(round(level, DIGITS), self.low), self.high) for level in (start, end))
        increment, *others = self._increments(low, high, self.low, self.high, 0, 0, self.whole)
        for other in others:
            increment = increment + other
        return -increment / scale

    def _increments(
        self, low: float, high: float, start: float, end: float, place: int, depth: int, whole: Tensor
    ) -> Iterator[Tensor]:
        """Of the largest pieces that make up [low, high], upwards. [start, end] is the piece that is looked into, the
        place-th of its depth, and `whole` its increment."""
        if (low, high) == (start, end):
            yield whole
            return
        middle = round((start + end) / 2, DIGITS)
        share = 1 / (end - start)
        spread = math.sqrt((middle - start) * (end - middle) * share)
        left = (middle - start) * whole * share + spread * self._noise(place, depth)
        if low < middle:
            yield from self._increments(low, min(high, middle), start, middle, 2 * place, depth + 1, left)
        if high > middle:
            yield from self._increments(max(low, middle), high, middle, end, 2 * place + 1, depth + 1, whole - left)


def _single(level: float) -> float:
    """In float32, as k-diffusion has its levels: their rounding decides where a path is halved."""
    return float(np.float32(level))
