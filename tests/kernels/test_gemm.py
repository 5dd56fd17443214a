"""The linear kernel against fp64, and against plain PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsd.kernels import gemm
from fastsd.ops import REFERENCE
from tests.kernels.case import DTYPES, Output, draw

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SHAPES = {
    "one row, one column": (1, 1, 16),
    "tails on every side": (77, 90, 50),
    "K below one block": (33, 40, 8),
    "exactly one tile": (64, 64, 64),
    "a group of tile rows and a bit": (65 * 9, 66, 64),
    "split K, uneven parts": (20, 48, 2112),
}


def truth_of(x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, w, b, residual)]
    return REFERENCE.linear(*wide, activation)


@by_dtype
@pytest.mark.parametrize(("m", "n", "k"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", gemm.ACTIVATIONS)
def test_linear(dtype: torch.dtype, m: int, n: int, k: int, activation: str | None) -> None:
    x, w = draw(m, k, seed=0, dtype=dtype), draw(n, k, seed=1, dtype=dtype, scale=k**-0.5)
    b, residual = draw(n, seed=2, dtype=dtype), draw(m, n, seed=3, dtype=dtype)
    out = Output(m, n, dtype=dtype)
    gemm.linear(x, w, b, residual, activation, out=out.tensor)
    out.check("linear", truth_of(x, w, b, residual, activation), REFERENCE.linear(x, w, b, residual, activation))


@by_dtype
def test_no_bias_no_residual_and_leading_axes(dtype: torch.dtype) -> None:
    x, w = draw(2, 3, 5, 32, seed=0, dtype=dtype), draw(24, 32, seed=1, dtype=dtype)
    out = Output(2, 3, 5, 24, dtype=dtype)
    gemm.linear(x, w, out=out.tensor)
    out.check("linear", truth_of(x, w, None, None, None), F.linear(x, w))


@by_dtype
@pytest.mark.parametrize("split", [1, 2, 3, 7])
def test_every_split_gives_the_same_sum(dtype: torch.dtype, split: int) -> None:
    """7 parts of 5 blocks: the last two parts are empty and must add nothing."""
    x, w, b = draw(18, 80, seed=0, dtype=dtype), draw(40, 80, seed=1, dtype=dtype), draw(40, seed=2, dtype=dtype)
    out = Output(18, 40, dtype=dtype)
    for launch in gemm.plan_linear(x, w, b, None, "silu", out.tensor, 90, gemm.Config(16, 16, 16, 4, 2, split)):
        launch.run()
    out.check("linear", truth_of(x, w, b, None, "silu"), REFERENCE.linear(x, w, b, None, "silu"))


def test_a_split_runs_twice_to_the_same_bits() -> None:
    x, w = draw(20, 2112, seed=0, dtype=torch.float16), draw(48, 2112, seed=1, dtype=torch.float16)
    assert gemm.choose_config(20, 48, 2112, torch.float16, 90).split_k > 1
    assert torch.equal(gemm.linear(x, w), gemm.linear(x, w))


def test_sums_beyond_fp16_are_kept_in_fp32() -> None:
    """Partial sums reach 400,000 and cancel: in fp16 they would be infinite."""
    x = torch.full((4, 64), 80.0, device=draw(1, seed=0).device).half()
    w = torch.cat((torch.full((1, 32), 160.0), torch.full((1, 32), -160.0)), 1).half().repeat(16, 1).to(x.device)
    b = draw(16, seed=1, dtype=torch.float16)
    out = Output(4, 16, dtype=torch.float16)
    gemm.linear(x, w, b, out=out.tensor)
    out.check("linear", truth_of(x, w, b, None, None))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 70), split=st.integers(1, 3))
def test_any_shape(m: int, n: int, k: int, split: int) -> None:
    x, w = draw(m, k, seed=m), draw(n, k, seed=n)
    out = Output(m, n, dtype=torch.float32)
    for launch in gemm.plan_linear(x, w, None, None, None, out.tensor, 90, gemm.Config(32, 16, 16, 4, 2, split)):
        launch.run()
    out.check("linear", truth_of(x, w, None, None, None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": draw(4, 8, seed=0).double()}, "fp16, bf16 or fp32"),
        ({"w": draw(3, 8, seed=0).half()}, "fp16, bf16 or fp32"),
        ({"w": draw(3, 9, seed=0)}, "do not fit"),
        ({"b": draw(4, seed=0)}, "do not fit"),
        ({"x": draw(8, 4, seed=0).T}, "contiguous"),
        ({"x": draw(0, 8, seed=0)}, "no elements"),
        ({"residual": draw(4, 4, seed=0)}, "residual"),
        ({"activation": "relu"}, "relu"),
    ],
)
def test_what_it_does_not_serve_it_refuses(change: dict, says: str) -> None:
    arguments = {"x": draw(4, 8, seed=0), "w": draw(3, 8, seed=1)} | change
    with pytest.raises(ValueError, match=says):
        gemm.linear(**arguments)
