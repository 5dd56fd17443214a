"""Projections into heads: one product for all layers of an input, heads stored a multiple of 16 wide."""

import pytest
import torch

from fastsd.kernels import heads
from fastsd.ops import REFERENCE
from tests.kernels.case import DTYPES, draw
from tests.measured import measured
from tests.oracle import relative_l2
from tests.tolerances import OPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("count", "head_dim", "stored"), [(3, 40, 48), (2, 10, 16), (1, 64, 64)], ids=["40 in 48", "10 in 16", "exact"]
)
def test_project_heads(dtype: torch.dtype, biased: bool, count: int, head_dim: int, stored: int) -> None:
    x, width = draw(2, 7, 33, seed=0, dtype=dtype), 2 * head_dim
    weights = [draw(width, 33, seed=1 + i, dtype=dtype, scale=33**-0.5) for i in range(count)]
    biases = [draw(width, seed=9 + i, dtype=dtype) for i in range(count)] if biased else None
    found = heads.project_heads(x, weights, biases, 2)
    wide = None if biases is None else [b.double() for b in biases]
    truth = REFERENCE.project_heads(x.double(), [w.double() for w in weights], wide, 2)
    for one, expected in zip(found, truth, strict=True):
        assert one.shape == (2, 7, 2, stored)
        assert not one[..., head_dim:].any(), "what attention takes for zeros is not zero"
        error = relative_l2(one[..., :head_dim], expected)
        measured("relative L2", error, OPS["linear"][dtype])
        assert error <= OPS["linear"][dtype], f"relative L2 error {error:.1e}"


def test_any_changed_weight_is_seen() -> None:
    """The packed copy belongs to all the weights, not only to the first."""
    x, weights = draw(1, 3, 16, seed=0), [draw(16, 16, seed=1 + i) for i in range(2)]
    heads.project_heads(x, weights, None, 1)
    weights[1].mul_(3)
    _, second = heads.project_heads(x, weights, None, 1)
    torch.testing.assert_close(second.flatten(2), x @ weights[1].T)
    other = [weights[0], draw(16, 16, seed=5)]
    _, second = heads.project_heads(x, other, None, 1)
    torch.testing.assert_close(second.flatten(2), x @ other[1].T)


@pytest.mark.parametrize(
    ("weights", "biases", "says"),
    [
        ([draw(16, 8, seed=0), draw(32, 8, seed=1)], None, "weights must all be"),
        ([draw(15, 8, seed=0)], None, "weights must all be"),
        ([draw(16, 8, seed=0)], [draw(15, seed=1)], "biases must be"),
        ([draw(16, 9, seed=0)], None, "do not fit"),
    ],
)
def test_what_it_does_not_serve_it_refuses(weights: list, biases: list | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        heads.project_heads(draw(1, 3, 8, seed=2), weights, biases, 2)
