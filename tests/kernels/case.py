"""What every kernel test needs: inputs, the gates, and an output whose surroundings tell of a stray store."""

import os
import subprocess
import sys

import torch
from torch import Tensor

from bench.record import ROOT
from tests.measured import measured
from tests.oracle import relative_l2
from tests.tolerances import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's tl.dot gives garbage in bf16 without a word.
DTYPES = (torch.float16, torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float16, torch.float32)
CANARY = -777.0


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + mean
    return values.to(DEVICE, dtype)


def run_compiled(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python on these arguments in a process without the interpreter, whose functions cannot be compiled."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


class Output:
    """A contiguous output full of NaN inside a longer buffer of canaries: an element not written, or written outside, shows."""

    BORDER = 4096

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + 2 * self.BORDER,), CANARY, dtype=dtype, device=DEVICE)
        self.tensor = self.buffer[self.BORDER : self.BORDER + size].view(shape).fill_(float("nan"))

    def check(self, name: str, truth: Tensor, plain: Tensor | None = None) -> None:
        """All written, nothing outside; within the op's gate of the fp64 truth; at most twice plain PyTorch's error."""
        outside = torch.cat((self.buffer[: self.BORDER], self.buffer[-self.BORDER :]))
        assert (outside == CANARY).all(), (
            f"{name}: {int((outside != CANARY).sum())} elements written outside the output"
        )
        missing = int((~self.tensor.isfinite()).sum())
        assert not missing, f"{name}: {missing} elements are not finite, or were never written"
        error, gate = relative_l2(self.tensor, truth), OPS[name][self.tensor.dtype]
        measured("relative L2", error, gate)
        assert error <= gate, f"{name} {self.tensor.dtype}: relative L2 error {error:.1e} > {gate:.0e}"
        if plain is not None:
            limit = 2 * relative_l2(plain, truth) + 1e-6
            assert error <= limit, f"{name} {self.tensor.dtype}: error {error:.1e}, plain PyTorch's allows {limit:.1e}"
