"""A kernel launch as a value: what is run on the GPU or in the interpreter is what is compiled ahead of time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}

BUILD_ERRORS = (TritonError, RuntimeError)
"""What compiling may raise: Triton's own errors, and those of MLIR's passes."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute in and on."""

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that one CTA may have, by compute capability."""


@dataclass(frozen=True)
class Launch:
    """One launch, planned from shapes and dtypes alone: tensors on meta serve for compiling ahead of time."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self._options)

    def warm(self) -> None:
        """Compile, for the current CUDA device, what `run` would launch: other processes then find it in Triton's cache.

        Under the interpreter there is nothing to compile.
        """
        self.kernel.warmup(grid=self.grid, **self.arguments, **self.constants, **self._options)

    def source(self) -> Any:
        """What `triton.compile` takes, specialised as a launch is: pointers are 16-byte aligned, as PyTorch allocates them,
        multiples of 16 are known to be that, and an integer 1 is a constant."""
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        ones = {name: value for name, value in self.arguments.items() if isinstance(value, int) and value == 1}
        given = {name: value for name, value in self.arguments.items() if name not in ones}
        signature = {name: _type(given[name]) if name in given else "constexpr" for name in names}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, value in given.items()
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        }
        return ASTSource(self.kernel, signature, self.constants | ones, aligned)

    def compile(self, arch: int) -> Any:
        """Compiled for a compute capability (80, 86, 89, 90, 100), with or without such a GPU; cached by Triton."""
        from triton.backends.compiler import GPUTarget

        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=self._options)

    @property
    def _options(self) -> dict[str, int | bool]:
        # A product and a sum in one rounding, said aloud: Triton 3.10 turns it off by default.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def check_operands(operands: Mapping[str, tuple[Tensor, Sequence[int]]]) -> None:
    """ValueError unless each tensor is contiguous, of its shape, of a type in FLOATS, and where the first one is."""
    first, device = next((name, tensor.device) for name, (tensor, _) in operands.items())
    for name, (tensor, shape) in operands.items():
        if tensor.shape != tuple(shape) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {list(shape)}, not {list(tensor.shape)}, {tensor.stride()}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be fp16, bf16 or fp32, not {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}")


def arch_of(device: torch.device) -> int:
    """Compute capability as 80, 86, 89, 90, 100; 90 where the interpreter or a plan stands in for a GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def runs_on(device: torch.device) -> bool:
    """On a CUDA GPU, and on the CPU in Triton's interpreter, which TRITON_INTERPRET=1 chooses."""
    return device.type == "cuda" or (device.type == "cpu" and bool(triton.knobs.runtime.interpret))


def shared_memory(arch: int) -> int:
    """Bytes that one CTA may have on a compute capability; the least of all GPUs' on one that is not listed."""
    return SHARED_MEMORY.get(arch, min(SHARED_MEMORY.values()))


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPE_NAMES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
