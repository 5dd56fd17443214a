"""A model, a recipe and a task small enough to be trained within a test. Processes that tests start import this file too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastsd.training.data import Batch, Draws, Source
from fastsd.training.loop import CHECKPOINT, LOG, FitOptions, Task, fit
from fastsd.training.model import Model, load_model, new_model
from fastsd.training.recipe import ModelOptions, Recipe, read_recipe
from fastsd.training.shapes import Shapes
from tests.oracle import randomise

CPU = torch.device("cpu")
RESOLUTION = 32
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "sample_size": RESOLUTION,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,
}
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MAX_LENGTH = 24
OPTIONS = ModelOptions(UNET, VAE, CLIP, SCHEDULER, MAX_LENGTH)


def drawings(size: int = 12) -> Shapes:
    return Shapes(size, RESOLUTION)


def save_new_model(path: Path) -> Path:
    """With the weights that training begins from: the UNet then predicts zero whatever it is given."""
    new_model(OPTIONS, drawings(200), 0, path)
    return path


def trained_model(path: Path) -> Model:
    """With weights and biases at random, as training leaves them: nothing is zero, so nothing hides."""
    model = load_model(path, CPU)
    for seed, net in enumerate((model.unet, model.vae, model.text_encoder)):
        randomise(net.requires_grad_(True), seed)
    return model


class Numbers:
    """Items of six numbers: some by the index, some by the random numbers that the item is given. A `Source`."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def item(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
        fixed = np.sin(np.arange(1.0, 4.0) * (index + 1))
        return {"x": torch.tensor(np.concatenate([fixed, rng.normal(size=3)]), dtype=torch.float32), "index": index}


class Toy(Task):
    """Two layers whose loss depends on everything that a task is given: items, draws, progress.

    fail_from: the progress from which the loss ("loss") or the gradient alone ("gradient") is not a number.
    """

    def __init__(self, fail: str = "", fail_from: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
        self.fail, self.fail_from = fail, fail_from

    def losses(self, batch: Batch, draws: Draws, progress: float) -> dict[str, Tensor]:
        x: Tensor = batch["x"]
        out = self.net(x + 0.3 * draws.normal(6)).float()
        error = (out - x).square().mean()
        if self.fail and progress >= self.fail_from:
            weight = self.net[0].bias
            error = (
                error * float("nan") if self.fail == "loss" else error + (weight - weight.detach()).abs().sum().sqrt()
            )
        return {"loss": (1 + progress) * error, "error": error.detach()}


def options(**changes: Any) -> FitOptions:
    """Of the toy: seven steps whose batches of four do not divide its ten items, so that epochs end within batches."""
    few: dict[str, Any] = {"steps": 7, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 2, "log_every": 1}
    return FitOptions(**few | {"ema_decay": 0.9, "clip_norm": 0.5} | changes)


def fit_in_parts(folder: Path, stops: list[int | None], source: Source | None = None, **changes: Any) -> Toy:
    """A toy fitted in runs of so many steps (None: to the end), each with a task of its own, as a new program would have."""
    for stop in stops:
        task = Toy()
        fit(task, source or Numbers(), options(**changes), folder, stop_after=stop)
    return task


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def differing(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """The places where two nests of dictionaries and tensors differ in any bit."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [where]
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{where}: keys"]
        return [place for key in ours for place in differing(ours[key], theirs[key], f"{where}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            place for i, pair in enumerate(zip(ours, theirs, strict=True)) for place in differing(*pair, f"{where}/{i}")
        ]
    return [] if ours == theirs else [where]


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def files(folder: Path, pattern: str = "*.safetensors") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(pattern))}


RECIPE = """
output = "runs"
{head}
[data]
resolution = 32
size = 12
{data}
[samples]
guidance_scale = 2.0
num_inference_steps = 2
prompts = ["a red circle", "two green hearts"]
{stages}
"""
FIT = "steps = 3, batch_size = 2, learning_rate = 1e-3, warmup_steps = 1, ema_decay = 0.5, log_every = 1"
TEXT = f'[[stages]]\nkind = "text"\nname = "text"\nfit = {{ {FIT} }}\n'
AUTOENCODER = f"""[[stages]]
kind = "autoencoder"
name = "autoencoder"
crop = 16
loss = {{ posterior_logvar = -4.0, colour_pull = 0.3 }}
fit = {{ {FIT}, sample_every = 2 }}
"""
DIFFUSION = f"""[[stages]]
kind = "diffusion"
name = "diffusion"
train_text_encoder = true
loss = {{ measure = "v", min_snr_gamma = 5.0, claims = 0.01 }}
fit = {{ {FIT}, sample_every = 3 }}
"""
LORA = f"""[[stages]]
kind = "lora"
name = "lora"
rank = 2
text_layers = ["q_proj", "out_proj"]
fit = {{ {FIT}, sample_every = 3 }}
"""


def new_model_head() -> str:
    """[model] as TOML, which also reads these JSON values."""
    parts = {"unet": UNET, "vae": VAE, "text_encoder": CLIP, "scheduler": SCHEDULER}
    lines = [f"[model]\nmax_length = {MAX_LENGTH}"]
    for part, config in parts.items():
        lines += [f"[model.{part}]", *(f"{key} = {json.dumps(value)}" for key, value in config.items())]
    return "\n".join(lines)


def recipe_file(path: Path, stages: str, head: str | None = None, data: str = "") -> Path:
    path.write_text(RECIPE.format(head=new_model_head() if head is None else head, data=data, stages=stages))
    return path


def recipe(folder: Path, stages: str, head: str | None = None, data: str = "") -> Recipe:
    """Read from a file in the folder, and writing to folder/runs."""
    text = recipe_file(folder / "recipe.toml", stages, head, data)
    text.write_text(text.read_text().replace('output = "runs"', f"output = {json.dumps(str(folder / 'runs'))}"))
    return read_recipe(text)


def picture_folder(path: Path, count: int = 3) -> Path:
    """Pictures of several sizes and kinds, each with a caption beside it."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (5 + index, 7, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((40 + 10 * index, 36), Image.Resampling.BICUBIC).save(path / f"{index}.png")
        (path / f"{index}.txt").write_text(f"picture {index} of a red thing\n")
    return path
