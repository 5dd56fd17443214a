"""What a run shows of itself: the losses as a curve, and grids of pictures."""

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.images import to_pil, to_tensor
from fastsd.models.vae import VAE
from fastsd.picture_grid import grid
from fastsd.pipeline import Pipeline
from fastsd.training.data import Dataset
from fastsd.training.loop import LOG
from fastsd.training.model import Model
from fastsd.training.recipe import SampleOptions

logger = logging.getLogger("fastsd")

COLUMNS = 8


def draw_losses(folder: Path) -> None:
    """losses.png: every logged value over the steps, each in a panel of its own."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('losses.png: needs matplotlib; pip install "fastsd[train]"')
        return
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    names = [name for name in (lines[-1] if lines else {}) if name != "step"]
    if not names:
        return
    figure = Figure(figsize=(7, 2 * len(names)), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(names), 1, sharex=True)), names, strict=True):
        axes.plot([line["step"] for line in lines], [line.get(name) for line in lines], linewidth=0.8)
        axes.set_ylabel(name)
    axes.set_xlabel("step")
    figure.savefig(folder / "losses.png", dpi=100)


def draw_samples(
    model: Model, samples: SampleOptions, path: Path, source: str | None = None, lora: Path | None = None
) -> None:
    """A grid of the prompts' pictures, drawn by a Pipeline on the model's device.

    source: the folder, file or Hub id that the weights are read from, beside a LoRA; None: one is written of the model's own.
    """
    device = next(model.unet.parameters()).device
    with TemporaryDirectory() as folder:
        if source is None:
            source = str(Path(folder) / "model")
            model.save(Path(source))
        pipe = Pipeline(source, device=device, dtype="float32" if device.type == "cpu" else "auto")
        if lora is not None:
            pipe.load_lora_weights(lora)
        result = pipe.generate(
            samples.prompts,
            num_inference_steps=samples.num_inference_steps,
            guidance_scale=samples.guidance_scale,
            seed=samples.seed,
        )
    pictures: list[Any] = list(result.images)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, COLUMNS, samples.prompts).save(path)


@torch.inference_mode()
def draw_reconstructions(vae: VAE, dataset: Dataset, path: Path, count: int = 8) -> None:
    """Pictures of the data set above what the autoencoder makes of them."""
    pictures = [Image.fromarray(dataset.image(index)) for index in range(min(count, len(dataset)))]
    device = next(vae.parameters()).device
    made = to_pil(vae.decode(vae.encode(to_tensor(pictures, 1).to(device))))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid([*pictures, *made], len(pictures)).save(path)
