"""Checkpoints: from a local diffusers folder or the Hugging Face hub to weights in a module, safely."""

from fastsd.checkpoints.folder import ModelFolder, open_folder
from fastsd.checkpoints.hub import resolve

__all__ = ["ModelFolder", "open_folder", "resolve"]
