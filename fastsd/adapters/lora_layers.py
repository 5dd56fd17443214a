"""A LoRA's file → what it adds to each layer, checked against the model before anything large is read.

keys ─► layer and factor ─► a formula a layer ─► the shape it gives ─► factors read ─► finite?
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsd.adapters.block_weights import MAX_WEIGHT
from fastsd.adapters.deltas import FORMULAS, Delta, bound_of, rank_of
from fastsd.adapters.lora_keys import Layer, foreign, layer_shapes, spellings, split_key
from fastsd.checkpoints.lora import find_lora, open_lora, read_hashed, training_config
from fastsd.checkpoints.weights import WeightFile
from fastsd.config import UNetConfig
from fastsd.errors import CheckpointError
from fastsd.wording import listed, quoted, shown

Keys = dict[str, str]
"""A layer's factors: what each is → its key in the file."""

MAX_SCALE = torch.finfo(torch.float32).max / MAX_WEIGHT
"""Weights are merged in fp32, which must hold a scale times the largest weight that an adapter may be given."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRAINED_FOR = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


class LoraFile(NamedTuple):
    """A LoRA as it was read."""

    name: str
    """The file's, without its suffix."""
    sha256: str
    """See `fastsd.checkpoints.lora.read_hashed`."""
    layers: dict[Layer, Delta]
    """What it adds to each layer, its factors on the CPU."""


def read_lora(
    path: str | Path,
    nets: Mapping[str, nn.Module],
    weight_name: str | None = None,
    allow_pickle: bool = False,
    **hub: Any,
) -> LoraFile:
    """A LoRA, LoHa or LoKr file for layers of `nets` ("unet", "text_encoder").

    path, weight_name, hub: as `fastsd.checkpoints.lora.find_lora` takes them; allow_pickle: as `open_lora`. The scale is
    alpha / rank; without an alpha it is 1, as it is where no factor is of low rank.
    Raises CheckpointError, naming ten keys at most, for what these refuse, for keys of layers that the model has not, factors
    that are missing or do not fit, DoRA, other models' LoRAs, values that are not finite, and scales beyond MAX_SCALE.
    """
    place = find_lora(path, weight_name, **hub)
    file = open_lora(place, allow_pickle)
    shapes = layer_shapes(nets)
    config = nets["unet"].config
    assert isinstance(config, UNetConfig)
    layers = _group(file, spellings(shapes, config))
    for layer, keys in layers.items():
        _check_factors(file, layer, keys)
    _check_shapes(file, layers, shapes)
    settings = training_config(file)
    tensors, sha256 = read_hashed(file, place)
    damaged = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if damaged:
        raise CheckpointError(f"{file.label}: NaN or infinite values in {len(damaged)} tensors ({listed(damaged)})")
    deltas = {layer: _delta(file, layer, keys, tensors, settings, shapes[layer]) for layer, keys in layers.items()}
    return LoraFile(place.stem, sha256, deltas)


def _group(file: WeightFile, known: Mapping[str, Layer]) -> dict[Layer, Keys]:
    """The file's keys by layer. CheckpointError if some are none of a LoRA's, or of layers that the model has not."""
    if not file.tensors:
        raise CheckpointError(f"{file.label}: holds no tensors")
    layers: dict[Layer, Keys] = {}
    strange, absent = [], []
    for key in file.tensors:
        parts = split_key(key)
        layer = known.get(parts[0]) if parts else None
        if parts is None:
            strange.append(key)
        elif layer is None:
            absent.append(key)
        elif parts[1] in layers.setdefault(layer, {}):
            raise CheckpointError(f"{file.label}: {shown(key)} is a duplicate of {shown(layers[layer][parts[1]])}")
        else:
            layers[layer][parts[1]] = key
    if not strange and not absent:
        return layers
    model = foreign(file.tensors)
    if model:
        raise CheckpointError(
            f"{file.label}: a LoRA for {model}, e.g. {shown((absent + strange)[0])}; fastsd runs Stable Diffusion 1.x and 2.x"
        )
    if absent:
        raise CheckpointError(f"{file.label}: the model has no layers for {len(absent)} of the keys ({listed(absent)})")
    raise CheckpointError(f"{file.label}: {len(strange)} keys are of no LoRA, LoHa or LoKr ({listed(strange)})")


def _check_factors(file: WeightFile, layer: Layer, keys: Keys) -> None:
    """CheckpointError unless the factors make up one formula, in floating point."""
    if "dora" in keys:
        raise CheckpointError(
            f"{file.label}: a DoRA ({shown(keys['dora'])}), which changes weights by more than a sum; fastsd merges LoRA, LoHa "
            "and LoKr"
        )
    if frozenset(keys.keys() - {"alpha"}) not in FORMULAS:
        raise CheckpointError(f"{file.label}: incomplete, or of no kind that is known: {listed(list(keys.values()))}")
    for part, key in keys.items():
        spec = file.tensors[key]
        if part == "alpha" and math.prod(spec.shape) != 1:
            raise CheckpointError(f"{file.label}: {shown(key)} must be one number, not {list(spec.shape)}")
        if part != "alpha" and (spec.dtype not in _FLOATS or len(spec.shape) < 2 or math.prod(spec.shape) == 0):
            kind = f"{list(spec.shape)} of {spec.dtype}".replace("torch.", "")
            raise CheckpointError(
                f"{file.label}: {shown(key)} is {kind}; a factor is a matrix of floats, of rank 1 at least"
            )


def _check_shapes(file: WeightFile, layers: Mapping[Layer, Keys], shapes: Mapping[Layer, tuple[int, ...]]) -> None:
    """CheckpointError unless every layer's formula gives a matrix of its weight's shape."""
    unfit = []
    for layer, keys in layers.items():
        specs = {part: file.tensors[key] for part, key in keys.items() if part != "alpha"}
        if FORMULAS[frozenset(specs)].shape({part: spec.shape for part, spec in specs.items()}) != (
            shapes[layer][0],
            math.prod(shapes[layer][1:]),
        ):
            found = ", ".join(f"{part} {list(spec.shape)}" for part, spec in specs.items())
            unfit.append((f"{'.'.join(layer)} {list(shapes[layer])}: {found}", layer, specs))
    if not unfit:
        return
    widths = [specs["down"].shape[-1] for _, layer, specs in unfit if "attn2.to_k" in layer[1] and "down" in specs]
    model = _TRAINED_FOR.get(widths[0]) if widths else None
    hint = f"; it was trained for {model}" if model else ""
    raise CheckpointError(
        f"{file.label}: {len(unfit)} layers of another shape than the model's ({listed([text for text, *_ in unfit])}){hint}"
    )


def _delta(
    file: WeightFile,
    layer: Layer,
    keys: Keys,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    shape: tuple[int, ...],
) -> Delta:
    factors = {part: tensors[key] for part, key in keys.items() if part != "alpha"}
    rank = rank_of(factors)
    if rank is None:
        scale = 1.0
    elif "alpha" in keys:
        scale = float(tensors[keys["alpha"]]) / rank
    else:
        divisor = math.sqrt(rank) if settings.get(f"{layer[0]}.use_rslora") else rank
        scale = _trained_alpha(file, layer, settings, rank) / divisor
    if not abs(scale) <= MAX_SCALE:
        name = ".".join(layer)
        raise CheckpointError(
            f"{file.label}: alpha scales {name} by {scale:.2g}, more than can be merged ({MAX_SCALE:.2g}); correct the alpha"
        )
    return Delta(FORMULAS[frozenset(factors)], factors, scale, shape, bound_of(factors))


def _trained_alpha(file: WeightFile, layer: Layer, settings: Mapping[str, Any], rank: int) -> float:
    """PEFT's alpha of a layer: its own where one is set, else the adapter's, else the rank."""
    component, name = layer
    patterns = settings.get(f"{component}.alpha_pattern") or {}
    own = (
        [alpha for key, alpha in patterns.items() if f".{name}".endswith(f".{key}")]
        if isinstance(patterns, dict)
        else []
    )
    alpha = [*own, settings.get(f"{component}.lora_alpha", rank)][0]
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(
            f"{file.label}: lora_adapter_metadata has {quoted(alpha)} for an alpha, which is no number"
        )
    return float(alpha) if abs(alpha) <= sys.float_info.max else math.inf
