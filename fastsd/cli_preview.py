"""`fastsd generate --preview`: a file that is written anew while the picture is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import ImageError, ParameterError
from fastsd.metadata import check_output_path, save_image

if TYPE_CHECKING:
    from fastsd import Pipeline
    from fastsd.request import StepCallback

EVERY = 5


def check_preview(path: Path | None, every: int | None, taesd: Path | None) -> None:
    """ParameterError for options without --preview, and for a file that cannot be written."""
    if path is None:
        for option, value in {"--preview-every": every, "--taesd": taesd}.items():
            if value is not None:
                raise ParameterError(f"{option}: has no meaning without --preview; give one, or leave {option} out")
        return
    try:
        check_output_path(path)
    except ImageError as error:
        raise ParameterError(f"--preview: {error}") from error


def with_preview(
    on_step: "StepCallback", pipe: "Pipeline", path: Path | None, every: int | None, taesd: Path | None
) -> "StepCallback":
    """on_step, and then all pictures in one at the path, whole at any time, every so many steps; without a path on_step alone."""
    if path is None:
        return on_step
    from PIL import ImageOps

    from fastsd.picture_grid import grid
    from fastsd.previews import Previewer

    scale = pipe.config.vae.downscale if taesd is None else 1  # to the size of what is drawn
    show = Previewer(
        pipe,
        lambda step, pictures: save_image(grid([ImageOps.scale(picture, scale) for picture in pictures]), path),
        EVERY if every is None else every,
        taesd,
    )

    def both(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
        on_step(pipe, step, timestep, values)
        show(pipe, step, timestep, values)

    return both
