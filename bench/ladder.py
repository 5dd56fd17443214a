"""fastsd, part by part: from plain PyTorch to all that makes it fast, one op a rung, so that each shows what it gains."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import fastsd
from bench.workloads import GUIDANCE, PROMPT, Case, Contender, Drawn, Inputs
from fastsd.backends import select_ops, triton_ops
from fastsd.ops import REFERENCE, Ops
from fastsd.sampling import make_table

ORDER = (
    "conv2d",
    "conv2d_norm",
    "upsample_conv2d",
    "group_norm",
    "geglu",
    "attention",
    "project_heads",
    "linear",
    "layer_norm",
    "step_input",
    "sampler_step",
)
"""Triton ops by what they are expected to gain: by their share of the step's floor, and what plain PyTorch loses on them."""


@dataclass(frozen=True)
class Engine:
    """One way to run fastsd."""

    backend: str
    swapped: tuple[str, ...] = ()
    """Ops of `triton_ops()` that stand in the backend's place."""
    graphs: bool = False

    def ops(self, device: torch.device) -> Ops:
        chosen = select_ops(self.backend, device)
        if not self.swapped:
            return chosen
        kernels = triton_ops()
        name = f"{chosen.name} + {len(self.swapped)} of triton's"
        return replace(chosen, name=name, **{op: getattr(kernels, op) for op in self.swapped})

    def pipeline(self, folder: str, device: str, dtype: str) -> fastsd.Pipeline:
        # A CPU has no graphs to ask for.
        options: dict[str, Any] = {"graphs": self.graphs} if torch.device(device).type == "cuda" else {}
        return fastsd.Pipeline(folder, device=device, dtype=dtype, backend=self.ops(torch.device(device)), **options)


def standard(device: torch.device) -> dict[str, Engine]:
    """What every run has: fastsd as it comes, and on plain PyTorch."""
    graphs = device.type == "cuda"
    return {
        "fastsd": Engine(select_ops("auto", device).name, graphs=graphs),
        "fastsd reference": Engine(REFERENCE.name),
    }


def rungs(device: torch.device) -> dict[str, Engine]:
    """The ladder from the bottom up. A GPU's: plain PyTorch, each Triton op added to those before, CUDA graphs."""
    ladder = {"reference": Engine(REFERENCE.name)}
    if device.type != "cuda":
        return ladder | {"onednn": Engine("onednn")}
    for count in range(1, len(ORDER) + 1):
        ladder[f"+ {ORDER[count - 1]}"] = Engine(REFERENCE.name, ORDER[:count])
    return ladder | {"+ CUDA graphs": Engine("triton", graphs=True)}


def picture(case: Case, engine: Engine) -> Contender:
    """From the prompt to the pixels."""
    pipe = engine.pipeline(case.folder, case.device, case.dtype)
    inputs = Inputs(case)
    latents = inputs.latents.float()
    calls = len(make_table(pipe.noise_schedule, case.steps, case.sampler, None))

    def run() -> Drawn:
        pipe._contexts.clear()  # diffusers encodes the prompt each time
        result = pipe.generate(
            PROMPT,
            height=case.pixels,
            width=case.pixels,
            num_inference_steps=case.steps,
            num_images_per_prompt=case.batch,
            guidance_scale=GUIDANCE,
            sampler=case.sampler,
            latents=latents,
            generator=inputs.generators(),
            output_type="np",
        )
        stages = {"text": "text", "unet": "unet", "decode": "vae"}
        return Drawn(
            np.asarray(result.images), {name: result.timings[key] / 1e3 for name, key in stages.items()}, calls
        )

    @torch.no_grad()
    def step() -> np.ndarray:
        x, timestep, context = inputs.rows
        keys, time = pipe.unet.project_context(context), pipe.unet.project_time(timestep.float().reshape(1))
        out = pipe.unet(x.permute(0, 2, 3, 1).contiguous(), time.expand(len(x), -1), keys)
        return out.permute(0, 3, 1, 2).float().cpu().numpy()

    return Contender(f"fastsd {pipe.ops.name}" + (" + CUDA graphs" if engine.graphs else ""), run, step)
