"""CUDA graphs: a call is captured once, with the buffers it reads and writes, and replayed by one launch. Knows no model.

`Graphs` keeps the captured calls of one owner. A call that is new runs eagerly, at once; the second time it is captured. What a
graph holds is counted, and the least recently used one goes when the budget is spent. All share one memory pool: their calls
run one after another on one stream, so what one leaves behind another may overwrite, except outputs and buffers.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("fastsd")

T = TypeVar("T")

WARM_UPS = 2
"""Eager calls before a capture: kernels are compiled, weights packed, libraries' workspaces made."""


class API(Protocol):
    """What is asked of CUDA; tests stand in for it."""

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Warm up, capture; what replays it, and the output it writes each time."""

    def held(self) -> int:
        """Bytes of device memory now held, by whomever."""


class CudaGraphs:
    """PyTorch's CUDA graphs on one device, in one pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        with torch.cuda.device(self.device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = function()
            return graph.replay, output

    def held(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_reserved(self.device)


@dataclass
class Captured(Generic[T]):
    """A captured call. Its buffers are filled before, its output is cloned after `replay`."""

    buffers: Any
    """What the call reads and writes, kept alive with it."""
    replay: Callable[[], None]
    output: T
    bytes: int = 0
    """Of device memory, buffers and all; counted by `Graphs`."""
    lock: threading.Lock = field(default_factory=threading.Lock)


def capture(function: Callable[[], T], buffers: Any = None, api: API | None = None) -> Captured[T]:
    """One captured call. function takes no arguments, allocates nothing that it keeps, and is called some times before.

    By default on the current CUDA device.
    """
    api = api or CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    replay, output = api.capture(function)
    return Captured(buffers, replay, output)


class Graphs:
    """The captured calls of one owner, by key; threads may share it.

    budget: bytes that they may hold together. Captures that fail are told once and never tried again.
    """

    def __init__(self, api: API, budget: int) -> None:
        self.api = api
        self.budget = budget
        self.captures = 0
        self._graphs: OrderedDict[Hashable, Captured[Any]] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._lock = threading.Lock()

    @contextmanager
    def lease(self, key: Hashable, make: Callable[[], tuple[Any, Callable[[], T]]]) -> Iterator[Captured[T] | None]:
        """The captured call of a key, for this thread alone; None where the caller shall run eagerly.

        That is the first time a key is seen, while another thread has the graph, and after a failed capture.
        make: the buffers and the call on them, asked for when it is captured.
        """
        captured = self._find(key, make)
        if captured is None or not captured.lock.acquire(blocking=False):
            yield None
            return
        try:
            yield captured
        finally:
            captured.lock.release()

    def call(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), replayed where it has been captured: the inputs copied in, the output cloned."""

        def make() -> tuple[list[Tensor], Callable[[], Tensor]]:
            buffers = [tensor.clone() for tensor in inputs]
            return buffers, lambda: function(*buffers)

        with self.lease(key, make) as captured:
            if captured is None:
                return function(*inputs)
            for buffer, tensor in zip(captured.buffers, inputs, strict=True):
                buffer.copy_(tensor)
            captured.replay()
            return captured.output.clone()

    def _find(self, key: Hashable, make: Callable[[], tuple[Any, Callable[[], T]]]) -> Captured[T] | None:
        with self._lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)
                return self._graphs[key]
            if key in self._failed or key not in self._seen:
                self._seen.add(key)
                return None
            try:
                before = self.api.held()
                buffers, call = make()
                captured = capture(call, buffers, self.api)
                captured.bytes = max(0, self.api.held() - before)
            except (RuntimeError, ValueError) as error:  # CUDA's refusals and out of memory are RuntimeErrors
                self._failed.add(key)
                logger.warning("no CUDA graph for %s, running without: %s", key, str(error).partition("\n")[0])
                return None
            self.captures += 1
            self._graphs[key] = captured
            self._evict()
            return captured

    def _evict(self) -> None:
        """Let the least recently used go until the budget holds; one graph alone may pass it."""
        while len(self._graphs) > 1 and self.held > self.budget:
            key, captured = next(iter(self._graphs.items()))
            del self._graphs[key]
            logger.info("the CUDA graph for %s is let go: %d bytes", key, captured.bytes)

    @property
    def held(self) -> int:
        """Bytes that the graphs hold together."""
        return sum(captured.bytes for captured in self._graphs.values())

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all: where weights no longer lie where the graphs read them."""
        with self._lock:
            self._graphs.clear()
            self._failed.clear()
