"""A kernel launch as a value: what is run on the GPU or in the interpreter is what is compiled ahead of time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute in and on."""


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
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)

    def source(self) -> Any:
        """What `triton.compile` takes. Pointers are 16-byte aligned, as PyTorch allocates them."""
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        signature = {name: _type(self.arguments[name]) if name in self.arguments else "constexpr" for name in names}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        }
        return ASTSource(self.kernel, signature, self.constants, aligned)

    def compile(self, arch: int) -> Any:
        """Compiled for a compute capability (80, 86, 89, 90, 100), with or without such a GPU; cached by Triton."""
        from triton.backends.compiler import GPUTarget

        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=options)


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


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
