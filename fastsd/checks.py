"""Checks of single arguments. Each gives the value back in the form the code works with, or raises ParameterError.

Messages are one line: the argument's name, a colon, what is wrong, what would be right.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsd.errors import ParameterError
from fastsd.wording import quoted

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def present(value: T | None) -> T:
    """The value, where the way of the data says that it is there by now."""
    assert value is not None
    return value


def integer(name: str, value: Any, low: int, high: int | None) -> int:
    """value as an int in [low, high]; what only looks like an integer (a bool, 3.0, "3") is refused."""
    span = f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}"
    try:
        number = value.__index__() if not isinstance(value, bool) else None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        raise ParameterError(f"{name}: {quoted(value)} is not an integer; it must be {span}")
    if number < low or (high is not None and number > high):
        raise ParameterError(f"{name}: {quoted(number)} is out of range; it must be {span}")
    return number


def number(name: str, value: Any, low: float, high: float) -> float:
    """value as a finite float in [low, high]."""
    try:
        real = float(value) if not isinstance(value, bool | str | bytes) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        real = math.nan
    if not low <= real <= high:
        raise ParameterError(f"{name}: {quoted(value)} is not right; it must be a number from {low:g} to {high:g}")
    return real


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """value if it is one of choices."""
    if not isinstance(value, str) or value not in choices:
        raise ParameterError(f"{name}: {quoted(value)} is unknown; choose one of {', '.join(choices)}")
    return value


def text_or_none(name: str, value: Any) -> str | None:
    """value if it is a string or None."""
    if value is not None and not isinstance(value, str):
        raise ParameterError(f"{name}: must be a string, not {quoted(value)}")
    return value


def flag_or_none(name: str, value: Any) -> bool | None:
    """value if it is True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise ParameterError(f"{name}: must be True, False or None, not {quoted(value)}")
    return value


def float_tensor(name: str, value: Any, shape: Sequence[int | None], letters: str) -> Tensor:
    """value if it is a finite, dense float tensor of this shape; None stands for any size of at least 1.

    letters: how the message calls the axes, e.g. "images, channels, height, width".
    """
    if not isinstance(value, Tensor):
        raise ParameterError(f"{name}: must be a tensor ({letters}), not {quoted(value)}")
    fits = value.ndim == len(shape) and all(
        size >= 1 if wanted is None else size == wanted for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ParameterError(f"{name}: must have the shape [{wanted}] ({letters}), not {list(value.shape)}")
    if value.dtype not in FLOATS or value.layout != torch.strided or value.device.type == "meta":
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise ParameterError(f"{name}: must be a dense tensor of fp16, bf16, fp32 or fp64, not {kind}")
    if not value.isfinite().all():
        raise ParameterError(f"{name}: holds NaN or infinite values")
    return value
