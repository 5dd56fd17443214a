"""diffusers' StableDiffusionPipeline as its users run it: as it comes, and in the ways that are said to make it fast.

The settings are those of diffusers' own guide to speed (channels_last, compiled UNet and decoder, fused projections), and a
CUDA graph of the UNet by hand.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.workloads import GUIDANCE, PROMPT, Case, Contender, Drawn, Inputs
from fastsd.errors import ParameterError
from fastsd.graph import Captured, capture
from fastsd.sampling.names import SAMPLERS, canonical_sampler

EAGER = "diffusers"
CHANNELS_LAST = "diffusers channels_last"


def names(device: torch.device) -> list[str]:
    """The peers on a device. A CPU gets none that compiles."""
    return list(SETUPS) if device.type == "cuda" else [EAGER, CHANNELS_LAST]


def picture(case: Case, name: str) -> Contender:
    """From the prompt to the pixels, in the stages of fastsd's own clock."""
    pipe, inputs = load(case), Inputs(case)
    SETUPS[name](pipe)
    latents = inputs.latents

    def now() -> float:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)
        return time.perf_counter()

    @torch.no_grad()
    def run() -> Drawn:
        start = now()
        prompt, negative = pipe.encode_prompt(PROMPT, pipe.device, case.batch, True, "")
        text = now()
        drawn = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=case.pixels,
            width=case.pixels,
            num_inference_steps=case.steps,
            guidance_scale=GUIDANCE,
            latents=latents,
            generator=inputs.generators(),
            output_type="latent",
        ).images
        unet = now()
        image = pipe.vae.decode(drawn / pipe.vae.config.scaling_factor, return_dict=False)[0]
        array = pipe.image_processor.postprocess(image, "np")
        seconds = {"text": text - start, "unet": unet - text, "decode": now() - unet}
        return Drawn(np.asarray(array), seconds, len(pipe.scheduler.timesteps))

    @torch.no_grad()
    def step() -> np.ndarray:
        x, timestep, context = inputs.rows
        # As the pipeline calls it, so that what was compiled or captured there is what is checked.
        options = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
        out = pipe.unet(x, timestep, encoder_hidden_states=context, **options, return_dict=False)[0]
        return out.float().cpu().numpy()

    return Contender(name, run, step)


def load(case: Case) -> Any:
    """The pipeline, with the case's sampler."""
    diffusers = import_diffusers()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        case.folder, torch_dtype=case.torch_dtype, safety_checker=None, local_files_only=True
    ).to(case.device)
    pipe.set_progress_bar_config(disable=True)
    if case.sampler is not None:
        sampler, schedule = canonical_sampler(case.sampler)
        # What StableDiffusionPipeline forces on the scheduler it is loaded with.
        forced: dict[str, Any] = {"clip_sample": False, "skip_prk_steps": True, "steps_offset": 1}
        info = SAMPLERS[sampler]
        if not info.diffusers_class:
            raise ParameterError(f"sampler: diffusers has no {info.label} to measure against; choose another")
        options = forced | dict(info.diffusers_options)
        if schedule in ("karras", "exponential", "beta"):
            options[f"use_{schedule}_sigmas"] = True
        elif schedule == "sgm_uniform":
            options["timestep_spacing"] = "trailing"
        elif schedule not in (None, "uniform"):
            raise ParameterError(f"schedule: diffusers has no {schedule} to measure against; choose another")
        twin = getattr(diffusers, info.diffusers_class)
        pipe.scheduler = twin.from_config(dict(pipe.scheduler.config) | options)
    return pipe


def import_diffusers() -> Any:
    """diffusers without its bars and notices."""
    import diffusers
    import transformers.utils

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


def _eager(pipe: Any) -> None:
    pass


def _channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)


def _graph(pipe: Any) -> None:
    _channels_last(pipe)
    pipe.unet.forward = GraphedForward(pipe.unet.forward)


def _compiled(pipe: Any, mode: str) -> None:
    _channels_last(pipe)
    # Static shapes: with dynamic ones a second size would run slower code than the first.
    options: dict[str, Any] = {"mode": mode, "fullgraph": True, "dynamic": False}
    pipe.unet.forward = torch.compile(pipe.unet.forward, **options)
    pipe.vae.decode = torch.compile(pipe.vae.decode, **options)


def _autotuned(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    _compiled(pipe, "max-autotune")


class GraphedForward:
    """A UNet's forward in a CUDA graph for each shape of its inputs. What it returns is overwritten by the next call."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self._captured: dict[Any, tuple[tuple[Tensor, ...], Captured[Any]]] = {}

    def __call__(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        given = (sample, timestep, encoder_hidden_states)
        key = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key not in self._captured:
            buffers = tuple(tensor.clone() for tensor in given)
            self._captured[key] = buffers, capture(lambda: self.forward(*buffers, **options))
        buffers, captured = self._captured[key]
        for buffer, tensor in zip(buffers, given, strict=True):
            buffer.copy_(tensor)
        captured.replay()
        return captured.output


SETUPS: dict[str, Callable[[Any], None]] = {
    EAGER: _eager,
    CHANNELS_LAST: _channels_last,
    "diffusers CUDA graph": _graph,
    "diffusers compile reduce-overhead": lambda pipe: _compiled(pipe, "reduce-overhead"),
    "diffusers compile max-autotune, fused QKV": _autotuned,
}
