"""Who may use the weights, and who may change them: a running request keeps the weights that it began with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastsd.errors import ParameterError


class SwapLock:
    """Any number of threads use the weights at once; a swap waits for them to end, and those that come after wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._swaps = 0
        """Swaps that run or wait."""
        self._swapping = False
        self._mine = threading.local()

    @contextmanager
    def using(self) -> Iterator[None]:
        """The weights stay as they are. May be nested in one thread, as where a callback draws an image of its own."""
        depth = getattr(self._mine, "depth", 0)
        with self._changed:
            # who uses the weights already must not wait for a swap that waits for it
            self._changed.wait_for(lambda: depth > 0 or self._swaps == 0)
            self._users += 1
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Nobody else uses the weights. ParameterError in a thread that uses them itself: it would wait for ever."""
        if getattr(self._mine, "depth", 0):
            raise ParameterError(
                "adapters cannot be changed from within a call that draws (in a callback); change them before or after it"
            )
        with self._changed:
            self._swaps += 1
            try:
                self._changed.wait_for(lambda: self._users == 0 and not self._swapping)
            except BaseException:
                self._swaps -= 1
                self._changed.notify_all()
                raise
            self._swapping = True
        try:
            yield
        finally:
            with self._changed:
                self._swaps -= 1
                self._swapping = False
                self._changed.notify_all()
