"""Checkpoints: from a folder, a single file or the Hugging Face hub to weights in a module, safely."""

from fastsd.checkpoints.autoencoder import AutoencoderFiles, open_autoencoder
from fastsd.checkpoints.folder import ModelFolder, open_folder
from fastsd.checkpoints.hub import resolve, resolve_autoencoder
from fastsd.checkpoints.opening import open_model
from fastsd.checkpoints.single_file import SingleFile, open_single_file

__all__ = [
    "AutoencoderFiles",
    "ModelFolder",
    "SingleFile",
    "open_autoencoder",
    "open_folder",
    "open_model",
    "open_single_file",
    "resolve",
    "resolve_autoencoder",
]
