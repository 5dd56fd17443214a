"""The GEGLU kernel against fp64, and against plain PyTorch in the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels import geglu
from fastsd.ops import REFERENCE
from tests.kernels.case import DTYPES, Output, draw

SHAPES = {
    "one row, one column": (1, 1, 16),
    "tails on every side": (77, 45, 50),
    "exactly one tile": (64, 64, 64),
    "a whole tile and one column": (32, 65, 32),
}


def check(m: int, n: int, k: int, dtype: torch.dtype, scale: float = 1.0) -> None:
    x, w = draw(m, k, seed=0, dtype=dtype), draw(2 * n, k, seed=1, dtype=dtype, scale=scale * k**-0.5)
    b = draw(2 * n, seed=2, dtype=dtype)
    out = Output(m, n, dtype=dtype)
    geglu.geglu(x, w, b, out=out.tensor)
    out.check("geglu", REFERENCE.geglu(x.double(), w.double(), b.double()), REFERENCE.geglu(x, w, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES.values(), ids=SHAPES)
def test_geglu(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    check(m, n, k, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_far_from_zero(dtype: torch.dtype) -> None:
    """Where erf is 1 or the gate shuts: an approximate GELU would show."""
    check(40, 24, 64, dtype, scale=20.0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 70))
def test_any_shape(m: int, n: int, k: int) -> None:
    check(m, n, k, torch.float32)


def test_packing_interleaves() -> None:
    w = torch.arange(12.0).view(6, 2)
    assert geglu.pack(w)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert geglu.pack(w[:, 0]).tolist() == [0, 6, 2, 8, 4, 10]


def test_a_changed_weight_refills_the_same_buffer() -> None:
    """A live CUDA graph reads that buffer: a LoRA must come and go in it, and leave the old bits behind."""
    x, w, b = draw(8, 16, seed=0), draw(24, 16, seed=1), draw(24, seed=2)
    first, buffer = geglu.geglu(x, w, b), geglu._packed.get(w)
    kept = w.clone()
    w += 1.0
    out = Output(8, 12, dtype=torch.float32)
    geglu.geglu(x, w, b, out=out.tensor)
    out.check("geglu", REFERENCE.geglu(x.double(), w.double(), b.double()))
    assert geglu._packed.get(w).data_ptr() == buffer.data_ptr()
    w.copy_(kept)
    assert torch.equal(geglu.geglu(x, w, b), first)


def test_what_it_does_not_serve_it_refuses() -> None:
    with pytest.raises(ValueError, match="as many"):
        geglu.geglu(draw(4, 8, seed=0), draw(5, 8, seed=1), draw(5, seed=2))
    with torch.inference_mode():
        w = draw(6, 8, seed=1)
    with pytest.raises(ValueError, match="inference mode"):
        geglu.geglu(draw(4, 8, seed=0), w, draw(6, seed=2))
