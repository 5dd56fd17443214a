"""`fastsd train`: fit a model, or a LoRA for one, as a config says."""

from pathlib import Path
from typing import Annotated

import typer

from fastsd import cli_options as options
from fastsd.cli_program import app


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", "-c", help="A TOML file; docs/TRAINING.md explains its keys.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write to.", show_default="the config's")
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop, with a checkpoint, after so many steps of a stage.", show_default="when all is done"
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Train a model or a LoRA. Interrupted, it goes on from its last checkpoint when it is started again."""
    from dataclasses import replace

    from fastsd.training.recipe import read_recipe
    from fastsd.training.run import train as run

    recipe = read_recipe(config)
    recipe = recipe if output is None else replace(recipe, output=str(output))
    done = run(recipe, stop_after)
    typer.echo(recipe.output if done else f"stopped; the same command goes on ({recipe.output})")
