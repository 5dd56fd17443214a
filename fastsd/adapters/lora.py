"""LoRAs merged into the weights, in place: W ← W₀ + Σ wᵢ·ΔWᵢ, so that a step costs what it costs without them.

ΔW and the sum are fp32, with one rounding to the weight's dtype. W₀ is kept of the layers that are changed, on the device, so
that taking a LoRA off gives back every bit. Weights are written where they lie: packed copies and captured graphs follow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.adapters.deltas import Delta
from fastsd.adapters.lora_keys import Layer
from fastsd.adapters.lora_layers import read_layers
from fastsd.adapters.swap_lock import SwapLock
from fastsd.checks import number
from fastsd.device import computing
from fastsd.errors import NumericsError, ParameterError
from fastsd.wording import listed, quoted

Weights = Mapping[str, float]
"""An adapter's weight in each component."""

MAX_WEIGHT = 1000.0


class LoraAdapters:
    """The LoRAs of a model: any number are loaded, some of them active, each with its weight. Methods bear diffusers' names."""

    def __init__(self, nets: Mapping[str, nn.Module], lock: SwapLock) -> None:
        """nets: "unet" and "text_encoder". lock: what those who run the nets hold as well, by `SwapLock.using`."""
        self._nets = dict(nets)
        self._lock = lock
        self._adapters: dict[str, dict[Layer, Delta]] = {}
        self._active: dict[str, Weights] = {}
        self._enabled = True
        self._merged: dict[str, Weights] = {}
        """What the weights hold now: the active ones, or none while they are disabled."""
        self._originals: dict[Layer, Tensor] = {}

    def load_lora_weights(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        allow_pickle: bool = False,
    ) -> str:
        """Load a LoRA, LoHa or LoKr file, of kohya's, diffusers', PEFT's or LyCORIS' kind, and make it the active one, with
        weight 1; `set_adapters` makes several active. → its name: adapter_name, or default_0, default_1, …

        path: the file, or a folder with `weight_name` in it. allow_pickle: also read `.pt` and `.bin` (never code).
        Raises CheckpointError if the file is not fit for this model, and ParameterError for a name that is taken; nothing has
        changed then.
        """
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name):
            raise ParameterError(f"adapter_name: must be a string, not {quoted(adapter_name)}")
        deltas = read_layers(path, self._nets, weight_name, allow_pickle)
        with self._lock.swapping():
            free = (
                name for index in range(len(self._adapters) + 1) if (name := f"default_{index}") not in self._adapters
            )
            name = adapter_name or next(free)
            if name in self._adapters:
                raise ParameterError(f"adapter_name: {quoted(name)} is taken; choose another, or delete that one first")
            self._adapters[name] = {layer: self._on_device(layer, delta) for layer, delta in deltas.items()}
            try:
                self._switch({name: dict.fromkeys(self._nets, 1.0)}, self._enabled)
            except BaseException:
                del self._adapters[name]
                raise
        return name

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] | None = None,
    ) -> None:
        """Make these adapters active, and no others.

        adapter_weights: a number for all, or one for each; in place of a number {"unet": 0.8, "text_encoder": 0.5} gives each
        component its own, where one left out has 1. Default 1; 0 leaves the bits of the weights as they are without it.
        Raises ParameterError for a name that is not loaded and for weights that are no numbers from -1000 to 1000, and
        NumericsError where the sum is beyond the range of the weights' dtype; nothing has changed then.
        """
        names = _names(adapter_names)
        given: Any = adapter_weights
        if not isinstance(given, Sequence) or isinstance(given, str):
            given = [given] * len(names)
        if len(given) != len(names) or len(set(names)) != len(names):
            raise ParameterError(
                f"adapter_weights: {len(given)} weights for {len(set(names))} adapters; give each its own"
            )
        weights = [self._checked_weights(weight) for weight in given]
        with self._lock.swapping():
            self._check_loaded(names)
            self._switch(dict(zip(names, weights, strict=True)), self._enabled)

    def disable_lora(self) -> None:
        """Take the active adapters off, bit by bit, until `enable_lora`."""
        with self._lock.swapping():
            self._switch(self._active, False)

    def enable_lora(self) -> None:
        """Put the active adapters on again."""
        with self._lock.swapping():
            self._switch(self._active, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off and forget them. ParameterError for a name that is not loaded."""
        names = _names(adapter_names)
        with self._lock.swapping():
            self._check_loaded(names)
            self._switch({name: of for name, of in self._active.items() if name not in names}, self._enabled)
            for name in set(names):
                del self._adapters[name]

    def unload_lora_weights(self) -> None:
        """Take all adapters off and forget them: every weight has its first bits again."""
        with self._lock.swapping():
            self._switch({}, True)
            self._adapters.clear()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters that change something in each component."""
        found: dict[str, list[str]] = {}
        for name, deltas in self._adapters.items():
            for component in sorted({component for component, _ in deltas}, reverse=True):
                found.setdefault(component, []).append(name)
        return found

    def get_active_adapters(self) -> list[str]:
        """The names of those that are active, in the order in which they are added up."""
        return list(self._active)

    def _checked_weights(self, given: Any) -> Weights:
        if not isinstance(given, Mapping):
            weight = 1.0 if given is None else number("adapter_weights", given, -MAX_WEIGHT, MAX_WEIGHT)
            return dict.fromkeys(self._nets, weight)
        unknown = given.keys() - self._nets.keys()
        if unknown:
            raise ParameterError(
                f"adapter_weights: {quoted(next(iter(unknown)))} is no component; give {listed(self._nets)} their weights"
            )
        ones = dict.fromkeys(self._nets, 1.0)
        return ones | {key: number("adapter_weights", weight, -MAX_WEIGHT, MAX_WEIGHT) for key, weight in given.items()}

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._adapters:
                loaded = listed(self._adapters) or "none"
                raise ParameterError(f"adapter_names: {quoted(name)} is not loaded; loaded: {loaded}")

    def _on_device(self, layer: Layer, delta: Delta) -> Delta:
        device = self._weight(layer).device
        factors = {part: factor.to(device).contiguous() for part, factor in delta.factors.items()}
        return Delta(delta.formula, factors, delta.scale, delta.shape)

    def _weight(self, layer: Layer) -> Tensor:
        component, name = layer
        return self._nets[component].get_parameter(f"{name}.weight")

    def _switch(self, active: dict[str, Weights], enabled: bool) -> None:
        """Merge what shall be active; if that fails, what was. Within `swapping`."""
        wanted = active if enabled else {}
        try:
            self._merge(wanted)
        except BaseException:
            self._merge(self._merged)
            raise
        self._active, self._enabled, self._merged = active, enabled, wanted

    def _merge(self, active: Mapping[str, Weights]) -> None:
        sums: dict[Layer, list[tuple[Delta, float]]] = {}
        for name, weights in active.items():
            for layer, delta in self._adapters[name].items():
                if delta.scale * weights[layer[0]]:  # adding zero would still turn -0 into 0
                    sums.setdefault(layer, []).append((delta, delta.scale * weights[layer[0]]))
        device = next(self._nets["unet"].parameters()).device
        with torch.inference_mode(False), computing(device, "merging LoRAs"):
            _wait(device)  # for what other streams still read
            for layer in self._originals.keys() - sums.keys():
                self._weight(layer).copy_(self._originals[layer])
                del self._originals[layer]
            peaks = [self._merge_layer(layer, terms) for layer, terms in sums.items()]
            if peaks and not torch.stack(peaks).isfinite().all():
                raise NumericsError(
                    f"adapters {listed(active)}: the merged weights overflow; give them smaller weights"
                )
            _wait(device)

    def _merge_layer(self, layer: Layer, terms: Sequence[tuple[Delta, float]]) -> Tensor:
        """Write W₀ + Σ wᵢ·ΔWᵢ → the largest absolute value written, in fp32."""
        weight = self._weight(layer)
        if layer not in self._originals:
            self._originals[layer] = weight.detach().clone()
        total = self._originals[layer].to(torch.float32, copy=True)
        for delta, scale in terms:
            total.add_(delta.value(), alpha=scale)
        weight.copy_(total)
        return torch.stack(weight.aminmax()).abs().amax().float()


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ParameterError(f"adapter_names: must be a name or a list of names, not {quoted(given)}")
    return list(names)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
