"""Projections into heads, all of one input in one product: x·(w₁; w₂; …)ᵀ + b, laid out as attention reads it.

Reads M·K + N·K and writes M·N elements, N = the heads of all weights together; 2·M·N·K operations. Each head is stored a
multiple of 16 wide, with zeros in what is over (40 in 48): its rows begin aligned, and no load of them needs a mask.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.kernels import gemm
from fastsd.kernels.packing import PackedWeights


def stored_width(width: int) -> int:
    """Columns that a head of this width takes: the next multiple of 16."""
    return -(-width // 16) * 16


def pack(heads: int, *weights: Tensor) -> Tensor:
    """Weights [N·D, K], or biases [N·D], one under the other, each head filled up with zero rows to its stored width."""
    split = [weight.unflatten(0, (heads, -1)) for weight in weights]  # [N, D, K]
    padded = [F.pad(w, (0, 0) * (w.ndim - 2) + (0, stored_width(w.shape[1]) - w.shape[1])) for w in split]
    return torch.cat([w.flatten(0, 1) for w in padded]).contiguous()


def project_heads(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    heads: int,
    config: gemm.Config | None = None,
) -> tuple[Tensor, ...]:
    """x·wᵀ + b in heads, for each weight. x [..., L, K], w [N·D, K], b [N·D] → each [..., L, N, D′], zeros from D on.

    D′ is `stored_width(D)`. The results are views of one buffer. ValueError as in `gemm.linear`, and for weights that differ in
    shape or that the heads do not divide.
    """
    shape = weights[0].shape
    if len(shape) != 2 or any(w.shape != shape for w in weights) or shape[0] % heads:
        raise ValueError(f"weights must all be [N*D, K] with N = {heads}, not {[list(w.shape) for w in weights]}")
    if biases is not None and (len(biases) != len(weights) or any(b.shape != shape[:1] for b in biases)):
        raise ValueError(f"biases must be {len(weights)} of [{shape[0]}], not {[list(b.shape) for b in biases]}")
    w = _packed(heads).get(*weights)
    b = None if biases is None else _packed(heads).get(*biases)
    y = gemm.linear(x, w, b, config=config)  # [..., L, weights·N·D′]
    return y.unflatten(-1, (len(weights), heads, -1)).unbind(-3)


@cache
def _packed(heads: int) -> PackedWeights:
    return PackedWeights(partial(pack, heads))
