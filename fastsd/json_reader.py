"""Typed values out of a checkpoint's JSON, for every file that holds settings."""

from collections.abc import Collection, Mapping
from typing import Any

from fastsd.errors import CheckpointError
from fastsd.wording import quoted

LARGEST_INTEGER = 1 << 20
LARGEST_NUMBER = 1e6


class JsonReader:
    """Reads one JSON object; every complaint is a CheckpointError that names the file, the key and what was found.

    A key that is not there has the default. So has one that is null, if it is among `nullable`: the writers of these files
    say "unset" in either way.
    """

    def __init__(self, json: Mapping[str, Any], file: str, nullable: Collection[str] = ()) -> None:
        self.file = file
        self.json = {key: value for key, value in json.items() if value is not None or key not in nullable}

    def error(self, key: str, why: str) -> CheckpointError:
        """The error to raise about `key`, whose value it shows."""
        return CheckpointError(f"{self.file}: {key} = {quoted(self.json.get(key))}: {why}")

    def require(self, allowed: Mapping[str, tuple[Any, ...]], why: str) -> None:
        """Each of these keys is absent or has one of the allowed values."""
        for key, values in allowed.items():
            if key in self.json and self.json[key] not in values:
                raise self.error(key, why)

    def integer(self, key: str, default: int, low: int = 1, high: int = LARGEST_INTEGER) -> int:
        """In [low, high]."""
        value = self.json.get(key, default)
        if not is_integer(value, low, high):
            raise self.error(key, f"must be {integer_span(low, high)}")
        return int(value)

    def number(self, key: str, default: float, above: float = -LARGEST_NUMBER, below: float = LARGEST_NUMBER) -> float:
        """In (above, below)."""
        value = self.json.get(key, default)
        if not _is_number(value, above, below):
            raise self.error(key, f"must be a finite number above {above:g} and below {below:g}")
        return float(value)

    def numbers(self, key: str, above: float, below: float, most: int) -> list[float]:
        """A list of 1 to `most` numbers in (above, below)."""
        value = self.json.get(key)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
            raise self.error(key, f"must be a list of 1 to {most} numbers")
        if not all(_is_number(v, above, below) for v in value):
            raise self.error(key, f"must be a list of finite numbers above {above:g} and below {below:g}")
        return [float(v) for v in value]

    def flag(self, key: str, default: bool) -> bool:
        value = self.json.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def choice(self, key: str, default: Any, choices: tuple[Any, ...]) -> Any:
        value = self.json.get(key, default)
        if value not in choices:
            raise self.error(key, f"must be one of {', '.join(str(c) for c in choices if c is not None)}")
        return choices[choices.index(value)]  # 1.0 and true are equal to 1, but not the same


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether it is an integer, and no boolean, in [low, high]."""
    return type(value) is int and low <= value <= high


def integer_span(low: int, high: int) -> str:
    return f"a positive integer, at most {high}" if low == 1 else f"an integer from {low} to {high}"


def _is_number(value: Any, above: float, below: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below
