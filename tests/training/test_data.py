"""Batches: every item once an epoch, each made from (seed, step, place) alone, and the same whoever works on which share."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.training.data import Draws, Share, batches
from tests.training.builders import CPU, Numbers, differing


def indices(size: int, batch_size: int, start: int, stop: int, seed: int = 0) -> list[list[int]]:
    share = Share(batch_size, 0, batch_size)
    return [list(batch["index"]) for batch in batches(Numbers(size), share, seed, start, stop)]


@pytest.mark.parametrize(
    ("size", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 2)]
)  # whole, broken, several in a batch
def test_each_epoch_visits_every_item_once(size: int, batch_size: int) -> None:
    steps = 5 * size
    seen = list(chain(*indices(size, batch_size, 0, steps)))
    epochs = [tuple(seen[i : i + size]) for i in range(0, steps * batch_size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs), f"an epoch misses items: {epochs}"
    if size > 3:
        assert len(set(epochs)) == len(epochs), "two epochs have the same order"
        assert epochs[0] != tuple(range(size)), "the order is that of the data"


def test_the_seed_decides_the_order() -> None:
    assert indices(10, 4, 0, 5, seed=1) != indices(10, 4, 0, 5, seed=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_s_batch_does_not_depend_on_where_the_run_began(workers: int) -> None:
    """The toy's items hold random numbers, so that equal ones had equal generators."""
    share = Share(4, 0, 4)
    whole = list(batches(Numbers(), share, 7, 0, 9))
    later = list(batches(Numbers(), share, 7, 5, 9, workers))
    assert len(later) == 4
    assert not differing([dict(batch) for batch in later], [dict(batch) for batch in whole[5:]])


def test_every_item_has_random_numbers_of_its_own() -> None:
    """Also the same picture in the next epoch: other crops, other captions."""
    share = Share(4, 0, 4)
    drawn = torch.cat([batch["x"][:, 3:] for batch in batches(Numbers(3), share, 0, 0, 12)])
    assert len(torch.unique(drawn, dim=0)) == len(drawn) == 48


def test_random_numbers_depend_on_the_seed() -> None:
    share = Share(4, 0, 4)
    first, second = (next(batches(Numbers(1), share, seed, 0, 1))["x"] for seed in (0, 1))
    assert torch.equal(first[:, :3], second[:, :3]), "what depends on the index alone"
    assert not (first[:, 3:] == second[:, 3:]).any()


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_shares_of_a_batch_are_the_whole(processes: int) -> None:
    shares = [Share.of(6, rank, processes) for rank in range(processes)]
    whole = list(batches(Numbers(), Share.of(6, 0, 1), 0, 0, 5))
    parts = [list(batches(Numbers(), share, 0, 0, 5)) for share in shares]
    for step, batch in enumerate(whole):
        x = torch.cat([part[step]["x"] for part in parts])
        assert torch.equal(x, batch["x"]), f"step {step}: the shares are not the batch"
        assert list(chain(*(part[step]["index"] for part in parts))) == batch["index"]


def drawn(share: Share, seed: int = 0, step: int = 0) -> list[torch.Tensor]:
    draws = Draws(seed, step, share, CPU)
    return [draws.normal(2, 3), draws.spread(torch.ones(100)), draws.uniform(), draws.normal()]


def test_shares_of_draws_are_the_whole() -> None:
    whole = drawn(Share(6, 0, 6))
    parts = [drawn(Share.of(6, rank, 3)) for rank in range(3)]
    joined = [torch.cat(found) for found in zip(*parts, strict=True)]
    assert [tuple(t.shape) for t in whole] == [(6, 2, 3), (6,), (6,), (6,)]
    assert not differing(joined, whole)


def test_draws_depend_on_seed_and_step_alone() -> None:
    share = Share(8, 0, 8)
    first = drawn(share, 3, 5)
    torch.manual_seed(99)  # the global generator is nobody's
    assert not differing(drawn(share, 3, 5), first)
    others = [drawn(share, 3, 6), drawn(share, 4, 5), drawn(share, 5, 3)]
    assert all(not torch.equal(other[0], first[0]) for other in others)


def test_draws_have_their_distributions() -> None:
    """Of 40,000: a share is within 4 standard errors of its chance, mean and deviation within 0.02."""
    draws = Draws(0, 0, Share(40_000, 0, 40_000), CPU)
    normal, uniform = draws.normal(), draws.uniform()
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01


def test_spread_draws_are_even_and_as_probable_as_their_weights() -> None:
    """Of each batch every tenth of the chance has its share; over many batches each index comes as often as its weight says."""
    counts: Counter[int] = Counter()
    for step in range(2000):
        drawn = Draws(0, step, Share(20, 0, 20), CPU).spread(torch.ones(10)).tolist()
        assert Counter(drawn) == dict.fromkeys(range(10), 2), f"step {step}: {drawn}"
        counts.update(Draws(0, step, Share(3, 0, 3), CPU).spread(torch.tensor([1.0, 0.0, 2.0, 5.0])).tolist())
    assert {i: n / 6000 for i, n in counts.items()} == pytest.approx({0: 1 / 8, 2: 1 / 4, 3: 5 / 8}, abs=0.015)


class Words:
    """Items of tensors and strings."""

    def __len__(self) -> int:
        return 2

    def item(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"word": "ab"[index], "place": torch.tensor(index)}


def test_tensors_are_stacked_and_the_rest_is_listed() -> None:
    batch = next(batches(Words(), Share(2, 0, 2), 0, 0, 1))
    assert sorted(zip(batch["word"], batch["place"].tolist(), strict=True)) == [("a", 0), ("b", 1)]
    assert batch["place"].shape == (2,)
