"""Which calls a model makes: each stage is run on meta tensors, and its calls are written down.

No weight is made and nothing is computed, so the full-size models can be listed anywhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd import launches, tracing
from fastsd.config import SD15, SD21, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from fastsd.kernels.heads import stored_width
from fastsd.ops import REFERENCE, Ops, StepRow
from fastsd.tracing import replaced, signature


@dataclass(frozen=True)
class Nets:
    """What is traced of a model that fastsd does not run yet: a ModelConfig whose nets need not fit each other."""

    text_encoder: CLIPConfig
    unet: UNetConfig
    vae: VAEConfig


SDXL = Nets(
    CLIPConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu"
    ),
    UNetConfig(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=(2, 2, 2),
        down_attention=(False, True, True),
        up_attention=(True, True, False),
        num_attention_heads=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
    ),
    VAEConfig(scaling_factor=0.13025),
)
"""Stable Diffusion XL base, as far as it has shapes of its own: the text encoder is the larger of its two (OpenCLIP bigG; the
other is SD 1.x's), and the time embedding's added half, two small linear layers a prompt, is not there yet."""

MODELS: dict[str, ModelConfig | Nets] = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


@dataclass(frozen=True)
class Call:
    """One call of an op, by the shapes of its tensors: what a kernel is planned from."""

    op: str
    arguments: tuple[Any, ...]  # torch.Size for a tensor, also inside a tuple; others as they are; no trailing None
    options: tuple[tuple[str, Any], ...]
    result: Any  # torch.Size, or a tuple of them

    def named(self) -> dict[str, Any]:
        """The arguments by the names of the op's parameters, without those that are None by default."""
        parameters = signature(self.op)
        bound = parameters.bind(*self.arguments, **dict(self.options)).arguments
        return {k: v for k, v in bound.items() if v is not None or parameters.parameters[k].default is not None}

    def empty(self, dtype: torch.dtype, device: torch.device | str = "meta") -> dict[str, Any]:
        """The arguments by name, their tensors not filled."""

        def made(name: str, value: Any) -> Any:
            make = partial(torch.empty, dtype=self.dtype_of(name, dtype), device=device)
            return replaced(value, torch.Size, make)

        return {name: made(name, value) for name, value in self.named().items()}

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What an argument, or the "result", is held in where the nets run in dtype."""
        if name in ("counter", "time_rows"):
            return torch.int32
        fp32 = {"step_input": name in ("state", "weights"), "sampler_step": name != "out"}
        return torch.float32 if fp32.get(self.op, False) else dtype


def sizes(value: Any) -> Iterator[torch.Size]:
    """Every tensor's size in an argument or a result."""
    if isinstance(value, torch.Size):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from sizes(item)


STAGES = ("text", "prompt", "schedule", "step", "decode")


def trace(config: ModelConfig | Nets, pixels: int, batch: int = 2) -> dict[str, Counter[Call]]:
    """How often each call is made by each stage.

    text: CLIP on `batch` prompts; prompt: their keys and values; schedule: the time projections of one timestep; step: one step
    of a sampler on `batch` rows of the UNet, two for each guided image if they are even; decode: the images.
    """
    calls: dict[str, Counter[Call]] = {stage: Counter() for stage in STAGES}
    _follow(config, lambda stage: recording(calls[stage]), torch.float32, pixels, batch)
    return calls


def launches_of(
    config: ModelConfig | Nets, pixels: int, batch: int = 2, arch: int = 90, dtype: torch.dtype = torch.float16
) -> dict[str, Counter[str]]:
    """How often each kernel is launched by each stage of `trace` with the Triton ops, as `fastsd.launches` plans them.

    Calls that tuning has given to a library are not among them.
    """
    found: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}

    def planning(stage: str) -> Ops:
        return launches.planning(arch, lambda launch: found[stage].update([launch.kernel.__name__]))

    _follow(config, planning, dtype, pixels, batch)
    return found


def _follow(config: ModelConfig | Nets, ops: Callable[[str], Ops], dtype: torch.dtype, pixels: int, batch: int) -> None:
    guided = batch % 2 == 0
    tracing.run_stages(
        config,
        ops,
        dtype,
        height=pixels,
        width=pixels,
        images=batch // 2 if guided else batch,
        guided=guided,
        prompts=batch,
        steps=[1],
        stages=STAGES,
    )


def recording(calls: Counter[Call]) -> Ops:
    """The reference ops, each call written down. Heads are handed on as wide as the kernels store them."""

    def shape(tensor: Tensor) -> torch.Size:
        return tensor.shape

    def shaped(value: Any) -> Any:
        if isinstance(value, StepRow) and value.counter is not None:  # one row of the table, by itself
            value = StepRow(value.update[0], value.guidance, value.rescale)
        # A size that is an argument itself, as upsample_conv2d's, is not a tensor's.
        return replaced(tuple(value) if isinstance(value, torch.Size) else value, Tensor, shape)

    def record(name: str, op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        shapes = [shaped(value) for value in arguments]
        while shapes and shapes[-1] is None:
            shapes.pop()
        named = sorted((key, shaped(value)) for key, value in options.items() if key != "new")  # where the result goes
        result = op(*arguments, **options)
        if name == "project_heads":
            width = result[0].shape[-1]
            result = tuple(F.pad(heads, (0, stored_width(width) - width)) for heads in result)
        calls[Call(name, tuple(shapes), tuple(named), shaped(result))] += 1
        return result

    return tracing.around(REFERENCE, "recording", record)
