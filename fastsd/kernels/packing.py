"""Weights in the order a kernel reads them, kept beside the checkpoint-shaped ones and refilled in place when those change."""

import threading
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary


class _Packed(NamedTuple):
    buffer: Tensor
    versions: tuple[tuple[int, int], ...]
    weights: tuple[TensorWeakRef, ...]


class PackedWeights:
    """The packed copy of each live weight, or of each group of weights; it goes when the first of them goes. Threads share it.

    A changed weight refills the same buffer, so that a captured graph that reads it sees the change.
    """

    def __init__(self, pack: Callable[..., Tensor]) -> None:
        self.pack = pack
        self._packed = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        _everyone.add(self)

    def get(self, *weights: Tensor) -> Tensor:
        """pack(*weights). ValueError for a weight made in inference mode: it does not count its changes."""
        if any(weight.is_inference() for weight in weights):
            raise ValueError("a weight made in inference mode cannot be packed: its changes would go unseen")
        with self._lock:
            return self._get(weights)

    def refresh(self) -> None:
        """Refill what has changed: for graphs that read the buffers without asking for them."""
        with self._lock:
            for packed in list(self._packed.values()):
                weights = tuple(reference() for reference in packed.weights)
                if all(weight is not None for weight in weights):
                    self._get(weights)

    def _get(self, weights: tuple[Tensor, ...]) -> Tensor:
        versions = tuple((0 if w.device.type == "meta" else w.data_ptr(), w._version) for w in weights)
        packed: _Packed | None = self._packed.get(weights[0])
        if packed is None or packed.versions != versions:
            with torch.inference_mode(False):  # a buffer that can be refilled outside of one, too
                buffer = self.pack(*(weight.detach() for weight in weights))
            if packed is not None and packed.buffer.shape == buffer.shape:
                if (
                    packed.buffer.data_ptr() != buffer.data_ptr()
                ):  # else the weight lies as it is wanted, and is its own copy
                    packed.buffer.copy_(buffer)
                buffer = packed.buffer
            self._packed[weights[0]] = packed = _Packed(buffer, versions, tuple(map(TensorWeakRef, weights)))
        return packed.buffer


def refresh_all() -> None:
    """`refresh` for everything that is packed anywhere."""
    for packed in list(_everyone):
        packed.refresh()


_everyone: "WeakSet[PackedWeights]" = WeakSet()
