"""How each op is run by its kernel and by PyTorch, drawn for, tuned and judged; for `bench.kernels` and the device's tests."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.shapes import Call, replaced
from fastsd import backends
from fastsd.kernels import conv2d, conv2d_norm, flash_attn, geglu, gemm, groupnorm_silu, heads, layernorm, sampler_step
from fastsd.kernels.heads import stored_width
from fastsd.kernels.launch import BUILD_ERRORS, shared_memory
from fastsd.ops import REFERENCE
from fastsd.verify import relative
from tests.tolerances import OPS


class Kernel(NamedTuple):
    """How an op is run by a kernel, and tuned."""

    run: Callable[..., Any]  # (the op's arguments by name, config)
    config: Callable[..., Any]  # from the fields of a tuned entry
    candidates: Callable[..., list[Any]]  # (compute capability, the op's arguments by name, tensors on meta)


def rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def conv_candidates(
    arch: int, x: Tensor, w: Tensor, b: Any = None, stride: int = 1, pad: Any = (0, 0, 0, 0), **epilogue: Any
) -> list[gemm.Config]:
    height = (x.shape[1] + pad[2] + pad[3] - w.shape[2]) // stride + 1
    width = (x.shape[2] + pad[0] + pad[1] - w.shape[3]) // stride + 1
    n, c = w.shape[:2]
    return conv2d.candidates(x.shape[0] * height * width, n, c, w.shape[2] * w.shape[3], 1, x.dtype, arch)


KERNELS = {
    "linear": Kernel(
        gemm.linear,
        gemm.Config,
        lambda arch, x, w, b=None, residual=None, activation=None: gemm.candidates(
            rows(x), *w.shape, x.dtype, arch, residual is not None, activation
        ),
    ),
    "geglu": Kernel(
        geglu.geglu, gemm.Config, lambda arch, x, w, b: geglu.candidates(rows(x), w.shape[0], x.dtype, arch)
    ),
    "attention": Kernel(
        flash_attn.attention,
        flash_attn.Config,
        lambda arch, q, k, v, mask=None, causal=False, head_dim=None: flash_attn.candidates(
            q.shape[1], k.shape[1], q.shape[3], q.dtype, shared_memory(arch)
        ),
    ),
    "layer_norm": Kernel(
        layernorm.layer_norm,
        layernorm.Config,
        lambda arch, x, w, b, eps=1e-5: layernorm.candidates(rows(x), x.shape[-1]),
    ),
    "group_norm": Kernel(
        groupnorm_silu.group_norm,
        groupnorm_silu.Config,
        lambda arch, x, w, b, groups, eps, silu=False, skip=None: groupnorm_silu.candidates(
            x.shape[0], x[0, ..., 0].numel(), x.shape[-1], groups, 0 if skip is None else skip.shape[-1]
        ),
    ),
    "project_heads": Kernel(
        heads.project_heads,
        gemm.Config,
        lambda arch, x, weights, biases=None, heads=1: gemm.candidates(
            rows(x),
            len(weights) * heads * stored_width(weights[0].shape[0] // heads),
            x.shape[-1],
            x.dtype,
            arch,
            False,
            None,
        ),
    ),
    "conv2d": Kernel(conv2d.conv2d, gemm.Config, conv_candidates),
    "conv2d_norm": Kernel(
        conv2d_norm.conv2d_norm,
        gemm.Config,
        lambda arch, x, w, b, **rest: conv_candidates(arch, x, w, b, pad=(1, 1, 1, 1)),
    ),
    "upsample_conv2d": Kernel(
        conv2d.upsample_conv2d,
        gemm.Config,
        lambda arch, x, w, b, size=None: conv2d.candidates(rows(x), *w.shape[:2], 4, 4, x.dtype, arch),
    ),
    "step_input": Kernel(
        sampler_step.step_input,
        sampler_step.Config,
        lambda arch, state, **rest: sampler_step.candidates(state[0, 0].numel()),
    ),
    "sampler_step": Kernel(
        backends.sampler_step,
        sampler_step.Config,
        lambda arch, state, **rest: sampler_step.candidates(state[0, 0].numel()),
    ),
}


def draw(call: Call, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Random arguments by name, the same for the same call: activations of unit size, weights that keep them there."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(argument: str, name: str, value: Any) -> Any:
        if isinstance(value, torch.Size):
            if name in ("counter", "time_rows"):
                return torch.zeros(value, dtype=torch.int32, device=device)
            x = torch.randn(value, generator=generator, device=device)
            if name in ("w", "weights", "norm_w"):
                x = 1 + 0.1 * x if len(value) == 1 else x * value[1:].numel() ** -0.5
            return x.to(call.dtype_of(argument, dtype))
        if hasattr(value, "_fields"):
            return type(value)(**{key: drawn(argument, key, item) for key, item in value._asdict().items()})
        return tuple(drawn(argument, name, item) for item in value) if isinstance(value, tuple) else value

    arguments = {name: drawn(name, name, value) for name, value in call.named().items()}
    if call.op == "attention":
        for name in ("q", "k", "v"):  # as heads are stored
            arguments[name][..., arguments.get("head_dim", arguments[name].shape[-1]) :] = 0
    return arguments


def library(op: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """The reference op, with convolutions' weights in the layout that cuDNN wants beside NHWC images."""

    def laid(w: Tensor) -> Tensor:
        return w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w

    arguments = {name: laid(value) if name == "w" else value for name, value in arguments.items()}
    if "shortcut" in arguments:
        arguments["shortcut"] = arguments["shortcut"]._replace(w=laid(arguments["shortcut"].w))
    return partial(getattr(REFERENCE, op), **arguments)


def truth_of(op: str, arguments: dict[str, Any]) -> Any:
    """The reference op in fp64."""

    def widened(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    wide = {name: replaced(value, Tensor, widened) for name, value in arguments.items()}
    return getattr(REFERENCE, op)(**wide)


def fault(op: str, run: Callable[[], Any], truth: Any, plain: Any) -> str | None:
    """What is wrong with a kernel: it does not build, or errs beyond the op's gate, or over twice as much as plain PyTorch."""
    try:
        result = run()
    except BUILD_ERRORS as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    dtype = (result if isinstance(result, Tensor) else result[0]).dtype
    error, limit = relative(result, truth), min(OPS[gate_of(op)][dtype], 2 * relative(plain, truth) + 1e-6)
    return None if error <= limit else f"relative L2 error {error:.1e}, {limit:.1e} allowed"


def gate_of(op: str) -> str:
    """The op whose gate it has."""
    return {"project_heads": "linear", "upsample_conv2d": "conv2d"}.get(op, op)
