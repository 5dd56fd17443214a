"""The step's kernels against the reference ops, row by row of a table."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.sampler_step import sampler_step, step_input
from fastsd.ops import REFERENCE, StepRow
from tests.kernels.case import DEVICE, DTYPES, Output, draw
from tests.measured import measured
from tests.oracle import relative_l2
from tests.tolerances import OPS


def counter_at(row: int, batch: int, last: int = 1000) -> torch.Tensor:
    return torch.tensor([row, 0, *[last] * batch], dtype=torch.int32, device=DEVICE)


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
        counter = counter_at(step, batch)
        sampler_step(state, out, noise, table, guidance, counter, new=new.tensor)
        wide = None if noise is None else noise.double()
        row = StepRow(table[step].double(), guidance.double())
        new.check("sampler_step", REFERENCE.sampler_step(state.double(), out.double(), wide, row))
        assert counter.tolist() == [step + 1, 0, 1000, 1000, 1000]


@pytest.mark.parametrize("latent", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_input(latent: tuple, slots: int, copies: int, dtype: torch.dtype) -> None:
    state, weights = draw(slots, 3, *latent, seed=0), draw(4, 3, slots, seed=1)
    time_bias = draw(7, 321, seed=2, dtype=dtype)
    time_rows = torch.tensor([[0, 4, 0], [1, 5, 1], [2, 6, 2], [3, 6, 0]], dtype=torch.int32, device=DEVICE)
    for row in (0, 3):
        found, time = step_input(state, weights, time_bias, time_rows, counter_at(row, 3), copies)
        x, expected = REFERENCE.step_input(state, weights, time_bias, time_rows, counter_at(row, 3), copies)
        assert torch.equal(time, expected)
        assert torch.equal(time, time_bias[time_rows[row].repeat(copies).long()])
        assert found.dtype == dtype
        exact = torch.einsum("bs,sbhwc->bhwc", weights[row].double(), state.double()).repeat(copies, 1, 1, 1)
        limit = 2 * relative_l2(x, exact) + 1e-6
        measured("relative L2", relative_l2(found, exact), min(limit, OPS["step_input"][dtype]))
        assert relative_l2(found, exact) <= limit, f"{relative_l2(found, exact):.1e}, plain PyTorch allows {limit:.1e}"


@pytest.mark.parametrize("run", [sampler_step, None], ids=["kernel", "reference"])
def test_a_walk_in_place(run: Callable[..., torch.Tensor] | None) -> None:
    """Row after row into the state itself, by the device's own counter; of an image's rows that give NaN the first is kept."""
    table, guidance = draw(6, 2, 3, 5, seed=0, scale=0.5), draw(2, seed=1)
    outs = draw(6, 4, 9, 7, 4, seed=2)
    outs[3, 1, 2, 3, 1] = float("nan")
    state, counter = draw(3, 2, 9, 7, 4, seed=3), counter_at(0, 2, last=6)
    expected = state.clone()
    for row in range(6):
        expected = REFERENCE.sampler_step(expected, outs[row], None, StepRow(table[row], guidance))
        if run is None:
            step = StepRow(table, guidance, counter=counter)
            found = REFERENCE.sampler_step(state, outs[row], None, step, new=state)
        else:
            found = run(state, outs[row], None, table, guidance, counter, new=state)
        assert found is state
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert counter.tolist() == [row + 1, 0, 6, 6 if row < 3 else 3]


def test_a_table_shared_by_the_batch() -> None:
    """One sampler for all images: the table is expanded over B, and nothing is copied."""
    state, out = draw(2, 3, 4, 4, 4, seed=0), draw(3, 4, 4, 4, seed=1)
    table = draw(5, 1, 2, 4, seed=2).expand(-1, 3, -1, -1)
    counter = counter_at(4, 3)
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
        ({"counter": torch.tensor([1, 2, 0])}, "counter"),
        ({"counter": torch.zeros(1, dtype=torch.int32)}, "counter"),
    ],
)
def test_what_it_does_not_serve_it_refuses(change: dict, says: str) -> None:
    arguments = {
        "state": draw(1, 2, 4, 4, 4, seed=0),
        "out": draw(2, 4, 4, 4, seed=1),
        "noise": None,
        "table": draw(5, 2, 1, 3, seed=2),
        "guidance": draw(2, seed=3),
        "counter": counter_at(1, 2),
    }
    with pytest.raises(ValueError, match=says):
        sampler_step(**arguments | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": draw(2, 2, 4, 4, 4, seed=0).half()}, "state"),
        ({"weights": draw(5, 2, 3, seed=0)}, "weights"),
        ({"time_rows": torch.zeros(5, 1, dtype=torch.int32)}, "time_rows"),
        ({"time_rows": torch.zeros(5, 2, dtype=torch.int64)}, "time_rows"),
        ({"time_bias": draw(5, 8, seed=0).double()}, "time_bias"),
        ({"time_bias": draw(8, 5, seed=0).T}, "time_bias"),
        ({"counter": torch.zeros(1, dtype=torch.int32)}, "counter"),
    ],
)
def test_what_the_input_kernel_does_not_serve_it_refuses(change: dict, says: str) -> None:
    arguments = {
        "state": draw(2, 2, 4, 4, 4, seed=0),
        "weights": draw(5, 2, 2, seed=1),
        "time_bias": draw(5, 8, seed=2),
        "time_rows": torch.zeros(5, 2, dtype=torch.int32, device=DEVICE),
        "counter": counter_at(1, 2),
    }
    with pytest.raises(ValueError, match=says):
        step_input(**arguments | change)


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
    new = Output(*state.shape, dtype=torch.float32)
    sampler_step(state, out, noise, table, guidance, counter_at(rows - 1, batch), new.tensor)
    wide = None if noise is None else noise.double()
    row = StepRow(table[-1].double(), guidance.double())
    new.check("sampler_step", REFERENCE.sampler_step(state.double(), out.double(), wide, row))
