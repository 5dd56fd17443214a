"""Convolutions and linears on x86 CPUs through oneDNN, with weights packed once instead of at every call.

PyTorch hands oneDNN the checkpoint-shaped weight, and oneDNN reorders it into its blocked layout each time: for the 1280-wide
3×3 convolutions at 8×8 and 4×4 pixels that takes three to ten times as long as the arithmetic. And on AMD CPUs PyTorch's fp32
GEMM runs at under half the rate of oneDNN's 1×1 convolution, which computes the same sums. The figures are in bench/results/.

A packed weight takes as much memory again as the weight. It is made for the size of input that it meets (oneDNN chooses the
layout by it), and made again when the weight has changed. The copies are kept beside the weights, in this module, for all nets
of the process, and go when their weights go.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Geometry = tuple[tuple[int, ...], int, tuple[int, int]]
"""(input shape NCHW, stride, (vertical, horizontal) padding)."""
GEOMETRIES = 2
"""Packed copies kept of a weight: two sizes of picture may take turns, or guidance be on and off, without packing anew."""


def available() -> bool:
    """Whether this PyTorch and this CPU can run these ops."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def supports(x: Tensor, w: Tensor) -> bool:
    """fp32, and bf16 where the CPU multiplies it; on the CPU; not for training, since there is no backward.

    Nor weights made in inference mode: they do not count their changes, so a packed copy could be out of date.
    """
    bf16 = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    trained = torch.is_grad_enabled() and (w.requires_grad or x.requires_grad)
    runs = x.device.type == "cpu" and x.dtype == w.dtype and (x.dtype == torch.float32 or bf16)
    return runs and not trained and not w.is_inference()


def pays(x: Tensor, w: Tensor) -> bool:
    """Whether a linear is large enough that oneDNN's rate makes up for its 30 µs a call: from 4 million multiply-adds on."""
    return x.numel() * w.shape[0] >= 4_000_000


def conv2d(
    x: Tensor, w: Tensor, b: Tensor | None, stride: int = 1, pad: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Tensor:
    """x [B, H, W, C], w [O, C, R, R], b [O] → [B, H', W', O]; pad (left, right, top, bottom)."""
    x, (left, right, top, bottom) = x.permute(0, 3, 1, 2), pad
    if (left, top) != (right, bottom):
        x, left, top = F.pad(x, pad), 0, 0
    return _convolve(x, w, b, stride, (top, left)).permute(0, 2, 3, 1)


def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x·wᵀ + b as a 1×1 convolution of a one-pixel-wide image. x [..., K], w [N, K], b [N] → [..., N]."""
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, K, M, 1], channels_last
    y = _convolve(image, w, b, 1, (0, 0))
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], w.shape[0])


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, stride: int, pad: tuple[int, int]) -> Tensor:
    packed = _weights.get(w, (tuple(x.shape), stride, pad))
    # The arguments after stride: dilation, groups, and no fused activation.
    return torch.ops.mkldnn._convolution_pointwise.default(
        x, packed, b, pad, (stride, stride), (1, 1), 1, "none", [], ""
    )


class _Packed(NamedTuple):
    weight: Tensor
    version: tuple[int, int]


class _PackedWeights:
    """The packed copies of each live weight, for the geometries it last met. Threads may share it."""

    def __init__(self) -> None:
        self._packed = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def get(self, w: Tensor, geometry: Geometry) -> Tensor:
        version = (w.data_ptr(), w._version)
        with self._lock:
            copies: OrderedDict[Geometry, _Packed] = self._packed.setdefault(w, OrderedDict())
            packed = copies.get(geometry)
            if packed is None or packed.version != version:
                packed = copies[geometry] = _Packed(_pack(w, geometry), version)
            copies.move_to_end(geometry)
            if len(copies) > GEOMETRIES:
                copies.popitem(last=False)
            return packed.weight


def _pack(w: Tensor, geometry: Geometry) -> Tensor:
    """The checkpoint-shaped weight [O, C, R, R] or [N, K] in the layout oneDNN wants for this geometry."""
    shape, stride, pad = geometry
    w = w.detach()
    w = w[:, :, None, None] if w.ndim == 2 else w
    reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
    return reorder(w.to_mkldnn(), pad, (stride, stride), (1, 1), 1, shape)


_weights = _PackedWeights()
