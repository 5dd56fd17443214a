"""Checkpoints: from a folder, a single file or the Hugging Face hub to weights in a module, safely."""

from fastsd.checkpoints.folder import ModelFolder, open_folder
from fastsd.checkpoints.hub import resolve
from fastsd.checkpoints.opening import open_model
from fastsd.checkpoints.single_file import SingleFile, open_single_file

__all__ = ["ModelFolder", "SingleFile", "open_folder", "open_model", "open_single_file", "resolve"]
