"""The layer norm kernel against an fp64 truth, at most twice PyTorch's error."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsd.kernels.layernorm import Config, choose_config, layer_norm, plan_layer_norm
from fastsd.ops import REFERENCE
from tests.kernels.case import DTYPES, Output, draw

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """fp64, from the definition."""
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w.double() + b.double()


def check(x: Tensor, eps: float = 1e-5, config: Config | None = None) -> None:
    width = x.shape[-1]
    w, b = draw(width, seed=91, dtype=x.dtype, mean=1.0), draw(width, seed=92, dtype=x.dtype)
    out = Output(*x.shape, dtype=x.dtype)
    if config is None:
        assert layer_norm(x, w, b, eps, out=out.tensor) is out.tensor
    else:
        for launch in plan_layer_norm(x, w, b, eps, out.tensor, config):
            launch.run()
    out.check("layer_norm", norm(x, w, b, eps), REFERENCE.layer_norm(x, w, b, eps))


@by_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (3, 2),  # the narrowest with a deviation
        (1, 320),  # one row; SD's widths are no powers of two …
        (2, 5, 640),
        (7, 768),
        (2, 3, 1280),
        (4, 1024),  # … and SD 2's CLIP: no masked columns
        (3, 77),  # odd
        (257,),  # no leading axis, one element over a power of two
    ],
    ids=str,
)
def test_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(draw(*shape, seed=0, dtype=dtype, mean=0.5))


@by_dtype
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
def test_rows_beside_a_tile(dtype: torch.dtype, rows: int) -> None:
    """8 rows a CTA, which the chooser takes only from 2112 rows on: the last tile short, full, or of one row."""
    check(draw(rows, 40, seed=1, dtype=dtype), config=Config(8, 64, 4))


def test_rows_as_chosen() -> None:
    assert choose_config(2117, 40).block_rows == 8
    check(draw(2117, 40, seed=2))


@by_dtype
@pytest.mark.parametrize("mean", [100.0, -1000.0, 30000.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_mean_far_above_the_deviation(dtype: torch.dtype, mean: float, eps: float) -> None:
    """|mean| / std of 100 and 1000; 30,000 overflows fp16 in a square, and fp16 keeps only multiples of 16 there."""
    check(draw(5, 320, seed=3, dtype=dtype, scale=30.0 if mean == 30000.0 else 1.0, mean=mean), eps)


@by_dtype
def test_one_value_far_above_the_others(dtype: torch.dtype) -> None:
    """Transformers have such channels."""
    x = draw(4, 640, seed=4, dtype=dtype)
    x[:, 0] = 2000.0
    check(x)


@by_dtype
def test_small_values_are_ruled_by_eps(dtype: torch.dtype) -> None:
    for eps in (1e-5, 1e-6):
        check(draw(3, 320, seed=5, dtype=dtype, scale=1e-3), eps)


@by_dtype
@pytest.mark.parametrize("width", [1, 40])
def test_without_deviation_the_bias(dtype: torch.dtype, width: int) -> None:
    """A single channel, and a row of equal values, are 0 / √eps · w + b."""
    w, b = draw(width, seed=6, dtype=dtype), draw(width, seed=7, dtype=dtype)
    y = layer_norm(torch.full_like(w, 300.0).expand(3, width).contiguous(), w, b)
    assert torch.equal(y, b.expand_as(y)), f"off by {(y - b).abs().max():.1e}"


def test_rows_do_not_mix() -> None:
    x, w = draw(9, 40, seed=8), draw(40, seed=9)
    x[4, 3] = float("nan")
    poisoned = layer_norm(x, w, w).isnan().any(-1)
    assert poisoned.nonzero().flatten().tolist() == [4]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 20), width=st.integers(2, 700), mean=st.floats(-50, 50), dtype=st.sampled_from(DTYPES))
def test_any_shape(rows: int, width: int, mean: float, dtype: torch.dtype) -> None:
    check(draw(rows, width, seed=10, dtype=dtype, mean=mean))


REFUSED = {
    "every other column": (lambda x, w: layer_norm(x[:, ::2], w[::2], w[::2]), "contiguous"),
    "transposed": (lambda x, w: layer_norm(x.t(), w[:3], w[:3]), "contiguous"),
    "float64": (lambda x, w: layer_norm(x.double(), w, w), "fp16, bf16 or fp32"),
    "out of another dtype": (lambda x, w: layer_norm(x, w, w, out=x.half()), "out must be"),
    "weights too short": (lambda x, w: layer_norm(x, w[:7], w), "w must be"),
    "no rows": (lambda x, w: layer_norm(x[:0], w, w), "elements"),
    "too wide": (lambda x, w: layer_norm(x.new_zeros(1, 16385), w, w), "16384"),
    "another device": (lambda x, w: layer_norm(x, w, w.to("meta")), "meta"),
}


@pytest.mark.parametrize(("call", "why"), REFUSED.values(), ids=REFUSED)
def test_refused(call: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call(draw(3, 8, seed=11), draw(8, seed=12))
