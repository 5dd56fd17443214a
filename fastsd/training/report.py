"""What a run shows of itself: the losses as a curve, and grids of pictures."""

import json
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastsd.images import to_pil
from fastsd.models.vae import VAE
from fastsd.pipeline import Pipeline
from fastsd.training.autoencoder import as_tensor
from fastsd.training.data import Dataset
from fastsd.training.loop import LOG
from fastsd.training.model import Model
from fastsd.training.recipe import SampleOptions

logger = logging.getLogger("fastsd")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    grid([np.asarray(image) for image in result.images], samples.prompts).save(path)


@torch.inference_mode()
def draw_reconstructions(vae: VAE, dataset: Dataset, path: Path, count: int = 8) -> None:
    """Pictures of the data set above what the autoencoder makes of them."""
    pictures = [dataset.image(index) for index in range(min(count, len(dataset)))]
    device = next(vae.parameters()).device
    out = vae.decode(vae.encode(torch.stack([as_tensor(picture) for picture in pictures]).to(device)))
    made = [np.asarray(picture) for picture in to_pil(out)]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid([*pictures, *made], columns=len(pictures)).save(path)


def grid(pictures: Sequence[np.ndarray], labels: Sequence[str] = (), columns: int = 8) -> Image.Image:
    """Pictures [H, W, 3] uint8 of one size in rows, with their labels below them."""
    height, width = pictures[0].shape[:2]
    margin = 30 if labels else 2
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * (width + 2), rows * (height + margin)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        x, y = index % columns * (width + 2), index // columns * (height + margin)
        sheet.paste(Image.fromarray(picture), (x, y))
        if labels:
            text = textwrap.fill(labels[index], max(8, width // 5))
            pen.multiline_text((x + 2, y + height), text, fill="black", font_size=8, spacing=1)
    return sheet
