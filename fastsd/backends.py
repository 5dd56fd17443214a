"""The op sets: plain PyTorch, oneDNN's packed weights on CPUs, fastsd's Triton kernels on GPUs; and which a device gets."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd import ops
from fastsd.checks import choice
from fastsd.errors import ParameterError
from fastsd.kernels import onednn, packing
from fastsd.ops import REFERENCE, Ops, StepRow

BACKENDS = ("auto", "triton", "onednn", "reference")


def select_ops(backend: str | Ops, device: torch.device) -> Ops:
    """The ops of a backend. "auto": the fastest that is proven for the device. Ops are their own.

    ParameterError for one that is unknown, or that this machine cannot run.
    """
    if isinstance(backend, Ops):
        return backend
    choice("backend", backend, BACKENDS)
    packed = device.type == "cpu" and onednn.available()
    if backend == "triton" and not runs_triton(device):
        raise ParameterError(
            f"backend: triton needs Triton and a CUDA GPU, not {device.type}; choose auto or reference"
        )
    if backend == "onednn" and not packed:
        raise ParameterError("backend: onednn needs the CPU and a PyTorch built with oneDNN; choose auto or reference")
    if backend == "triton" or (backend == "auto" and is_tuned(device)):
        return triton_ops()
    return onednn_ops() if packed and backend != "reference" else REFERENCE


def refresh_weights() -> None:
    """Bring the packed copies of weights that have changed up to date, in place, for graphs that read them."""
    packing.refresh_all()


def runs_triton(device: torch.device) -> bool:
    """On a CUDA GPU; on the CPU only under TRITON_INTERPRET=1, which is for tests."""
    if find_spec("triton") is None:
        return False
    from fastsd.kernels import launch

    return launch.runs_on(device)


def is_tuned(device: torch.device) -> bool:
    """Whether the kernels were measured against PyTorch's libraries on GPUs of this kind."""
    if device.type != "cuda" or not runs_triton(device):
        return False
    from fastsd.kernels import launch, tuned

    return tuned.has(launch.arch_of(device))


def onednn_ops() -> Ops:
    """The reference with oneDNN's packed GEMMs and convolutions in it: for CPUs. See `kernels/onednn.py`."""

    # fp16, and bf16 on CPUs that cannot multiply it, stay with PyTorch: oneDNN would have no faster way for them.
    def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return onednn.affine(x, w, b) if onednn.supports(x, w) and onednn.pays(x, w) else F.linear(x, w, b)

    def convolve_packed(x: Tensor, w: Tensor, b: Tensor | None, stride: int, pad: ops.Pad) -> Tensor:
        return onednn.conv2d(x, w, b, stride, pad) if onednn.supports(x, w) else ops.convolve(x, w, b, stride, pad)

    return replace(
        REFERENCE,
        name="onednn",
        linear=partial(ops.linear, affine=affine),
        geglu=partial(ops.geglu, affine=affine),
        project_heads=partial(ops.project_heads, affine=affine),
        conv2d=partial(ops.conv2d, convolve=convolve_packed),
        conv2d_norm=partial(ops.conv2d_norm, convolve=convolve_packed),
        upsample_conv2d=partial(ops.upsample_conv2d, convolve=convolve_packed),
    )


def triton_ops() -> Ops:
    """fastsd's own kernels. Inference only: ValueError where a gradient is asked for.

    Shapes that `bench.kernels --tune` found faster in cuBLAS, cuDNN or SDPA go there: see `kernels/configs`.
    """
    from fastsd.kernels import conv2d, conv2d_norm, flash_attn, geglu, gemm, groupnorm_silu, heads, layernorm
    from fastsd.kernels import sampler_step as steps

    return Ops(
        name="triton",
        linear=_tuned("linear", gemm.linear, gemm.Config),
        geglu=_tuned("geglu", geglu.geglu, gemm.Config),
        project_heads=_tuned("project_heads", heads.project_heads, gemm.Config),
        attention=_tuned("attention", flash_attn.attention, flash_attn.Config, strided=True),
        layer_norm=_tuned("layer_norm", layernorm.layer_norm, layernorm.Config),
        group_norm=_tuned("group_norm", groupnorm_silu.group_norm, groupnorm_silu.Config),
        conv2d=_tuned("conv2d", conv2d.conv2d, gemm.Config),
        conv2d_norm=_tuned("conv2d_norm", conv2d_norm.conv2d_norm, gemm.Config),
        upsample_conv2d=_tuned("upsample_conv2d", conv2d.upsample_conv2d, gemm.Config),
        step_input=_tuned("step_input", steps.step_input, steps.Config),
        sampler_step=_tuned("sampler_step", sampler_step, steps.Config),
    )


def _tuned(
    name: str, kernel: Callable[..., Any], config_type: Callable[..., Any], strided: bool = False
) -> Callable[..., Any]:
    """The op: the kernel, or PyTorch's library where the tuned configs say that it is faster. strided: x may have any strides."""
    from fastsd.kernels import launch, tuned

    library = getattr(REFERENCE, name)

    def op(x: Tensor, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and _wants_gradient((x, *arguments, *options.values())):
            raise ValueError("the Triton kernels have no gradient: run them in torch.no_grad(), and train on REFERENCE")
        config = tuned.choose(launch.arch_of(x.device), name, x, *arguments, **options)
        if config == tuned.LIBRARY:
            return library(x, *arguments, **options)
        config = None if config is None else config_type(*config)
        return kernel(x if strided else x.contiguous(), *arguments, **options, config=config)

    return op


def _wants_gradient(value: Any) -> bool:
    """Whether a tensor in it, however deep, is to get one."""
    if isinstance(value, tuple | list):
        return any(map(_wants_gradient, value))
    return isinstance(value, Tensor) and value.requires_grad


def sampler_step(
    state: Tensor, out: Tensor, noise: Tensor | None, row: StepRow, new: Tensor | None = None, config: Any = None
) -> Tensor:
    """The op by its kernel, which reads a table."""
    from fastsd.kernels import sampler_step as kernel

    if row.rescale is not None:  # needs the standard deviation of each whole picture: a few reductions, left to PyTorch
        return REFERENCE.sampler_step(state, out, noise, row, new)
    table, counter = row.update, row.counter
    if counter is None:
        table = table[None].contiguous()
        counter = torch.zeros(2 + state.shape[1], dtype=torch.int32, device=state.device)
    return kernel.sampler_step(state, out, noise, table, row.guidance, counter, new, config)
