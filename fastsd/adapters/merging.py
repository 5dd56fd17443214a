"""Weights with adapters merged in: W ← W₀ + Σ sᵢ·ΔWᵢ, and back to W₀ bit by bit.

The sum is computed in fp32, term by term, and rounded once, to the weight's dtype; a plain LoRA's product is added as it is
formed. W₀ is kept of every layer that a loaded adapter changes, so a switch reads W₀ and the factors, writes W, and leaves alone
the layers whose sum stays what it is.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsd.adapters.deltas import Delta, rows
from fastsd.adapters.lora_keys import Layer

Terms = tuple[tuple[Delta, float], ...]
"""What is added to a layer: each ΔW with its factor s."""

CHUNK = 1 << 22
"""Elements of a weight that are widened to fp32 at a time: 16 MiB, which allocators do not give back each time."""


@dataclass
class _Kept:
    original: Tensor
    """W₀."""
    peak: float
    """The largest |W₀|."""
    version: int
    """The weight's count of changes when it was last written here."""
    terms: Terms | None = ()
    """What is merged in; None while it is being written."""


class MergedWeights:
    """The weights of some nets, written where they lie: packed copies and captured graphs follow."""

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        self._modules = {(net, name): module for net in nets for name, module in nets[net].named_modules()}
        self._kept: dict[Layer, _Kept] = {}

    def weight(self, layer: Layer) -> Tensor:
        """As it is now."""
        weight = self._modules[layer].weight
        assert isinstance(weight, Tensor)
        return weight

    def merge(self, sums: Mapping[Layer, Terms], keep: Collection[Layer]) -> bool:
        """Write these sums, and every other layer's first bits. → whether all is within the range of the weights' dtype.

        keep: the layers whose W₀ is kept. To be called without gradients, outside inference mode, by one thread at a time.
        """
        self._keep(sums.keys())
        doubtful = []
        for layer, kept in self._kept.items():
            weight, terms = self.weight(layer), sums.get(layer, ())
            if terms == kept.terms and weight._version == kept.version:
                continue
            kept.terms = None
            write(weight, kept.original, terms)
            kept.terms, kept.version = terms, weight._version
            reach = kept.peak + sum(abs(scale) * delta.bound for delta, scale in terms)
            if terms and not reach < torch.finfo(weight.dtype).max:
                doubtful.append(torch.stack(weight.aminmax()))
        self._kept = {layer: kept for layer, kept in self._kept.items() if layer in keep}
        return not doubtful or bool(torch.stack(doubtful).isfinite().all())

    def _keep(self, layers: Collection[Layer]) -> None:
        """Have W₀ of these: a copy of what nothing is merged into."""
        found = {}
        for layer in layers:
            kept = self._kept.get(layer)
            changed_by_others = kept and kept.terms == () and kept.version != self.weight(layer)._version
            if kept is None or changed_by_others:
                found[layer] = self.weight(layer).detach().clone()
        if not found:
            return
        peaks = torch.stack([torch.stack(original.aminmax()).abs().amax().float() for original in found.values()])
        for (layer, original), peak in zip(found.items(), peaks.tolist(), strict=True):
            self._kept[layer] = _Kept(original, peak, self.weight(layer)._version)


def write(weight: Tensor, original: Tensor, terms: Terms) -> None:
    """weight ← original + Σ s·ΔW, in fp32, rounded once to the weight's dtype; without terms its very bits."""
    if not terms:
        weight.copy_(original)
        return
    matrix, kept = rows(weight), rows(original)  # [O, K]
    single = weight.dtype == torch.float32
    whole = single or kept.numel() <= CHUNK or not all(delta.is_product for delta, _ in terms)
    step = len(kept) if whole else max(1, CHUNK // kept.shape[1])
    for start in range(0, len(kept), step):
        part = slice(start, start + step)
        total = matrix[part].copy_(kept[part]) if single else kept[part].float()
        for delta, scale in terms:
            delta.add_to(total, scale, part)
        if not single:
            matrix[part].copy_(total)
