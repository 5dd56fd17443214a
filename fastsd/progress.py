"""A bar on stderr for the command line."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """A bar on stderr, moved by the callback that it gives. It appears with the first step: a refusal is one line only."""
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: list[tqdm] = []

        def on_step(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
            if step:
                bars[-1].update()
            else:  # of each pass
                bar = tqdm(total=values["num_steps"], initial=1, disable=quiet, file=sys.stderr, unit="step", ncols=80)
                bars.append(stack.enter_context(bar))

        yield on_step
