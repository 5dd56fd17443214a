"""LoRAs that are loaded, and those of them that are merged into the weights: a step costs what it costs without them.

How they are merged, and taken off to the last bit, is in `merging`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastsd.adapters.block_weights import PARTS, Weight, by_block, checked, weight_of
from fastsd.adapters.deltas import Delta
from fastsd.adapters.lora_keys import Layer
from fastsd.adapters.lora_layers import read_lora
from fastsd.adapters.merging import MergedWeights, Terms
from fastsd.adapters.swap_lock import SwapLock
from fastsd.device import computing
from fastsd.errors import NumericsError, ParameterError
from fastsd.prompt_tags import tag_name
from fastsd.wording import listed, quoted

Weights = Mapping[str, Weight]
"""An adapter's weight in each component."""


class UsedLora(NamedTuple):
    """A LoRA that is merged in, as a picture's parameters name it."""

    name: str
    """See `fastsd.prompt_tags.tag_name`; two may have one."""
    sha256: str
    """As `fastsd.checkpoints.lora.read_hashed` takes it."""
    text_encoder: float
    unet: float | None
    """Their weights; None where the blocks of the UNet differ."""


class LoraAdapters:
    """The LoRAs of a model: any number are loaded, some of them active, each with its weight. Methods bear diffusers' names."""

    def __init__(self, nets: Mapping[str, nn.Module], lock: SwapLock) -> None:
        """nets: "unet" and "text_encoder". lock: what those who run the nets hold as well, by `SwapLock.using`."""
        self._nets = dict(nets)
        self._lock = lock
        self._adapters: dict[str, dict[Layer, Delta]] = {}
        self._files: dict[str, tuple[str, str]] = {}
        """An adapter's file: what a tag calls it, its hash."""
        self._active: dict[str, Weights] = {}
        self._enabled = True
        self._merged: dict[str, Weights] = {}
        """What the weights hold now: the active ones, or none while they are disabled."""
        self._weights = MergedWeights(nets)

    def load_lora_weights(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> str:
        """Load a LoRA, LoHa or LoKr file, of kohya's, diffusers', PEFT's or LyCORIS' kind, and make it the active one, with
        weight 1; `set_adapters` makes several active. → its name: adapter_name, or default_0, default_1, …

        path: the file, or a folder or a repository of the Hugging Face Hub (`owner/name`) with `weight_name` in it. allow_pickle:
        also read `.pt` and `.bin` (never code). hub: revision, token, cache_dir, local_files_only, as huggingface_hub takes them.
        Raises CheckpointError (HubError for the Hub) if the file is not fit for this model, and ParameterError for a name that
        is taken; nothing has changed then.
        """
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name):
            raise ParameterError(f"adapter_name: must be a string, not {quoted(adapter_name)}")
        file = read_lora(path, self._nets, weight_name, allow_pickle, **hub)
        place = Path(os.path.abspath(path))  # a file, a folder, or as if it were one: a repository
        with self._lock.swapping():
            free = (
                name for index in range(len(self._adapters) + 1) if (name := f"default_{index}") not in self._adapters
            )
            name = adapter_name or next(free)
            if name in self._adapters:
                raise ParameterError(f"adapter_name: {quoted(name)} is taken; choose another, or delete that one first")
            self._adapters[name] = {layer: delta.on(self._device) for layer, delta in file.layers.items()}
            self._files[name] = tag_name(file.name, (place.parent if place.is_file() else place).name), file.sha256
            try:
                self._switch({name: dict.fromkeys(self._nets, 1.0)}, self._enabled)
            except BaseException:
                self._forget([name])
                raise
        return name

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, Any] | Sequence[float | Mapping[str, Any]] | None = None,
    ) -> None:
        """Make these adapters active, and no others.

        adapter_weights: a number for all, or one for each; in place of a number {"unet": 0.8, "text_encoder": 0.5} gives each
        component its own, where one left out has 1, and {"down": 0.5, "mid": 1, "up": {"block_1": [1, 0, 0.5]}} in place of the
        UNet's, or of both, its attentions theirs: see `block_weights.by_block`. Default 1; 0 leaves the bits of the weights
        as they are without it.
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
            self._forget(names)

    def unload_lora_weights(self) -> None:
        """Take all adapters off and forget them: every weight has its first bits again."""
        with self._lock.swapping():
            self._switch({}, True)
            self._forget(list(self._adapters))

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

    def used(self) -> list[UsedLora]:
        """Those that are merged in now, in the order of `get_active_adapters`; none while they are disabled."""
        found = []
        for name, weights in self._merged.items():
            unet, text_encoder = weights["unet"], weights["text_encoder"]
            assert not isinstance(text_encoder, Mapping)
            found.append(UsedLora(*self._files[name], text_encoder, None if isinstance(unet, Mapping) else unet))
        return found

    def _checked_weights(self, given: Any) -> Weights:
        if not isinstance(given, Mapping):
            return dict.fromkeys(self._nets, checked(given))
        if given and given.keys() <= set(PARTS):
            given = {"unet": given}
        unknown = given.keys() - self._nets.keys()
        if unknown:
            raise ParameterError(
                f"adapter_weights: {quoted(next(iter(unknown)))} is no component; give {listed(self._nets)} their weights"
            )
        names = [name for name, _ in self._nets["unet"].named_modules()]
        return {
            net: by_block(weight, names) if net == "unet" and isinstance(weight, Mapping) else checked(weight)
            for net, weight in ((net, given.get(net)) for net in self._nets)
        }

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._adapters:
                loaded = listed(self._adapters) or "none"
                raise ParameterError(f"adapter_names: {quoted(name)} is not loaded; loaded: {loaded}")

    @property
    def _device(self) -> torch.device:
        return next(self._nets["unet"].parameters()).device

    def _forget(self, names: Sequence[str]) -> None:
        """Those that are not merged in; what was kept for their sake goes too."""
        for name in set(names):
            del self._adapters[name], self._files[name]
        self._merge(self._merged)

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
        sums: dict[Layer, Terms] = {}
        for name, weights in active.items():
            for layer, delta in self._adapters[name].items():
                scale = delta.scale * weight_of(weights[layer[0]], layer[1])
                if scale:  # adding zero would still turn -0 into 0
                    sums[layer] = (*sums.get(layer, ()), (delta, scale))
        keep = {layer for deltas in self._adapters.values() for layer in deltas}
        device = self._device
        with torch.inference_mode(False), computing(device, "merging LoRAs"):
            _wait(device)  # for what other streams still read
            if not self._weights.merge(sums, keep):
                raise NumericsError(
                    f"adapters {listed(active)}: the merged weights overflow; give them smaller weights"
                )
            _wait(device)


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ParameterError(f"adapter_names: must be a name or a list of names, not {quoted(given)}")
    return list(names)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
