"""An adapter's weight in the UNet, block by block as diffusers writes it: {"down": 0.5, "up": {"block_1": [1, 0, 0.5]}}."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastsd.checks import number
from fastsd.errors import ParameterError
from fastsd.wording import listed, quoted

Weight = float | Mapping[str, float]
"""One for all layers, or by attention: "down_blocks.0.attentions.1"; see `weight_of`."""

MAX_WEIGHT = 1000.0
PARTS = ("down", "mid", "up")

_MIDDLE = "mid_block.attentions.0"
_ATTENTION = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")
_IN_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+)\.\w+\.(\d+)\.")


def checked(given: Any) -> float:
    """A weight, which is 1 where none is given; ParameterError if it is no number from -1000 to 1000."""
    return 1.0 if given is None else number("adapter_weights", given, -MAX_WEIGHT, MAX_WEIGHT)


def by_block(given: Mapping[str, Any], layers: Iterable[str]) -> dict[str, float]:
    """diffusers' nested form → the weight of each attention. layers: the names of the UNet's.

    A number stands for all that is below it, a list for a block's attentions one by one; what is left out has 1.
    ParameterError for a block that has no attentions, a list of another length, and what is no number from -1000 to 1000.
    """
    blocks: dict[str, dict[str, set[int]]] = {"down": {}, "up": {}}
    for match in filter(None, map(_ATTENTION.match, layers)):
        blocks[match[1]].setdefault(f"block_{match[2]}", set()).add(int(match[3]))
    _known(given, PARTS)
    weights = {_MIDDLE: _all(given.get("mid"), 1, "mid")[0]}
    for part, known in blocks.items():
        inner = given.get(part)
        if isinstance(inner, Mapping):
            _known(inner, known)
        for block, attentions in known.items():
            weight = inner.get(block) if isinstance(inner, Mapping) else inner
            place = f"{part}_blocks.{block.removeprefix('block_')}.attentions"
            each = _all(weight, len(attentions), f"{part}.{block}")
            weights |= {f"{place}.{index}": value for index, value in enumerate(each)}
    return weights


def weight_of(weight: Weight, layer: str) -> float:
    """What a layer of the UNet of that name is weighed by.

    As in diffusers, in blocks with attentions a residual block, or a sampler, weighs what the attention of its number does; the
    convolutions in the middle, and all layers elsewhere, weigh 1.
    """
    if not isinstance(weight, Mapping):
        return weight
    match = _IN_BLOCK.match(layer)
    place = f"{match[1]}.attentions.{match[2]}" if match else _MIDDLE if layer.startswith(f"{_MIDDLE}.") else ""
    return weight.get(place, 1.0)


def _known(given: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in given:
        if name not in names:
            raise ParameterError(
                f"adapter_weights: {quoted(name)} is no part with attentions; give {listed(list(names))} their weights"
            )


def _all(given: Any, count: int, place: str) -> list[float]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [checked(given)] * count
    if len(given) not in (1, count):
        raise ParameterError(
            f"adapter_weights: {len(given)} weights for the {count} attentions of {place}; give each its own"
        )
    return [checked(weight) for weight in given] * (count // len(given))
