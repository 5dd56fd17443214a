"""A call of `generate` on its way: its arguments checked, then what has become of it so far."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd.adapters import UsedLora
from fastsd.config import ModelConfig
from fastsd.errors import FastSDError, ParameterError
from fastsd.hires import Hires, check_hires, walks
from fastsd.image_source import Source, check_count, check_source
from fastsd.ops import Wrap
from fastsd.philox import FEWEST_THREADS
from fastsd.request import Request, StepCallback, check_request
from fastsd.sampling import SAMPLERS, NoiseSchedule, Table, make_table
from fastsd.start import Start
from fastsd.wording import listed, quoted


@dataclass
class Job:
    """A checked call of `generate`, and what it has so far."""

    request: Request
    source: Source | None
    hires: Hires | None
    tables: list[Table]
    """Of the walk, and of the second pass if there is one."""
    callback: StepCallback | None
    notes: list[str]
    """Warnings."""
    degraded: list[str] = field(default_factory=list)
    """What was done otherwise than asked, for want of memory."""
    loras: list[UsedLora] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    """What was loaded when it began, for its parameters: see `MadeWith`."""
    context: Tensor | None = None
    """[U, L, C]"""
    rows: Tensor | None = None
    """For each row of the UNet's batch its row in the context."""
    start: Start | None = None
    latents: Tensor | None = None
    """[B, H, W, C] fp32"""
    drawn: "list[Image.Image] | np.ndarray | Tensor | None" = None
    error: FastSDError | None = None
    """Why it went no further."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each pass."""
        return [(one.height, one.width) for one in (self.request, self.hires) if one]


def check_job(config: ModelConfig, schedule: NoiseSchedule, asked: Mapping[str, Any]) -> Job:
    """The arguments of `Pipeline.generate`, all of them by name, as a Job; ParameterError, PromptError or ImageError if wrong."""
    source = check_source(config, **_of(check_source, asked))
    size = {"height": source.height, "width": source.width} if source else {}
    request = check_request(config, **_of(check_request, {**asked, **size}))
    if source:
        check_count(source, request)
    second = (asked[f"hires_{name}"] for name in ("scale", "steps", "strength", "upscaler"))
    hires = check_hires(config, request, source, *second)
    options = _of(make_table, {key: asked[key] for key in ("sampler", "schedule", "timesteps", "sigmas")})
    tables = [
        make_table(schedule, steps, eta=request.eta, strength=share, **options)
        for steps, share in walks(request, source, hires)
    ]
    notes = list(request.warnings)
    info = SAMPLERS[tables[0].sampler]
    if request.eta and info.default_eta is None:
        notes.append(f"eta: has no effect on {info.id}; it is the noise of ddim and tcd")
    if request.step_noise == "brownian" and not info.brownian:
        takers = listed([other.id for other in SAMPLERS.values() if other.brownian])
        notes.append(f"step_noise: brownian has no effect on {info.id}; it is the noise of {takers}")
    job = Job(request, source, hires, tables, asked["callback_on_step_end"], notes)
    numbers = max(rows * columns for rows, columns in job.sizes) // config.vae.downscale**2 * config.vae.latent_channels
    if request.noise.rng == "gpu" and numbers > FEWEST_THREADS:
        notes.append(f"rng: for {numbers} numbers a draw GPUs differ; these are of one that has as many threads")
    return job


def check_requests(requests: Any, generate: Callable[..., Any]) -> list[dict[str, Any]]:
    """What `Pipeline.generate_batch` was given, each with generate's defaults.

    ParameterError unless it is a list of mappings, of which no two have the same generator.
    """
    if not isinstance(requests, Sequence) or not all(isinstance(request, Mapping) for request in requests):
        raise ParameterError(f"requests: must be a list of dicts of generate's arguments, not {quoted(requests)}")
    if not requests:
        raise ParameterError("requests: the list is empty; give one request at least")
    defaults = {name: parameter.default for name, parameter in signature(generate).parameters.items() if name != "self"}
    for number, request in enumerate(requests):
        unknown = [name for name in request if name not in defaults]
        if unknown:
            known = listed(defaults)
            raise ParameterError(f"requests[{number}]: {quoted(unknown[0])} is no argument of generate; it has {known}")
    owner: dict[int, int] = {}
    for number, request in enumerate(requests):
        given = request.get("generator")
        for generator in given if isinstance(given, list | tuple) else [given]:
            if isinstance(generator, torch.Generator) and owner.setdefault(id(generator), number) != number:
                raise ParameterError(
                    f"requests[{number}]: its generator is that of requests[{owner[id(generator)]}] too; give each its own"
                )
    return [{**defaults, **request} for request in requests]


def each(jobs: Iterable[Job], do: Callable[[Job], None]) -> None:
    """Do it to each job that is still well. What goes wrong with one is its own, and the others go on."""
    for job in jobs:
        if job.error is None:
            try:
                do(job)
            except FastSDError as error:
                job.error = error


def images_by_shape(jobs: Iterable[Job]) -> dict[tuple[int, int, Wrap], int]:
    """How many images are drawn of each height and width, and with which edges that meet."""
    counts: dict[tuple[int, int, Wrap], int] = {}
    for job in jobs:
        for size in job.sizes:
            shape = (*size, job.request.wrap)
            counts[shape] = counts.get(shape, 0) + job.request.batch
    return counts


def _of(function: Callable[..., Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes."""
    return {name: asked[name] for name in signature(function).parameters if name in asked}
