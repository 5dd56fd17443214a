"""Which kernels a call of an op launches, planned from the tensors' shapes alone: to compile them where no GPU is.

What an op's wrapper in `fastsd.kernels` runs, `plan` lists; tensors are on meta. `planning` is a set of ops that plans every
call as `backends.triton_ops` runs it, tuned configs and all.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsd.kernels import (
    conv2d,
    conv2d_norm,
    flash_attn,
    geglu,
    gemm,
    groupnorm_silu,
    layernorm,
    sampler_step,
    tuned,
)
from fastsd.kernels.heads import pack as pack_heads
from fastsd.kernels.heads import stored_width
from fastsd.kernels.launch import BUILD_ERRORS as BUILD_ERRORS
from fastsd.kernels.launch import SHARED_MEMORY, Launch
from fastsd.kernels.launch import arch_of as arch_of
from fastsd.ops import REFERENCE, Ops, StepRow, Wrap
from fastsd.tracing import around, replaced, signature


def plan_linear(
    arch: int,
    config: Any,
    result: Tensor,
    /,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> list[Launch]:
    return gemm.plan_linear(x, w, b, residual, activation, result, arch, config)


def plan_geglu(arch: int, config: Any, result: Tensor, /, x: Tensor, w: Tensor, b: Tensor) -> list[Launch]:
    return geglu.plan_geglu(x, geglu.pack(w), geglu.pack(b), result, arch, config)


def plan_attention(
    arch: int,
    config: Any,
    result: Tensor,
    /,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    head_dim: int | None = None,
) -> list[Launch]:
    return flash_attn.plan_attention(q, k, v, mask, causal, result, config, SHARED_MEMORY[arch], head_dim)


def plan_layer_norm(
    arch: int, config: Any, result: Tensor, /, x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5
) -> list[Launch]:
    return layernorm.plan_layer_norm(x, w, b, eps, result, config)


def plan_group_norm(
    arch: int,
    config: Any,
    result: Tensor,
    /,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
) -> list[Launch]:
    return groupnorm_silu.plan_group_norm(x, w, b, groups, eps, silu, skip, result, config)


def plan_conv2d(
    arch: int,
    config: Any,
    result: Tensor,
    /,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: int = 1,
    pad: Any = (0, 0, 0, 0),
    *,
    wrap: Wrap = (False, False),
    **epilogue: Any,
) -> list[Launch]:
    added = conv2d.Epilogue(b, **epilogue)
    return conv2d.plan_conv2d(x, conv2d.pack(w), stride, pad, added, result, arch, config, wrap)


def plan_conv2d_norm(
    arch: int, config: Any, result: Tensor, /, x: Tensor, w: Tensor, channel_bias: Tensor | None = None, **rest: Any
) -> list[Launch]:
    packed = conv2d.pack(w)
    return conv2d_norm.plan_conv2d_norm(
        x, packed, channel_bias=channel_bias, **rest, out=result, arch=arch, config=config
    )


def plan_upsample_conv2d(
    arch: int,
    config: Any,
    result: Tensor,
    /,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    size: tuple[int, int] | None = None,
    wrap: Wrap = (False, False),
) -> list[Launch]:
    twice = (2 * x.shape[1], 2 * x.shape[2])
    packed = (conv2d.pack_phases if size is None or tuple(size) == twice else conv2d.pack)(w)
    return conv2d.plan_upsample_conv2d(x, packed, b, result, arch, config, wrap)


def plan_step_input(
    arch: int,
    config: Any,
    result: tuple[Tensor, Tensor],
    /,
    state: Tensor,
    weights: Tensor,
    time_bias: Tensor,
    time_rows: Tensor,
    counter: Tensor,
    copies: int = 1,
) -> list[Launch]:
    return sampler_step.plan_step_input(state, weights, time_bias, time_rows, counter, *result, config)


def plan_sampler_step(
    arch: int,
    config: Any,
    result: Tensor,
    /,
    state: Tensor,
    out: Tensor,
    noise: Tensor | None,
    row: StepRow,
    new: Tensor | None = None,
) -> list[Launch]:
    if row.rescale is not None:
        return []
    table = row.update if row.counter is not None else row.update[None].contiguous()
    counter = torch.empty(2 + state.shape[1], dtype=torch.int32, device=state.device)
    return sampler_step.plan_sampler_step(state, out, noise, table, row.guidance, counter, result, config)


def plan_project_heads(
    arch: int, config: Any, result: Tensor, /, x: Tensor, weights: Any, biases: Any = None, *, heads: int
) -> list[Launch]:
    w, b = pack_heads(heads, *weights), None if biases is None else pack_heads(heads, *biases)
    return gemm.plan_linear(x, w, b, None, None, result, arch, config)


PLANS: dict[str, tuple[Callable[..., list[Launch]], Callable[..., Any]]] = {
    "linear": (plan_linear, gemm.Config),
    "geglu": (plan_geglu, gemm.Config),
    "project_heads": (plan_project_heads, gemm.Config),
    "attention": (plan_attention, flash_attn.Config),
    "layer_norm": (plan_layer_norm, layernorm.Config),
    "group_norm": (plan_group_norm, groupnorm_silu.Config),
    "conv2d": (plan_conv2d, gemm.Config),
    "conv2d_norm": (plan_conv2d_norm, gemm.Config),
    "upsample_conv2d": (plan_upsample_conv2d, gemm.Config),
    "step_input": (plan_step_input, sampler_step.Config),
    "sampler_step": (plan_sampler_step, sampler_step.Config),
}
"""For each op its launches into a result, and the type of its tuned configs."""


def plan(op: str, arch: int, arguments: Mapping[str, Any], config: Any = None) -> tuple[list[Launch], Any]:
    """The launches of a call on a compute capability, and the result that they fill. Arguments by name, tensors on meta."""
    launches = partial(PLANS[op][0], arch, config)
    if op == "project_heads":
        x, weights, heads = arguments["x"], arguments["weights"], arguments["heads"]
        width = stored_width(weights[0].shape[0] // heads)
        result = torch.empty((*x.shape[:-1], len(weights) * heads * width), dtype=x.dtype, device=x.device)
        return launches(result, **arguments), result.unflatten(-1, (len(weights), heads, width)).unbind(-3)
    like = getattr(REFERENCE, op)(**arguments)
    result = replaced(like, Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return launches(result, **arguments), result


def planning(arch: int, keep: Callable[[Launch], object]) -> Ops:
    """Ops for nets on meta: every launch that a call makes on this compute capability is handed to `keep`."""

    def call(op: str, library: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        config = tuned.choose(arch, op, *arguments, **options)
        if config == tuned.LIBRARY:
            return library(*arguments, **options)
        config = None if config is None else PLANS[op][1](*config)
        named = signature(op).bind(*arguments, **options).arguments
        if op != "attention":  # which takes any strides
            first = next(iter(named))
            named[first] = named[first].contiguous()
        launches, result = plan(op, arch, named, config)
        for launch in launches:
            keep(launch)
        return result

    return around(REFERENCE, "planning", call)


def identity(launch: Launch) -> tuple[Any, ...]:
    """What decides the compiled code."""
    source = launch.source()
    types = tuple(sorted(source.signature.items()))
    aligned = tuple(sorted(source.attrs))
    constants = tuple(sorted((name, str(value)) for name, value in launch.constants.items()))
    return launch.kernel.__name__, types, aligned, constants, launch.num_warps, launch.num_stages
