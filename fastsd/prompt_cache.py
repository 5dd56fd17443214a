"""The text encoder's latest answers, so that what does not change from call to call is not encoded again."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SIZE = 64
"""Chunks kept: 20 MB of SD 2's in fp32."""


class ContextCache:
    """Contexts by their token ids, the least recently used forgotten first; threads may share it.

    Each chunk is encoded alone. So its context is the same, to the last bit, whether it is kept here or not and whatever it is
    asked for together with. All are forgotten once a weight of the net has changed.
    """

    def __init__(self, net: nn.Module, encode: Callable[[Tensor, int], Tensor]) -> None:
        """encode: token ids [1, L] and clip_skip → context [1, L, C], by this net."""
        self._net = net
        self._encode = encode
        self._weights: list[tuple[StorageWeakRef, int, int]] = []
        self._contexts: OrderedDict[tuple[tuple[int, ...], int], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, chunks: Sequence[tuple[int, ...]], clip_skip: int) -> list[Tensor]:
        """Chunks' token ids, L each → their contexts [L, C]; not to be written to."""
        weights = _state(self._net)
        with self._lock:
            if weights != self._weights:
                self._contexts.clear()
                self._weights = weights
            weights = self._weights  # by which `_one` knows whether they have changed since
        return [self._one(ids, clip_skip, weights) for ids in chunks]

    def clear(self) -> None:
        """Forget all: the next call encodes again."""
        with self._lock:
            self._contexts.clear()

    def _one(self, ids: tuple[int, ...], clip_skip: int, weights: list[tuple[StorageWeakRef, int, int]]) -> Tensor:
        key = (ids, clip_skip)
        with self._lock:
            if weights is self._weights and key in self._contexts:
                self._contexts.move_to_end(key)
                return self._contexts[key]
        context = self._encode(torch.tensor([ids]), clip_skip)[0]
        with self._lock:
            if weights is self._weights:
                self._contexts[key] = context
                while len(self._contexts) > SIZE:
                    self._contexts.popitem(last=False)
        return context


def _state(net: nn.Module) -> list[tuple[StorageWeakRef, int, int]]:
    """Another list once a weight was changed in place, or replaced, were it at the same address: a weak reference keeps a
    storage's identity from being given away, not its memory."""
    return [(StorageWeakRef(w.untyped_storage()), w.data_ptr(), w._version) for w in net.parameters()]
