"""`fastsd compile`: fill Triton's cache with the kernels that a model will launch on a GPU that need not be here.

The model's stages are planned on meta tensors (`fastsd.launches`), and processes compile the launches through the same path that
a launch takes, with a CUDA driver that only names the GPU. So the cache holds the very entries that are looked for later.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastsd import tracing
from fastsd.checkpoints import open_folder, resolve
from fastsd.checks import choice, integer
from fastsd.config import SD15, SD21, ModelConfig
from fastsd.device import DTYPES
from fastsd.errors import FastSDError, ParameterError
from fastsd.wording import quoted

# Triton may be missing, and must not be imported before the environment says where its cache lies.
if TYPE_CHECKING:
    from fastsd.launches import Launch

PRESETS = {"sd15": SD15, "sd21": SD21}

STEPS = (1, 8, 16, 20, 25, 28, 30, 32, 40, 50, 64, 100)
"""Lengths of a schedule: the time projections are of all its steps at once. Others mostly share the kernels of these."""


@dataclass(frozen=True)
class Target:
    """What to compile for."""

    nets: ModelConfig
    arch: int
    dtype: torch.dtype
    pixels: int
    images: int


class Done(NamedTuple):
    kernels: int
    """That the model launches."""
    new: int
    """Those that were not in the cache."""
    seconds: float
    cache: Path


def compile_kernels(target: Target, jobs: int, cache_dir: Path | None = None) -> Done:
    """Compile what pictures of the target's size and number launch, guided or not, text to picture and picture to latents.

    cache_dir: where Triton's cache shall lie from now on, for this process and those that it starts. FastSDError naming the
    kernel that the compiler refuses.
    """
    import triton

    if cache_dir is not None:
        os.environ["TRITON_CACHE_DIR"] = str(cache_dir.resolve())
    start = time.perf_counter()
    count = len(planned(target))
    # Not forked: Triton and PyTorch have threads. The kernels' cost differs, so each process takes the next one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, count), mp_context=context) as pool:
        new = sum(pool.map(_compile, [target] * count, range(count)))
    return Done(count, new, time.perf_counter() - start, Path(triton.knobs.cache.dir))


@cache
def planned(target: Target) -> "tuple[Launch, ...]":
    """One launch of each different kernel; the same ones in the same order in every process."""
    from fastsd import launches

    found: dict[Any, Launch] = {}
    ops = launches.planning(target.arch, lambda launch: found.setdefault(launches.identity(launch), launch))
    for guided in (True, False):
        tracing.run_stages(
            target.nets,
            lambda stage: ops,
            target.dtype,
            pixels=target.pixels,
            images=target.images,
            guided=guided,
            prompts=2 if guided else 1,  # with the negative one; where both are the same text, it is encoded alone
            steps=STEPS,
        )
    return tuple(found.values())


def _compile(target: Target, index: int) -> bool:
    """In a process of its own: one of the planned launches. Whether it was new."""
    import triton
    from triton.runtime import driver

    from fastsd.launches import BUILD_ERRORS

    new = []

    def told(*, cache_hit: bool, **_: Any) -> None:
        new.append(not cache_hit)

    triton.knobs.compilation.listener = told
    driver.set_active(Named(target.arch))
    launch = planned(target)[index]
    try:
        launch.warm()
    except BUILD_ERRORS as error:
        line = str(error).strip().partition("\n")[0]
        raise FastSDError(f"{launch.kernel.__name__} does not compile for sm_{target.arch}: {line}") from error
    return any(new)


class Named:
    """What Triton asks of a CUDA driver before it compiles: which GPU there is."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def check_target(
    arch: str,
    model: str | None = None,
    preset: str | None = None,
    size: int | None = None,
    dtype: str = "float16",
    batch: int = 1,
    revision: str | None = None,
) -> Target:
    """What the arguments ask for: a diffusers folder or a Hub id, or a preset; size in pixels, by default the model's.

    A model's configs are read, its weights are not. ParameterError for the arguments, without Triton, and in its interpreter;
    CheckpointError if the model cannot be had.
    """
    if find_spec("triton") is None:
        raise ParameterError("compile: Triton is not installed; pip install triton")
    import triton

    from fastsd.launches import SHARED_MEMORY

    archs = {f"sm_{number}": number for number in SHARED_MEMORY}
    number = archs[choice("arch", arch, list(archs))]
    if (model is None) == (preset is None):
        raise ParameterError(f"model: give either a model or a preset ({', '.join(PRESETS)})")
    if dtype not in DTYPES:
        raise ParameterError(f"dtype: {quoted(dtype)} is unknown; choose float32, float16 or bfloat16")
    nets = PRESETS[choice("preset", preset, list(PRESETS))] if model is None else _configs(model, revision)
    pixels, images = tracing.side(nets, size), integer("batch", batch, 1, 256)
    if triton.knobs.runtime.interpret:
        raise ParameterError("compile: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    return Target(nets, number, DTYPES[dtype], pixels, images)


def _configs(model: str, revision: str | None) -> ModelConfig:
    folder = open_folder(resolve(model, revision=revision))
    return ModelConfig.from_json(folder.text_encoder, folder.unet, folder.vae)
