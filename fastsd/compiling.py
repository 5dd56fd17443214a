"""Fill Triton's cache with the kernels that a model will launch: `fastsd compile` for a GPU that need not be here, and a Pipeline
that finds none, for its own.

The model's stages are planned on meta tensors (`fastsd.launches`), and processes compile the launches through the same path that
a launch takes, with a CUDA driver that only names the GPU. So the cache holds the very entries that are looked for later. An
empty file, the stamp, says that a size is there.
"""

import hashlib
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Hashable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastsd import tracing
from fastsd.checkpoints import open_model
from fastsd.checks import choice, integer
from fastsd.config import SD15, SD21, ModelConfig
from fastsd.device import DTYPES
from fastsd.errors import FastSDError, ParameterError
from fastsd.images import MAX_PIXELS
from fastsd.ops import Ops, Wrap
from fastsd.request import MAX_IMAGES
from fastsd.seamless import WRAPS, check_tiling
from fastsd.wording import quoted

# Triton may be missing, and must not be imported before the environment says where its cache lies.
if TYPE_CHECKING:
    from fastsd.launches import Launch

PRESETS = {"sd15": SD15, "sd21": SD21}

STEPS = (1, 8, 16, 20, 25, 28, 30, 32, 40, 50, 64, 100)
"""Lengths of a schedule: the time projections are of all its steps at once. Others mostly share the kernels of these."""

PACKAGE = Path(__file__).parent
SOURCES = ("kernels/*.py", "kernels/configs/*.json", "models/*.py", "denoise.py", "walks.py", "launches.py")
"""What decides, beside a model's configs, which kernels it launches, and their code."""

FRESH = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from fastsd.compiling import compile_kernels
print(*compile_kernels(*pickle.load(sys.stdin.buffer))[:3])
"""
"""What `compile_ahead` runs: not the user's script again, which need not have a guard for that."""

logger = logging.getLogger("fastsd")


@dataclass(frozen=True)
class Target:
    """What to compile for."""

    nets: ModelConfig
    arch: int
    dtype: torch.dtype
    height: int  # pixels
    width: int
    images: int
    wrap: Wrap = (False, False)
    """Edges that meet."""


class Done(NamedTuple):
    kernels: int
    """That the model launches."""
    new: int
    """Those that were not in the cache."""
    seconds: float
    cache: Path


def compile_kernels(target: Target, jobs: int, cache_dir: Path | None = None) -> Done:
    """Compile what pictures of the target's size and number launch, guided or not, text to picture and picture to latents, and
    leave its stamp.

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
    with ProcessPoolExecutor(min(jobs, count), mp_context=context, initializer=_end_with_parent) as pool:
        new = sum(pool.map(_compile, [target] * count, range(count)))
    with suppress(OSError):  # a cache that is only read; the stamp just saves work
        path = stamp(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
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
            height=target.height,
            width=target.width,
            images=target.images,
            guided=guided,
            prompts=2 if guided else 1,  # with the negative one; where both are the same text, it is encoded alone
            steps=STEPS,
            wrap=target.wrap,
        )
    return tuple(found.values())


def _end_with_parent() -> None:
    """In a process of the pool: it would wait for work for ever where its parent was killed."""

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, args=[multiprocessing.parent_process()], daemon=True).start()


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


def stamp(target: Target) -> Path:
    """The file in Triton's cache that says that the target is compiled, by these sources."""
    import triton

    hashed = _hash(target.nets, target.arch, target.dtype, target.wrap, PACKAGE)
    return Path(triton.knobs.cache.dir, "fastsd", hashed, f"{target.height}x{target.width}x{target.images}")


@cache
def _hash(nets: ModelConfig, arch: int, dtype: torch.dtype, wrap: Wrap, package: Path) -> str:
    """Of all that decides a model's kernels but the pictures' size: 16 hex digits."""
    import triton

    digest = hashlib.sha256(repr((nets, arch, dtype, wrap, triton.__version__)).encode())
    for path in sorted(path for pattern in SOURCES for path in package.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def compiled_before(target: Target) -> bool:
    """Whether any size of this model is compiled for this GPU and dtype, and with edges that meet as here."""
    return next(stamp(target).parent.glob("*"), None) is not None


_lock = threading.RLock()
_settled: set[Hashable] = set()


def compile_ahead(target: Target) -> None:
    """Compile in processes of their own, one a core, what has no stamp. A failure is a warning: what is missing is then compiled
    when it is launched."""
    import triton

    with _lock:
        if stamp(target).exists():
            return
        jobs = os.cpu_count() or 1
        size = f"{target.images} images of {target.width}x{target.height}"
        logger.info("compiling the Triton kernels for %s in up to %d processes", size, jobs)
        given = pickle.dumps(sys.path) + pickle.dumps((target, jobs, Path(triton.knobs.cache.dir)))
        # A frozen program's executable is the program, which would start itself.
        python = "" if getattr(sys, "frozen", False) else sys.executable or ""
        try:
            done = subprocess.run([python, "-P", "-c", FRESH], input=given, capture_output=True, check=True)
            kernels, new, seconds = done.stdout.split()[-3:]
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            logger.warning("kernels are compiled when launched, not ahead: %s", told.rpartition("\n")[2] or error)
        else:
            logger.info("%d of %d kernels were new, in %.0f s", int(new), int(kernels), float(seconds))


def prepare(
    nets: ModelConfig,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    width: int,
    images: int,
    wrap: Wrap = (False, False),
    always: bool = False,
) -> None:
    """Before a Pipeline launches what such pictures need: `compile_ahead`, always or only if no size of its model ever was.

    Nothing where the ops are not Triton's, in its interpreter, on what is no CUDA GPU of a known compute capability, and for a
    size that a generation will refuse. What was asked once in this process is not asked again.
    """
    if ops.name != "triton" or device.type != "cuda":
        return
    import triton

    from fastsd.launches import SHARED_MEMORY, arch_of

    arch = arch_of(device)
    if triton.knobs.runtime.interpret or arch not in SHARED_MEMORY or not _possible(nets, height, width, images):
        return
    target, model = Target(nets, arch, dtype, height, width, images, wrap), (nets, arch, dtype, wrap)
    key = target if always else model
    if key in _settled:
        return
    with _lock:
        if key not in _settled and (always or not compiled_before(target)):
            compile_ahead(target)
        _settled.update((key, model))


def _possible(nets: ModelConfig, height: int, width: int, images: int) -> bool:
    """Whether a generation takes such a size; what it refuses, it also names."""
    if not all(isinstance(value, int) and value > 0 for value in (height, width, images)):
        return False
    unit = nets.vae.downscale
    return height % unit == width % unit == 0 and height * width <= MAX_PIXELS and images <= MAX_IMAGES


def check_target(
    arch: str,
    model: str | None = None,
    preset: str | None = None,
    size: int | None = None,
    dtype: str = "float16",
    batch: int = 1,
    revision: str | None = None,
    tiling: bool | str = False,
) -> Target:
    """What the arguments ask for: a diffusers folder or a Hub id, or a preset; size in pixels, by default the model's; tiling as
    `Pipeline.generate` takes it.

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
    side, images = tracing.side(nets, size), integer("batch", batch, 1, MAX_IMAGES)
    if triton.knobs.runtime.interpret:
        raise ParameterError("compile: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    return Target(nets, number, DTYPES[dtype], side, side, images, WRAPS[check_tiling(tiling)])


def _configs(model: str, revision: str | None) -> ModelConfig:
    folder = open_model(model, revision=revision)
    return ModelConfig.from_json(folder.text_encoder, folder.unet, folder.vae)
