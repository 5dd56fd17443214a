"""The commands beside `fastsd generate`: compile, verify, convert, samplers, info."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastsd import cli_options as options
from fastsd.cli_program import app, one_line, print_table
from fastsd.errors import NumericsError, ParameterError

# What is slow to import (torch and what needs it) is imported inside the commands: help and usage errors do without.
if TYPE_CHECKING:
    from fastsd.sampling import SamplerInfo


@app.command("compile")
def compile_kernels(
    arch: Annotated[str, typer.Option(help="The GPU's compute capability, e.g. sm_90.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A diffusers folder or a Hugging Face Hub id.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="sd15 or sd21, without a model at hand.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a square picture.", show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    batch: Annotated[int, typer.Option("--batch", "-b", help="Images of one prompt, drawn together.")] = 1,
    tiling: options.Tiling = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes that compile.", show_default="one a core")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where Triton's cache lies.", show_default="TRITON_CACHE_DIR, ~/.triton/cache")
    ] = None,
    revision: options.Revision = None,
    debug: options.Debug = False,
) -> None:
    """Compile the Triton kernels of a model for a GPU that need not be here, as when a container is built."""
    from fastsd import compiling

    edges = options.TILINGS[tiling]
    target = compiling.check_target(arch, model, preset, size, dtype, batch, revision, edges)
    done = compiling.compile_kernels(target, jobs or os.cpu_count() or 1, cache_dir)
    typer.echo(
        f"{done.kernels} kernels for {arch}, {done.new} of them new, in {done.seconds:.0f} s; cache: {done.cache}"
    )


@app.command()
def verify(
    model: Annotated[
        str | None, typer.Argument(help="A diffusers folder or a Hugging Face Hub id.", show_default="the bundled one")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a square picture.", show_default="the model's")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps, each of them compared.")] = 4,
    precise: Annotated[bool, typer.Option("--precise", help="Compute the reference in fp64 instead of fp32.")] = False,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")] = "a red circle",
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the noise that both begin with.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    backend: Annotated[str, typer.Option(help="auto, or one that `fastsd info` lists.")] = "auto",
    variant: options.Variant = None,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    debug: options.Debug = False,
) -> None:
    """Compare the fast path with plain PyTorch, op by op, step by step and by the picture. Exit code 1 if one is off."""
    from fastsd import verify as verifying

    report = verifying.verify(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        size=size,
        steps=steps,
        precise=precise,
        prompt=prompt,
        seed=seed,
        variant=variant,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    typer.echo(report.about)
    rows = [("WHAT", "CALLS", "WORST", "PYTORCH", "GATE", "VERDICT", "WHERE")]
    rows += [(row.name, str(row.calls), row.worst, row.plain, row.gate, row.verdict, row.where) for row in report.rows]
    print_table(rows)
    if report.failed:
        raise NumericsError(f"beyond the gate: {', '.join(row.name for row in report.failed)}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A diffusers folder, a single file or a Hugging Face Hub id.")],
    target: Annotated[Path, typer.Argument(help="A .safetensors file for a folder, a folder for a single file.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Of a single file take the averaged UNet.")] = False,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, if an SD 2.x file is not what it is taken for.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which weight files of a folder, e.g. fp16.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .ckpt (never code).")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Turn a diffusers folder into a single file (LDM keys), or a single file into a folder. Prints what it wrote."""
    from fastsd.convert import convert as write_other

    options = {"variant": variant, "allow_pickle": allow_pickle, "use_ema": ema, "prediction_type": prediction_type}
    typer.echo(one_line(str(write_other(source, target, force=force, **options))))


@app.command()
def samplers() -> None:
    """List the samplers and schedules, with every name they answer to."""
    from fastsd.sampling import SAMPLERS
    from fastsd.sampling.names import SCHEDULE_ALIASES

    rows = [("NAME", "LABEL", "DIFFUSERS CLASS", "ALSO", "DESCRIPTION")]
    rows += [
        (info.id, info.label, _twin(info), ", ".join(info.aliases) or "-", info.description)
        for info in SAMPLERS.values()
    ]
    print_table(rows)
    schedules = (f"{name} ({', '.join(also)})" if also else name for name, also in SCHEDULE_ALIASES.items())
    typer.echo(f"\nschedules: {', '.join(schedules)}")


@app.command()
def info() -> None:
    """Show versions, machine, GPU, which ops are fastsd's own on it, and where files lie."""
    from huggingface_hub import constants

    from fastsd import environment
    from fastsd.pipeline import BUNDLED

    cache = f"{constants.HF_HOME} (HF_HOME), {constants.HF_HUB_CACHE} (models)"
    print_table(
        [
            *environment.versions().items(),
            ("system", platform.platform()),
            ("cpu", environment.cpu()),
            *(("gpu", gpu) for gpu in environment.gpus() or ["none: fastsd runs on the CPU"]),
            *_backends(),
            ("cache", cache),
            ("bundled model", str(BUNDLED)),
        ]
    )


def _twin(info: "SamplerInfo") -> str:
    """The class of diffusers that is this sampler without further options."""
    return (info.diffusers_class if not info.diffusers_options else "") or "-"


def _backends() -> list[tuple[str, str]]:
    """The backends this machine can run, and what "auto" stands for on it."""
    from dataclasses import fields

    from fastsd.backends import BACKENDS, select_ops
    from fastsd.device import select_device, select_dtype
    from fastsd.ops import REFERENCE

    device = select_device("auto")
    usable = []
    for name in BACKENDS:
        with suppress(ParameterError):
            select_ops(name, device)
            usable.append(name)
    ops = select_ops("auto", device)
    own = [
        op.name for op in fields(ops) if getattr(ops, op.name) is not getattr(REFERENCE, op.name) and op.name != "name"
    ]
    return [
        ("backends", ", ".join(usable)),
        ("auto", f"{device.type}, {str(select_dtype('auto', device)).removeprefix('torch.')}, {ops.name}"),
        ("own ops", ", ".join(own) or "none: every op is plain PyTorch"),
    ]
