"""Where and in what precision to compute, and how long it took there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from fastsd.errors import OutOfMemoryError, ParameterError
from fastsd.wording import quoted

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def select_device(device: str | torch.device) -> torch.device:
    """ "auto": cuda if there is one, else cpu. ParameterError if the device is unknown or absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"device: {quoted(device)} is unknown; choose auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ParameterError(f"device: {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ParameterError(f"device: {device!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def select_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": fp16 on cuda, fp32 on the cpu."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ParameterError(f"dtype: {quoted(dtype)} is unknown; choose auto, float32, float16 or bfloat16")
    return chosen


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch found no memory: a torch.OutOfMemoryError, or the bare RuntimeError of the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


@contextmanager
def computing(device: torch.device, what: str) -> Iterator[None]:
    """For the body of every public method: no gradients, no autocast and no inference mode of the caller's (what is kept from one
    call to the next, such as buffers, shall be writable in either), kernels launched on this GPU and no other, typed errors
    where memory ends.

    what: what was being made, for the message: "4 images of 512x512 in torch.float16".
    """
    try:
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), current:
            yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{device} has not the memory for {what}; ask for fewer images at a time, or a smaller size"
        ) from error


class Stopwatch:
    """Milliseconds a stage; on a GPU a stage ends when its work has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timings: dict[str, float] = {"total": 0.0}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings[name] = (time.perf_counter() - start) * 1e3
        self.timings["total"] += self.timings[name]
