"""The kernel tests' own gates: each fault that they are there for must fail them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastsd.kernels import geglu, gemm
from fastsd.ops import REFERENCE
from tests.kernels.case import Output, draw

X, W, B = draw(20, 32, seed=0), draw(24, 32, seed=1), draw(24, seed=2)
TRUTH = REFERENCE.linear(X.double(), W.double(), B.double())


def run(out: Tensor, change: Callable[..., object] = lambda launch: launch) -> None:
    """The linear kernel into out, its launch changed."""
    for launch in gemm.plan_linear(X, W, B, None, None, out, 90):
        change(launch).run()


def one_row_more(launch):
    return replace(launch, arguments=launch.arguments | {"M": len(X) + 1})


def one_row_less(launch):
    return replace(launch, arguments=launch.arguments | {"M": len(X) - 1})


def no_bias(launch):
    return replace(launch, constants=launch.constants | {"HAS_BIAS": False})


def test_a_sound_kernel_passes() -> None:
    out = Output(20, 24, dtype=torch.float32)
    run(out.tensor)
    out.check("linear", TRUTH)


@pytest.mark.parametrize(
    ("fault", "says"),
    [(one_row_more, "written outside"), (one_row_less, "never written"), (no_bias, "relative L2 error")],
)
def test_a_faulty_launch_fails(fault: Callable[..., object], says: str) -> None:
    out = Output(20, 24, dtype=torch.float32)
    run(out.tensor, fault)
    with pytest.raises(AssertionError, match=says):
        out.check("linear", TRUTH)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_fails(bad: float) -> None:
    out = Output(20, 24, dtype=torch.float32)
    run(out.tensor)
    out.tensor[3, 5] = bad
    with pytest.raises(AssertionError, match="1 elements are not finite"):
        out.check("linear", TRUTH)


def test_weights_in_the_wrong_order_fail() -> None:
    out = Output(20, 12, dtype=torch.float32)
    for launch in geglu.plan_geglu(X, W, B, out.tensor, 90):  # as in the checkpoint, not interleaved
        launch.run()
    with pytest.raises(AssertionError, match="relative L2 error"):
        out.check("geglu", REFERENCE.geglu(X.double(), W.double(), B.double()))


def test_a_kernel_that_errs_more_than_twice_as_much_as_pytorch_fails() -> None:
    """Within the dtype's gate, and yet too coarse: sums in fp16."""
    out = Output(20, 24, dtype=torch.float16)
    out.tensor.copy_(TRUTH * (1 + 4e-4))
    with pytest.raises(AssertionError, match="plain PyTorch's allows"):
        out.check("linear", TRUTH, TRUTH * (1 + 1e-4))
