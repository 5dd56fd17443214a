"""What a model is trained on: a `Dataset` of pictures and captions, and the batches of each step.

Every random choice about an item (which it is, its crop, its caption) follows from (seed, step, place in the batch). So a run
that was interrupted goes on as if it had not been, and neither the number of processes nor of loader workers changes the data.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

Batch = Mapping[str, Any]
"""Tensors [B, …] and lists of B."""
Key = tuple[int, int, int]
"""(step, place in the whole batch, index in the data set)."""


@dataclass(frozen=True)
class Caption:
    """A sentence and, if the data set knows them, the claims it makes: slot → value."""

    text: str
    stated: Mapping[str, str]


class Dataset(Protocol):
    """Pictures with captions. One picture may have many captions: rng chooses.

    A data set whose captions say what they state has a dict `slots` as well: what may be stated → the values. One that can say
    less has a method `brief_caption`, like `caption`. One that may change while its length stays has a method `fingerprint`, a
    string that changes with any of its pictures and captions: a run must not go on with others.
    """

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8, the same at each call."""

    def caption(self, index: int, rng: np.random.Generator) -> Caption: ...


def fingerprint(dataset: Dataset) -> str:
    """The data set's own, or a hash of four of its pictures."""
    own = getattr(dataset, "fingerprint", None)
    if own is not None:
        return str(own())
    hashed = hashlib.sha256()
    for index in sorted({place * (len(dataset) - 1) // 3 for place in range(4)}):
        hashed.update(np.ascontiguousarray(dataset.image(index)).tobytes())
    return hashed.hexdigest()[:16]


class Source(Protocol):
    """How an item of a batch is made: what the trained net needs of a picture, a caption or both."""

    def __len__(self) -> int: ...

    def item(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Share:
    """The part of each batch that this process works on: places `first` to `last` of `batch_size`."""

    batch_size: int
    first: int
    last: int

    @staticmethod
    def of(batch_size: int, rank: int, processes: int) -> "Share":
        each = batch_size // processes
        return Share(batch_size, rank * each, (rank + 1) * each)


def batches(source: Source, share: Share, seed: int, start: int, stop: int, workers: int = 0) -> Iterator[Batch]:
    """The batches of steps start…stop−1. workers: processes that prepare them in advance; 0: none."""
    loader: DataLoader[Batch] = DataLoader(
        _Items(source, seed),  # type: ignore[arg-type]  # a map from keys, which DataLoader allows
        batch_sampler=_Keys(len(source), share, seed, start, stop),
        num_workers=workers,
        collate_fn=_collate,
        persistent_workers=workers > 0,
    )
    return iter(loader)


class _Keys(Sampler[list[Key]]):
    """Each epoch in an order of its own."""

    def __init__(self, size: int, share: Share, seed: int, start: int, stop: int) -> None:
        self.size, self.share, self.seed, self.start, self.stop = size, share, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.stop):
            keys: list[Key] = []
            for place in range(self.share.first, self.share.last):
                position = step * self.share.batch_size + place
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
                keys.append((step, place, int(order[position % self.size])))
            yield keys


@dataclass(frozen=True)
class _Items:
    source: Source
    seed: int

    def __getitem__(self, key: Key) -> Mapping[str, Any]:
        step, place, index = key
        return self.source.item(index, np.random.default_rng((self.seed, step, place)))


def _collate(items: list[Mapping[str, Any]]) -> Batch:
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {name: torch.stack(c) if isinstance(c[0], Tensor) else c for name, c in columns.items()}


class Draws:
    """Random numbers of one step, drawn for the whole batch and given for this process's share of it."""

    def __init__(self, seed: int, step: int, share: Share, device: torch.device) -> None:
        state = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
        self._generator = torch.Generator().manual_seed(state % 2**63)  # on the CPU: the same on every device
        self._share, self._device = share, device

    def normal(self, *shape: int) -> Tensor:
        """Unit Gaussian [b, *shape], b the size of the share."""
        return self._mine(torch.randn(self._share.batch_size, *shape, generator=self._generator))

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1). [b, *shape]."""
        return self._mine(torch.rand(self._share.batch_size, *shape, generator=self._generator))

    def spread(self, weights: Tensor) -> Tensor:
        """[b] indices, each as probable as its weight [n] says, but spread evenly over the whole batch: less chance in a step."""
        size = self._share.batch_size
        places = (torch.arange(size) + torch.rand(size, generator=self._generator, dtype=torch.float64)) / size
        reached = weights.double().cpu().cumsum(0)
        return self._mine(torch.searchsorted(reached / reached[-1], places, right=True).clamp(max=len(weights) - 1))

    def _mine(self, drawn: Tensor) -> Tensor:
        return drawn[self._share.first : self._share.last].to(self._device)
