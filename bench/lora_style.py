"""`python -m bench.lora_style`: a LoRA trained for a few minutes on pictures of one style, and what it does to other prompts.

The pictures are drawings whose objects are outlines instead of filled; their captions do not say so. The LoRA is trained by
a config on a folder of them, as a user's would be. Then prompts are drawn without it, with it, and after it is taken off,
which must give back the first pictures to the last bit.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import fastsd
from bench import record
from bench.shape_reader import CONTRAST
from fastsd.errors import FastSDError
from fastsd.picture_grid import grid
from fastsd.pipeline import BUNDLED
from fastsd.training import read_recipe, train
from fastsd.training.shape_captions import describe
from fastsd.training.shape_scenes import draw
from fastsd.training.shapes import Shapes

STROKE = 0.035
HOLLOW = 0.7
"""An object of which less is filled, holes and all, is an outline. A ring's own hole leaves it at 0.69: it is not asked for."""
PROMPTS = (
    "a large red circle in the center on a white background",
    "a large blue star on the left on a black background",
    "a small green square in the top right corner on a gray background",
    "three orange hearts on a white background",
    "a large purple triangle above a large yellow diamond on a black background",
    "two brown crosses on a cyan background",
    "a large pink moon at the bottom on a white background",
    "a large yellow heart right of a large blue circle on a gray background",
)
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")

CONFIG = """\
output = "{folder}/run"
base = "{model}"
device = "{device}"
processes = {processes}
threads = {threads}

[data]
path = "{folder}/pictures"
resolution = {resolution}

[[stages]]
kind = "lora"
rank = 8
layers = {layers}
loss = {{ measure = "v", min_snr_gamma = 5.0, least_weight = 0.2 }}
fit = {{ steps = {steps}, batch_size = 16, learning_rate = 2e-3, warmup_steps = 20, ema_decay = 0.98 }}
"""


def write_pictures(folder: Path, count: int, resolution: int) -> None:
    """Outlined drawings, each with a text file that holds four captions."""
    folder.mkdir(parents=True)
    scenes = Shapes(seed=1)
    for index in range(count):
        rng, scene = np.random.default_rng((1, index)), scenes.scene(index)
        Image.fromarray(draw(scene, rng, resolution, STROKE)).save(folder / f"{index:04}.png")
        lines = [describe(scene, rng).text for _ in range(4)]
        (folder / f"{index:04}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def filled(picture: Image.Image) -> list[float]:
    """Of each object in a picture how much of what its outline encloses is of its colour."""
    pixels = np.asarray(picture, np.float32)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0)
    mask = np.linalg.norm(pixels - background, axis=-1) > 2 * CONTRAST
    labels, count = ndimage.label(mask)
    shares = []
    for index in range(1, count + 1):
        whole = ndimage.binary_fill_holes(labels == index)
        if whole.sum() > 0.002 * mask.size:
            shares.append(float((labels == index).sum() / whole.sum()))
    return shares


def outlined(pictures: list[Image.Image]) -> float:
    """The share of pictures all of whose objects are outlines."""
    shares = [filled(picture) for picture in pictures]
    return sum(bool(s) and max(s) < HOLLOW for s in shares) / len(shares)


def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = args.folder
    shutil.rmtree(folder, ignore_errors=True)
    pipe = fastsd.Pipeline(args.model, device=args.device)
    resolution = pipe.config.unet.sample_size * pipe.config.vae.downscale
    write_pictures(folder / "pictures", args.pictures, resolution)
    config = folder / "lora.toml"
    layers = "[" + ", ".join(f'"{layer}"' for layer in LAYERS) + "]"
    options = {"folder": folder, "layers": layers, "model": args.model, "resolution": resolution}
    config.write_text(
        CONFIG.format(**options, **{k: getattr(args, k) for k in ("device", "processes", "threads", "steps")})
    )
    start = time.perf_counter()
    train(read_recipe(config))
    seconds = time.perf_counter() - start

    def pictures() -> list[Image.Image]:
        return pipe.generate(list(PROMPTS), seed=0, num_inference_steps=20, guidance_scale=2.5).images

    before = pictures()
    pipe.load_lora_weights(folder / "run/lora/lora.safetensors")
    with_lora = pictures()
    pipe.unload_lora_weights()
    after = pictures()
    same = all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))
    if args.grid is not None:
        grid([*before, *with_lora, *after], len(PROMPTS)).save(args.grid)
    return record.header() | {
        "model": pipe.name,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "pictures": args.pictures,
        "steps": args.steps,
        "training_seconds": round(seconds, 1),
        "outlined": {"without": outlined(before), "with": outlined(with_lora), "taken off": outlined(after)},
        "first_pictures_restored": same,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lora_style", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED), help="a folder (default: the bundled one)")
    parser.add_argument("--folder", type=Path, default=Path("build/lora-style"), help="for the training; emptied first")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/lora-style-<device>.json)")
    parser.add_argument("--grid", type=Path, help="PNG: pictures without, with and after the LoRA, a row each")
    args = parser.parse_args(argv)
    try:
        result = run(args)
    except FastSDError as error:
        print(f"bench.lora_style: {error}")
        return 2
    out = args.out or record.RESULTS / f"lora-style-{result['device'].split(':')[0]}.json"
    record.save(out, result)
    print(f"{result['steps']} steps on {result['pictures']} pictures in {result['training_seconds']} s")
    print("outlined: " + ", ".join(f"{name} {share:.0%}" for name, share in result["outlined"].items()))
    print(
        f"taken off, the first pictures are back to the last bit: {result['first_pictures_restored']}; written to {out}"
    )
    changed = result["outlined"]["with"] - result["outlined"]["without"] >= 0.5
    return 0 if result["first_pictures_restored"] and changed else 1


if __name__ == "__main__":
    sys.exit(main())
