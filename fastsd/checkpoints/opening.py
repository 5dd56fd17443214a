"""Opening a model whatever it lies in: a diffusers folder, a single file, or a repository of the Hugging Face hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsd.checkpoints.autoencoder import AutoencoderFiles, open_autoencoder
from fastsd.checkpoints.folder import ModelFolder, open_folder
from fastsd.checkpoints.hub import resolve, resolve_autoencoder
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
    vae: str | Path | None = None,
    **hub: Any,
) -> ModelFolder | SingleFile:
    """A model, its layout checked and no weights read; hub: what `resolve` takes.

    use_ema and prediction_type: as `open_single_file` takes them; the latter also overrides a folder's scheduler config.
    vae: an autoencoder to take instead of the model's: a folder, a file, or a Hub id (its newest revision). use_ema is for it
    as well: of a folder's it must hold the moving average, of a single file's it may.
    Raises CheckpointError (HubError for the hub) if it cannot be had or is not SD 1.x or 2.x, ParameterError for the options.
    """
    if prediction_type is not None:
        choice("prediction_type", prediction_type, PREDICTION_TYPES)
    path = resolve(model, variant=variant, **hub)
    if path.is_file():
        if variant is not None:
            raise ParameterError("variant: is for folders; a single file has none")
        other = None if vae is None else _open_vae(vae, None, allow_pickle, None if use_ema else False, hub)
        return open_single_file(
            path, allow_pickle=allow_pickle, use_ema=use_ema, prediction_type=prediction_type, vae=other
        )
    if use_ema and vae is None:
        raise ParameterError("use_ema: is for single files; of a folder take the variant, if it has one")
    other = None if vae is None else _open_vae(vae, variant, allow_pickle, use_ema, hub)
    folder = open_folder(path, variant=variant, allow_pickle=allow_pickle, vae=other)
    if prediction_type is None:
        return folder
    return replace(folder, scheduler=folder.scheduler | {"prediction_type": prediction_type})


def _open_vae(
    vae: str | Path, variant: str | None, allow_pickle: bool, use_ema: bool | None, hub: dict[str, Any]
) -> AutoencoderFiles:
    path = resolve_autoencoder(vae, variant=variant, **hub | {"revision": None})
    return open_autoencoder(
        path, variant=None if path.is_file() else variant, allow_pickle=allow_pickle, use_ema=use_ema
    )
