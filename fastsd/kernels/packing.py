"""Weights in the order a kernel reads them, kept beside the checkpoint-shaped ones and refilled in place when those change."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Packed(NamedTuple):
    buffer: Tensor
    versions: tuple[tuple[int, int], ...]


class PackedWeights:
    """The packed copy of each live weight, or of each group of weights; it goes when the first of them goes. Threads share it.

    A changed weight refills the same buffer, so that a captured graph that reads it sees the change.
    """

    def __init__(self, pack: Callable[..., Tensor]) -> None:
        self.pack = pack
        self._packed = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def get(self, *weights: Tensor) -> Tensor:
        """pack(*weights). ValueError for a weight made in inference mode: it does not count its changes."""
        if any(weight.is_inference() for weight in weights):
            raise ValueError("a weight made in inference mode cannot be packed: its changes would go unseen")
        versions = tuple((0 if w.device.type == "meta" else w.data_ptr(), w._version) for w in weights)
        with self._lock:
            packed: _Packed | None = self._packed.get(weights[0])
            if packed is None or packed.versions != versions:
                fresh = self.pack(*(weight.detach() for weight in weights))
                refills = packed is not None and packed.buffer.shape == fresh.shape
                packed = _Packed(packed.buffer.copy_(fresh) if packed and refills else fresh, versions)
                self._packed[weights[0]] = packed
            return packed.buffer
