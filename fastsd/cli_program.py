"""What all commands of `fastsd` share: the program, its errors in one line, tables."""

import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastsd.errors import FastSDError, ParameterError, PromptError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# The library's names in error messages, as this program spells them.
_SAME = """height width seed eta device dtype backend prompt_style strength mask_blur paste_back hires_scale hires_steps
    hires_strength hires_upscaler variation_seed variation_strength
    prediction_type guidance_rescale timesteps sigmas arch preset size batch steps vae"""
_OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--cfg-scale",
    "num_images_per_prompt": "--batch",
    "clip_skip": "clip_skip (--clip-skip minus 1)",
    "image": "--init-image",
    "mask_image": "--mask",
    "padding_mask_crop": "--only-masked",
    "use_ema": "--ema",
    **{name: f"--{name.replace('_', '-')}" for name in _SAME.split()},
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


def _explain(error: Exception) -> tuple[int, str]:
    """(exit code, one line)."""
    if isinstance(error, FastSDError):
        usage = isinstance(error, ParameterError | PromptError)
        return 2 if usage else 1, one_line(_with_option_names(str(error)) if usage else str(error))
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong type
        return getattr(error, "exit_code", 2), f"{one_line(error.format_message()).rstrip('.')}; see --help"
    return 1, f"{type(error).__name__}: {one_line(str(error))}; --debug shows the traceback"


def _with_option_names(message: str) -> str:
    """The argument that a ParameterError begins with, by its option's name."""
    name = re.match(r"\w+", message)
    return _OPTIONS.get(name[0], name[0]) + message[name.end() :] if name else message


def one_line(text: str) -> str:
    """Without line breaks, and with what could command a terminal, or cannot be encoded, spelt out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
