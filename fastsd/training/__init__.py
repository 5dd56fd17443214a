"""Training: the autoencoder, the diffusion model with its text encoder, and LoRAs. docs/TRAINING.md is the guide.

`fastsd train` and `train(read_recipe(path))` run a config; `fit` is the loop alone, for a `Task` of one's own.
"""

from fastsd.training.data import Caption, Dataset
from fastsd.training.diffusion import timestep_weights
from fastsd.training.loop import FitOptions, Task, fit, learning_rate
from fastsd.training.recipe import Recipe, read_recipe
from fastsd.training.run import train

__all__ = [
    "Caption",
    "Dataset",
    "FitOptions",
    "Recipe",
    "Task",
    "fit",
    "learning_rate",
    "read_recipe",
    "timestep_weights",
    "train",
]
