"""The same run twice gives the same weights: PyTorch adds in a fixed order, wherever it knows how to.

On GPUs, left alone, it does not: gradients of attention, convolutions and embeddings are added by atomics, in the order in
which blocks happen to end (docs.pytorch.org, "Reproducibility").
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

logger = logging.getLogger("fastsd")

P = ParamSpec("P")
R = TypeVar("R")


def fix_cublas() -> None:
    """Have cuBLAS keep to buffers of its own for each stream; it looks only once, so call it before anything is multiplied."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Repeatable:
    """Calls functions such that they give the same bits each time.

    If an operation in them has no algorithm for that, it says so once, and calls that function again with those that there are:
    it must bear being called again.
    """

    def __init__(self) -> None:
        self.wholly = True

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self.wholly:
            try:
                with _deterministic(warn_only=False):
                    return function(*args, **kwargs)
            except RuntimeError as error:
                if "torch.use_deterministic_algorithms" not in str(error):
                    raise
                self.wholly = False
                logger.warning("training: another run may give slightly other weights, because of PyTorch: %s", error)
        with _deterministic(warn_only=True):
            return function(*args, **kwargs)


@contextmanager
def _deterministic(warn_only: bool) -> Iterator[None]:
    """Within it, PyTorch's deterministic algorithms; warn_only: those of attention's gradient are then left out."""
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    memory.fill_uninitialized_memory = False  # costs time, and nothing here reads what it has not written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
