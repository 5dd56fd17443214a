"""What an adapter adds to one weight: ΔW from a few small factors, by one of three formulas.

LoRA: Hu et al. 2021, arXiv 2106.09685. LoHa: Hyeon-Woo et al. 2022, arXiv 2108.06098. LoKr: Edalati et al. 2022,
arXiv 2212.10650. The convolutions of all three: Yeh et al. 2024 (LyCORIS), arXiv 2309.14859, whose names the factors bear.

A formula is computed twice: from the factors' shapes when a file is checked, and from the factors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Factors = Mapping[str, Tensor]
Shapes = Mapping[str, Shape]


class Formula(NamedTuple):
    value: Callable[[Factors], Tensor]
    """Factors → ΔW as a matrix [O, I·h·w], or as [O, I, h, w]."""
    shape: Callable[[Shapes], Shape | None]
    """Shapes of factors, 2-D at least → [O, I·h·w]; None where they do not fit together."""


def low_rank(f: Factors) -> Tensor:
    """LoRA: up [O, r] · down [r, I·h·w]; with a middle [r, s, h, w], down is [s, I]."""
    if "mid" in f:
        return tucker(f["mid"], f["up"].flatten(1).T, f["down"].flatten(1))
    return f["up"].flatten(1) @ f["down"].flatten(1)


def low_rank_shape(s: Shapes) -> Shape | None:
    up, down = _flat(s["up"]), _flat(s["down"])
    return _product_shape(up, down) if "mid" not in s else _product_shape(up[::-1], down, s["mid"])


def hadamard(f: Factors) -> Tensor:
    """LoHa: the product, element by element, of two matrices of low rank."""
    first = _product(f["hada_w1_a"], f["hada_w1_b"], f.get("hada_t1"))
    return first * _product(f["hada_w2_a"], f["hada_w2_b"], f.get("hada_t2"))


def hadamard_shape(s: Shapes) -> Shape | None:
    first = _product_shape(s["hada_w1_a"], s["hada_w1_b"], s.get("hada_t1"))
    return first if first == _product_shape(s["hada_w2_a"], s["hada_w2_b"], s.get("hada_t2")) else None


def kronecker(f: Factors) -> Tensor:
    """LoKr: w1 [a, b] ⊗ w2 [c, d·h·w], each whole or of low rank → [a·c, b·d·h·w]."""
    w1 = f["lokr_w1"] if "lokr_w1" in f else _product(f["lokr_w1_a"], f["lokr_w1_b"])
    w2 = f["lokr_w2"] if "lokr_w2" in f else _product(f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2"))
    return (w1[:, None, :, None] * w2.flatten(1)[None, :, None]).flatten(2).flatten(0, 1)


def kronecker_shape(s: Shapes) -> Shape | None:
    w1 = s["lokr_w1"] if "lokr_w1" in s else _product_shape(s["lokr_w1_a"], s["lokr_w1_b"])
    w2 = s["lokr_w2"] if "lokr_w2" in s else _product_shape(s["lokr_w2_a"], s["lokr_w2_b"], s.get("lokr_t2"))
    return None if w1 is None or w2 is None or len(w1) != 2 else (w1[0] * w2[0], w1[1] * math.prod(w2[1:]))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution's weight from core [r, s, h, w], a [r, O], b [s, I] → [O, I, h, w].

    The smaller of the two intermediates is formed, sqrt(O·s · r·I) · h·w at most: never more than the core or the weight has,
    whatever the ranks.
    """
    if a.shape[1] * b.shape[0] <= a.shape[0] * b.shape[1]:
        return torch.einsum("oshw,si->oihw", torch.einsum("rshw,ro->oshw", core, a), b)
    return torch.einsum("rihw,ro->oihw", torch.einsum("rshw,si->rihw", core, b), a)


def _product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a [O, r] · b [r, I·h·w]; with a core as `tucker`."""
    return a @ b if core is None else tucker(core, a, b)


def _product_shape(a: Shape, b: Shape, core: Shape | None = None) -> Shape | None:
    if len(a) != 2 or len(b) != 2:
        return None
    if core is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    return (a[1], b[1] * math.prod(core[2:])) if len(core) == 4 and core[:2] == (a[0], b[0]) else None


def _flat(shape: Shape) -> Shape:
    return shape[0], math.prod(shape[1:])


_LORA = Formula(low_rank, low_rank_shape)
_LOHA = Formula(hadamard, hadamard_shape)
_LOKR = Formula(kronecker, kronecker_shape)
_LOHA_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOKR_1 = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_2 = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})

FORMULAS: dict[frozenset[str], Formula] = {
    frozenset({"up", "down"}): _LORA,
    frozenset({"up", "down", "mid"}): _LORA,
    _LOHA_FACTORS: _LOHA,
    _LOHA_FACTORS | {"hada_t1", "hada_t2"}: _LOHA,
    **{frozenset(first | second): _LOKR for first, second in product(_LOKR_1, _LOKR_2)},
}
"""Which formula the factors of a layer stand for."""

_OF_RANK = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def rank_of(factors: Factors) -> int | None:
    """The rank that alpha is divided by; None where no factor is of low rank, and alpha means nothing."""
    return next((factors[name].shape[0] for name in _OF_RANK if name in factors), None)


@dataclass(frozen=True, eq=False)
class Delta:
    """scale · formula(factors), for a weight of `shape`."""

    formula: Formula
    factors: dict[str, Tensor]
    scale: float
    shape: Shape
    bound: float = math.inf
    """No element of formula(factors) is larger; see `bound_of`."""

    def value(self) -> Tensor:
        """formula(factors) in fp32, without the scale."""
        return self.formula.value({name: factor.float() for name, factor in self.factors.items()}).reshape(self.shape)

    @property
    def is_product(self) -> bool:
        """Whether it is one product of two matrices: a LoRA without a middle."""
        return self.factors.keys() == {"up", "down"}

    def add_to(self, total: Tensor, scale: float, part: slice) -> None:
        """total += scale·ΔW[part], in place; total: some rows of [O, K], fp32, as `rows` lays them out."""
        if self.is_product:
            total.addmm_(self.factors["up"][part], rows(self.factors["down"]), alpha=scale)
        else:
            total.add_(rows(channels_last(self.value()))[part], alpha=scale)

    def on(self, device: torch.device) -> "Delta":
        """With its factors there, and as `add_to` reads them."""
        factors = {part: factor.to(device).contiguous() for part, factor in self.factors.items()}
        if self.is_product:
            down = factors["down"].float().reshape(-1, *self.shape[1:])
            factors = {"up": factors["up"].float().flatten(1), "down": channels_last(down)}
        return replace(self, factors=factors)


def rows(weight: Tensor) -> Tensor:
    """A weight [O, I] or, lying channels last, [O, I, h, w] as a matrix [O, K], K = I or h·w·I: a view of it."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).view(len(weight), -1)


def channels_last(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.contiguous(memory_format=torch.channels_last)


def bound_of(factors: Factors) -> float:
    """What no element of ΔW exceeds, by the largest of each factor; infinite for all but a LoRA without a middle."""
    if factors.keys() != {"up", "down"}:
        return math.inf
    up, down = (float(factors[name].double().abs().max()) for name in ("up", "down"))
    return up * down * factors["down"].shape[0]
