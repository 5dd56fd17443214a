"""The command line: `fastsd generate | compile | verify | info | samplers`, also as `python -m fastsd`.

Results (paths and seeds, tables) go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 a wrong option or
value, 130 interrupted. An error is one line, what is wrong and how to mend it; --debug puts the traceback before it.
"""

import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastsd.errors import FastSDError, ImageError, NumericsError, ParameterError, PromptError
from fastsd.metadata import check_output_path, save_image

# What is slow to import (torch and what needs it) is imported inside the commands: help and usage errors do without.
if TYPE_CHECKING:
    from fastsd import Pipeline

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# The library's names in error messages, as this program spells them.
_OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--cfg-scale",
    "num_images_per_prompt": "--batch",
    "clip_skip": "clip_skip (--clip-skip minus 1)",
    **{name: f"--{name}" for name in ("height", "width", "seed", "eta", "device", "dtype", "backend")},
    **{name: f"--{name}" for name in ("arch", "preset", "size", "batch", "steps")},
}


class _Program(TyperGroup):
    """Typer's group, but every error is one line on stderr and decides the exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        given = args[0] if args else options.pop("args", None)
        arguments = sys.argv[1:] if given is None else list(given)
        options["standalone_mode"] = False  # else typer prints errors in its own way
        try:
            code = super().main(arguments, **options)
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except Exception as error:
            if "--debug" in arguments:
                traceback.print_exception(error)
            code, message = _explain(error)
            typer.echo(f"fastsd: error: {message}", err=True)
        if code == INTERRUPTED:
            typer.echo("fastsd: interrupted", err=True)
        sys.exit(code or 0)


app = typer.Typer(
    cls=_Program,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Generate images with Stable Diffusion.",
)


def main() -> None:
    """The console entry point. Always leaves through SystemExit."""
    app(prog_name="fastsd")


def _print_version(wanted: bool) -> None:
    if wanted:
        import fastsd

        typer.echo(f"fastsd {fastsd.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help='What to draw; "-" reads it from standard input.')],
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", "-n", help="What to keep away from.")] = "",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="A diffusers folder or a Hugging Face Hub id.", show_default="the bundled one"
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps.")] = 20,
    cfg_scale: Annotated[float, typer.Option("--cfg-scale", help="Guidance: how closely to follow the prompt.")] = 7.5,
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="Of the first image; the next take seed + 1, …; -1 is random.")
    ] = -1,
    width: Annotated[
        int | None, typer.Option("--width", "-W", help="Pixels, a multiple of 8.", show_default="the model's")
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", "-H", help="Pixels, a multiple of 8.", show_default="the model's")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images to draw: out-0.png, out-1.png, ….")] = 1,
    sampling_method: Annotated[
        str | None, typer.Option(help="A name that `fastsd samplers` lists.", show_default="the model's")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="The spacing of the steps, e.g. karras.", show_default="the sampler's")
    ] = None,
    clip_skip: Annotated[
        int, typer.Option(min=1, help="The CLIP layer to stop at, from the end: 2 is the one before the last.")
    ] = 1,
    eta: Annotated[float, typer.Option(help="Noise of DDIM, 0 to 1.")] = 0.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")] = Path("out.png"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, reference (plain PyTorch), or one that `fastsd info` lists.")
    ] = "auto",
    variant: Annotated[str | None, typer.Option(help="Which weight files of the model, e.g. fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin weights (never code).")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no timings.")] = False,
) -> None:
    """Draw images from a prompt. Prints each file's path and seed, a tab between."""
    paths = _output_paths(output, batch)
    text = _read_prompt(prompt)
    pipe = _load(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        variant=variant,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    with _progress(quiet) as on_step:
        result = pipe.generate(
            text,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=cfg_scale,
            num_images_per_prompt=batch,
            eta=eta,
            seed=None if seed == -1 else seed,
            sampler=sampling_method,
            schedule=scheduler,
            clip_skip=None if clip_skip == 1 else clip_skip - 1,  # the library counts as diffusers does
            callback_on_step_end=on_step,
        )
    for warning in result.warnings:
        typer.echo(f"fastsd: warning: {_one_line(warning)}", err=True)
    for image, path, image_seed, parameters in zip(
        result.images, paths, result.seeds or [], result.parameters, strict=True
    ):
        save_image(image, path, parameters)
        typer.echo(f"{_one_line(str(path))}\tseed {image_seed}")
    if not quiet:
        typer.echo(", ".join(f"{stage} {ms:.0f} ms" for stage, ms in result.timings.items()), err=True)


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
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes that compile.", show_default="one a core")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where Triton's cache lies.", show_default="TRITON_CACHE_DIR, ~/.triton/cache")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compile the Triton kernels of a model for a GPU that need not be here, as when a container is built."""
    from fastsd import compiling

    target = compiling.check_target(arch, model, preset, size, dtype, batch, revision)
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
    seed: Annotated[int, typer.Option("--seed", "-s")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, or one that `fastsd info` lists.")] = "auto",
    variant: Annotated[str | None, typer.Option(help="Which weight files of the model, e.g. fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin weights (never code).")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
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
    _print_table(rows)
    if report.failed:
        raise NumericsError(f"beyond the gate: {', '.join(row.name for row in report.failed)}")


@app.command()
def samplers() -> None:
    """List the samplers and schedules, with every name they answer to."""
    from fastsd.sampling import SAMPLERS
    from fastsd.sampling.names import SCHEDULE_ALIASES

    rows = [("NAME", "LABEL", "DIFFUSERS CLASS", "ALSO", "DESCRIPTION")]
    rows += [
        (info.id, info.label, info.diffusers_class, ", ".join(info.aliases) or "-", info.description)
        for info in SAMPLERS.values()
    ]
    _print_table(rows)
    schedules = (f"{name} ({', '.join(also)})" if also else name for name, also in SCHEDULE_ALIASES.items())
    typer.echo(f"\nschedules: {', '.join(schedules)}")


@app.command()
def info() -> None:
    """Show versions, machine, GPU, which ops are fastsd's own on it, and where files lie."""
    from huggingface_hub import constants

    from fastsd import environment
    from fastsd.pipeline import BUNDLED

    cache = f"{constants.HF_HOME} (HF_HOME), {constants.HF_HUB_CACHE} (models)"
    _print_table(
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


def _explain(error: Exception) -> tuple[int, str]:
    """(exit code, one line)."""
    if isinstance(error, FastSDError):
        usage = isinstance(error, ParameterError | PromptError)
        return 2 if usage else 1, _one_line(_with_option_names(str(error)) if usage else str(error))
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong type
        return getattr(error, "exit_code", 2), f"{_one_line(error.format_message()).rstrip('.')}; see --help"
    return 1, f"{type(error).__name__}: {_one_line(str(error))}; --debug shows the traceback"


def _with_option_names(message: str) -> str:
    """The argument that a ParameterError begins with, by its option's name."""
    name = re.match(r"\w+", message)
    return _OPTIONS.get(name[0], name[0]) + message[name.end() :] if name else message


def _one_line(text: str) -> str:
    """Without line breaks, and with what could command a terminal, or cannot be encoded, spelt out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _output_paths(output: Path, batch: int) -> list[Path]:
    """out.png, or out-0.png, out-1.png, … ; refused here rather than after the work."""
    paths = [output] if batch == 1 else [output.with_stem(f"{output.stem}-{index}") for index in range(batch)]
    try:
        check_output_path(output)
        for path in paths:
            check_output_path(path)
    except ImageError as error:
        raise ParameterError(f"--output: {error}") from error
    return paths


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    from fastsd.tokenizer import MAX_PROMPT_BYTES

    try:  # one byte more than allowed, so that too long a prompt is refused and not cut
        return sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt on standard input is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def _load(model: str | None, **options: Any) -> "Pipeline":
    # The pipeline logs what it also returns as `warnings`; without a handler Python would print it a second time.
    logging.getLogger("fastsd").addHandler(logging.NullHandler())
    import fastsd

    return fastsd.Pipeline(**options) if model is None else fastsd.Pipeline.from_pretrained(model, **options)


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A bar on stderr, moved by the callback that it gives. It appears with the first step: a refusal is one line only."""
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: list[tqdm] = []

        def on_step(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
            if bars:
                bars[0].update()
            else:
                bar = tqdm(total=values["num_steps"], initial=1, disable=quiet, file=sys.stderr, unit="step", ncols=80)
                bars.append(stack.enter_context(bar))

        yield on_step


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


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
