"""The sampler kernel against the reference op, row by row of a table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.sampler_step import sampler_step
from fastsd.ops import REFERENCE, StepRow
from tests.kernels.case import DEVICE, Output, draw

LATENTS = {"one value": (1, 1, 1), "odd": (5, 7, 4), "several blocks and a tail": (16, 33, 4)}


@pytest.mark.parametrize("latent", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sampler_step(latent: tuple, slots: int, guided: bool, noisy: bool, dtype: torch.dtype) -> None:
    batch = 3
    state, noise = draw(slots, batch, *latent, seed=0), draw(batch, *latent, seed=1) if noisy else None
    out = draw(batch * (1 + guided), *latent, seed=2, dtype=dtype)
    table, guidance = draw(4, batch, slots, slots + 2, seed=3), draw(batch, seed=4, scale=5.0)
    for step in (0, 3):
        new = Output(slots, batch, *latent, dtype=torch.float32)
        counter = torch.tensor([step], dtype=torch.int32, device=DEVICE)
        sampler_step(state, out, noise, table, guidance, counter, new=new.tensor)
        wide = None if noise is None else noise.double()
        row = StepRow(table[step].double(), guidance.double())
        new.check("sampler_step", REFERENCE.sampler_step(state.double(), out.double(), wide, row))


def test_a_table_shared_by_the_batch() -> None:
    """One sampler for all images: the table is expanded over B, and nothing is copied."""
    state, out = draw(2, 3, 4, 4, 4, seed=0), draw(3, 4, 4, 4, seed=1)
    table = draw(5, 1, 2, 4, seed=2).expand(-1, 3, -1, -1)
    counter = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    guidance = draw(3, seed=3)
    new = Output(2, 3, 4, 4, 4, dtype=torch.float32)
    sampler_step(state, out, None, table, guidance, counter, new=new.tensor)
    new.check("sampler_step", REFERENCE.sampler_step(state.double(), out, None, StepRow(table[4].double(), guidance)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": draw(1, 2, 4, 4, 4, seed=0).half()}, "state"),
        ({"out": draw(3, 4, 4, 4, seed=0)}, "out"),
        ({"noise": draw(2, 4, 4, seed=0)}, "noise"),
        ({"table": draw(5, 2, 1, 4, seed=0)}, "table"),
        ({"guidance": draw(1, seed=0)}, "guidance"),
        ({"step": torch.tensor([1])}, "step"),
    ],
)
def test_what_it_does_not_serve_it_refuses(change: dict, says: str) -> None:
    arguments = {
        "state": draw(1, 2, 4, 4, 4, seed=0),
        "out": draw(2, 4, 4, 4, seed=1),
        "noise": None,
        "table": draw(5, 2, 1, 3, seed=2),
        "guidance": draw(2, seed=3),
        "step": torch.tensor([1], dtype=torch.int32, device=DEVICE),
    }
    with pytest.raises(ValueError, match=says):
        sampler_step(**arguments | change)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    slots=st.integers(1, 5),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    guided=st.booleans(),
    noisy=st.booleans(),
    rows=st.integers(1, 4),
)
def test_any_table(slots: int, batch: int, size: tuple[int, int], guided: bool, noisy: bool, rows: int) -> None:
    state = draw(slots, batch, *size, 4, seed=0)
    out = draw((1 + guided) * batch, *size, 4, seed=1, dtype=torch.float16)
    noise = draw(batch, *size, 4, seed=2) if noisy else None
    table, guidance = draw(rows, batch, slots, slots + 2, seed=3), draw(batch, seed=4)
    step = torch.tensor([rows - 1], dtype=torch.int32, device=DEVICE)
    new = Output(*state.shape, dtype=torch.float32)
    sampler_step(state, out, noise, table, guidance, step, new.tensor)
    wide = None if noise is None else noise.double()
    row = StepRow(table[-1].double(), guidance.double())
    new.check("sampler_step", REFERENCE.sampler_step(state.double(), out.double(), wide, row))
