"""JSON from files nobody vouches for: capped in bytes and in values, no duplicate keys, no NaN, and an object on top."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from fastsd.checkpoints.file_bytes import read_capped
from fastsd.errors import CheckpointError
from fastsd.wording import shown

MAX_JSON_BYTES = 4 * 2**20
"""Largest config or shard index that is read; real ones stay below 200 kB."""

MAX_JSON_TOKENS = 1_000_000
"""Most brackets, commas and colons a document may hold; a header of 20,000 tensors has about 260,000."""


class _Refused(ValueError):
    """A construct that json accepts and fastsd does not."""


def read_json(path: Path, label: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`; `label` is its name in messages.

    Raises CheckpointError if it is missing, unreadable, over `max_bytes`, not strict JSON or not an object.
    """
    return parse_object(read_capped(path, label, max_bytes), label)


def parse_object(data: bytes, label: str) -> dict[str, Any]:
    """The object in UTF-8 JSON `data`. Raises CheckpointError beginning with `label`."""
    # Python's parser turns a byte of `[],[],` into some 20 bytes of objects: count before parsing.
    if sum(data.count(token) for token in (b"{", b"[", b",", b":")) > MAX_JSON_TOKENS:
        raise CheckpointError(f"{label}: JSON with more than {MAX_JSON_TOKENS:,} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise CheckpointError(f"{label}: JSON nested too deeply") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise CheckpointError(f"{label}: not valid JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: the JSON holds a {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"key {shown(twice)!r} occurs twice (duplicate)")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"number {shown(digits)} is out of range")
    return value
