"""Weights in the order a kernel reads them, kept beside the checkpoint-shaped ones and refilled in place when those change."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Packed(NamedTuple):
    buffer: Tensor
    version: tuple[int, int]


class PackedWeights:
    """The packed copy of each live weight; it goes when its weight goes. Threads may share it.

    A changed weight refills the same buffer, so that a captured graph that reads it sees the change.
    """

    def __init__(self, pack: Callable[[Tensor], Tensor]) -> None:
        self.pack = pack
        self._packed = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def get(self, weight: Tensor) -> Tensor:
        """ValueError for a weight made in inference mode: it does not count its changes."""
        if weight.is_inference():
            raise ValueError("a weight made in inference mode cannot be packed: its changes would go unseen")
        version = (0 if weight.device.type == "meta" else weight.data_ptr(), weight._version)
        with self._lock:
            packed: _Packed | None = self._packed.get(weight)
            if packed is None:
                packed = _Packed(self.pack(weight.detach()), version)
            elif packed.version != version:
                packed = _Packed(packed.buffer.copy_(self.pack(weight.detach())), version)
            self._packed[weight] = packed
            return packed.buffer
