"""Opening a model whatever it lies in: a diffusers folder, a single file, or a repository of the Hugging Face hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsd.checkpoints.folder import ModelFolder, open_folder
from fastsd.checkpoints.hub import resolve
from fastsd.checkpoints.single_file import SingleFile, open_single_file
from fastsd.checks import choice
from fastsd.errors import ParameterError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def open_model(
    model: str | Path,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    use_ema: bool = False,
    prediction_type: str | None = None,
    **hub: Any,
) -> ModelFolder | SingleFile:
    """A model, its layout checked and no weights read; hub: what `resolve` takes.

    use_ema and prediction_type: as `open_single_file` takes them; the latter also overrides a folder's scheduler config.
    Raises CheckpointError (HubError for the hub) if it cannot be had or is not SD 1.x or 2.x, ParameterError for the options.
    """
    if prediction_type is not None:
        choice("prediction_type", prediction_type, PREDICTION_TYPES)
    path = resolve(model, variant=variant, **hub)
    if path.is_file():
        if variant is not None:
            raise ParameterError("variant: is for folders; a single file has none")
        return open_single_file(path, allow_pickle=allow_pickle, use_ema=use_ema, prediction_type=prediction_type)
    if use_ema:
        raise ParameterError("use_ema: is for single files; of a folder take the variant, if it has one")
    folder = open_folder(path, variant=variant, allow_pickle=allow_pickle)
    if prediction_type is None:
        return folder
    return replace(folder, scheduler=folder.scheduler | {"prediction_type": prediction_type})
