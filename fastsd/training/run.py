"""A recipe from its first stage to the model: each stage begins from the folder that the one before has written.

OUTPUT/start/          the model that it begins from, if it begins from nothing
OUTPUT/<stage>/        checkpoint.pt, losses.jsonl, losses.png, samples/, and at the end model/ or lora.safetensors
OUTPUT/model/          the last stage's model, in the recipe's dtype
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fastsd.checkpoints.folder_writer import written
from fastsd.device import select_device
from fastsd.errors import ParameterError
from fastsd.training import parallel, report
from fastsd.training.autoencoder import AutoencoderTask, Pictures, fix_posterior
from fastsd.training.claims import Captions, ClaimsTask, Slots
from fastsd.training.data import Dataset, Source, fingerprint
from fastsd.training.determinism import fix_cublas
from fastsd.training.diffusion import CaptionedLatents, DiffusionTask
from fastsd.training.folder_data import PictureFolder
from fastsd.training.latents import cached_latents, measured_scale
from fastsd.training.loop import CHECKPOINT, Task, fit
from fastsd.training.lora import add_lora, save_lora
from fastsd.training.model import Model, grow_unet, load_model, new_model
from fastsd.training.recipe import (
    AutoencoderStage,
    DiffusionStage,
    LoraStage,
    ModelOptions,
    Recipe,
    Stage,
    TextStage,
)
from fastsd.training.shapes import Shapes
from fastsd.wording import quoted

LORA = "lora.safetensors"


def train(recipe: Recipe, stop_after: int | None = None, dataset: Dataset | None = None) -> bool:
    """Run the recipe, or go on with it, and write its results to its output folder.

    stop_after: end after that many steps of the stage at hand, with a checkpoint to go on from. dataset: instead of the recipe's.
    Returns whether all is done.
    Raises ParameterError, CheckpointError, NumericsError.
    """
    fix_cublas()
    dataset = open_dataset(recipe) if dataset is None else dataset
    output = Path(recipe.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"output: {quoted(recipe.output)} cannot be made a folder: {error.strerror}") from error
    source = recipe.base
    if recipe.model is not None:
        source = str(_start(recipe, recipe.model, dataset, output))
    assert source is not None
    before = source if recipe.base else ""
    for stage in recipe.stages:
        folder = output / stage.name
        result = folder / (LORA if isinstance(stage, LoraStage) else "model")
        before = _check_same(
            folder, recipe, stage, dataset, before, folder.joinpath(CHECKPOINT).exists() or result.exists()
        )
        if not result.exists():
            parallel.launch(run_stage, recipe.processes, recipe.threads, recipe, stage, source, dataset, stop_after)
            if not result.exists():
                return False
        source = str(result)
    if not isinstance(recipe.stages[-1], LoraStage):  # always: what lies there may be of a recipe with fewer stages
        load_model(source, torch.device("cpu")).save(output / "model", getattr(torch, recipe.dtype))
    return True


def _start(recipe: Recipe, options: ModelOptions, dataset: Dataset, output: Path) -> Path:
    """The model with initial weights, written once. ParameterError if it was written for another config."""
    start, path = output / "start", output / "start.json"
    begun = {"model": asdict(options), "data": asdict(recipe.data), "seed": recipe.seed}
    text = json.dumps(begun, indent=1)
    if not start.exists():
        path.write_text(text, encoding="utf-8")
        new_model(options, dataset, recipe.seed, start)
    elif path.exists() and path.read_text(encoding="utf-8") != text:
        raise ParameterError("output: start/ was made for another [model], [data] or seed; choose another output")
    return start


def open_dataset(recipe: Recipe) -> Dataset:
    data = recipe.data
    if data.path is None:
        return Shapes(data.size, data.resolution, data.seed)
    return PictureFolder(Path(data.path), data.resolution)


def run_stage(recipe: Recipe, stage: Stage, source: str, dataset: Dataset, stop_after: int | None) -> None:
    """Fit one stage, in each of the processes; the first of them writes the result."""
    device = _own_device(recipe)
    model = load_model(source, device)
    _check_sides(recipe, stage, model)
    folder = Path(recipe.output) / stage.name
    torch.manual_seed(recipe.seed)  # of what a task adds to the model
    prepared = _PREPARE[type(stage)](Run(recipe, stage, source, folder, dataset, model))
    prepared.task.to(device)  # what the task adds to the nets
    first = parallel.rank() == 0

    def show(step: int) -> None:
        report.draw_losses(folder)
        if prepared.draw is not None:
            prepared.draw(step)

    done = fit(prepared.task, prepared.data, stage.fit, folder, show if first else None, stop_after)
    if done and first:
        prepared.finish()
    if first:
        report.draw_losses(folder)
    parallel.wait()


@dataclass(frozen=True)
class Run:
    """What a stage works on."""

    recipe: Recipe
    stage: Stage
    source: str
    folder: Path
    dataset: Dataset
    model: Model

    @property
    def slots(self) -> Slots:
        slots: Slots | None = getattr(self.dataset, "slots", None)
        if slots is None:
            raise ParameterError(
                f"config.stages.{self.stage.name}: the data set does not say what its captions state (`slots`); text stages and "
                "loss.claims are for those that do, as the drawings"
            )
        return slots

    def sheet(self, step: int) -> Path:
        """Where the pictures drawn at a step go."""
        return self.folder / "samples" / f"{step:06}.png"

    def sample(self, step: int, source: str | None = None, lora: Path | None = None) -> None:
        """The prompts' pictures, if there are prompts, of the model as it is; source, lora: see `report.draw_samples`."""
        if self.recipe.samples.prompts:
            report.draw_samples(self.model, self.recipe.samples, self.sheet(step), source, lora)


@dataclass(frozen=True)
class Prepared:
    """task and data for `fit`; draw: at a step, a grid of pictures; finish: write the result."""

    task: Task
    data: Source
    draw: Callable[[int], None] | None
    finish: Callable[[], None]


def _autoencoder(run: Run) -> Prepared:
    stage, vae = run.stage, run.model.vae
    assert isinstance(stage, AutoencoderStage)
    vae.requires_grad_(True)
    data = Pictures(run.dataset, stage.crop)

    def finish() -> None:
        if not stage.loss.freeze_encoder:
            if stage.loss.posterior_logvar is not None:
                fix_posterior(vae, stage.loss.posterior_logvar)
            run.model.configs["vae"]["scaling_factor"] = measured_scale(run.model, run.dataset)
        run.model.save(run.folder / "model")

    def draw(step: int) -> None:
        report.draw_reconstructions(vae, run.dataset, run.sheet(step))

    return Prepared(AutoencoderTask(vae, stage.loss), data, draw, finish)


def _text(run: Run) -> Prepared:
    stage, model = run.stage, run.model
    assert isinstance(stage, TextStage)
    model.text_encoder.requires_grad_(True)
    captions = Captions(run.dataset, model.tokenizer, run.slots, stage.dropout)
    task = ClaimsTask(model.text_encoder, run.slots)
    return Prepared(task, captions, None, lambda: model.save(run.folder / "model"))


def _diffusion(run: Run) -> Prepared:
    stage, model = run.stage, run.model
    assert isinstance(stage, DiffusionStage)
    if stage.grow:
        grow_unet(model, stage.grow)
    model.unet.requires_grad_(True)
    model.text_encoder.requires_grad_(stage.train_text_encoder)
    return Prepared(
        _diffusion_task(run, stage), _latents(run, stage), run.sample, lambda: model.save(run.folder / "model")
    )


def _lora(run: Run) -> Prepared:
    stage, model = run.stage, run.model
    assert isinstance(stage, LoraStage)
    updates = add_lora(model.unet, "unet", stage.layers, stage.rank, stage.alpha)
    if stage.text_layers:
        updates |= add_lora(model.text_encoder, "text_encoder", stage.text_layers, stage.rank, stage.alpha)
    if not updates:
        raise ParameterError(
            f"config.stages.{stage.name}: layers and text_layers name no layer; there is nothing to train"
        )
    dtype = getattr(torch, run.recipe.dtype)

    def draw(step: int) -> None:
        with TemporaryDirectory() as folder:
            file = Path(folder) / LORA
            save_lora(file, updates, torch.float32)
            run.sample(step, run.source, file)

    task = _diffusion_task(run, stage)
    return Prepared(task, _latents(run, stage), draw, lambda: save_lora(run.folder / LORA, updates, dtype))


_PREPARE: dict[type[Stage], Callable[[Run], Prepared]] = {
    AutoencoderStage: _autoencoder,
    TextStage: _text,
    DiffusionStage: _diffusion,
    LoraStage: _lora,
}


def _diffusion_task(run: Run, stage: DiffusionStage | LoraStage) -> DiffusionTask:
    slots = run.slots if stage.loss.claims else None
    return DiffusionTask(run.model.unet, run.model.text_encoder, run.model.schedule, stage.loss, slots)


def _latents(run: Run, stage: DiffusionStage | LoraStage) -> CaptionedLatents:
    slots = run.slots if stage.loss.claims else {}
    brief = stage.brief_captions if isinstance(stage, DiffusionStage) else 0.0
    if brief and not hasattr(run.dataset, "brief_caption"):
        raise ParameterError(
            f"config.stages.{stage.name}.brief_captions: the data set has none (`brief_caption`); leave it 0"
        )
    captions = Captions(run.dataset, run.model.tokenizer, slots, stage.dropout, brief)
    return CaptionedLatents(
        cached_latents(run.model, run.dataset, asdict(run.recipe.data), run.folder.parent), captions
    )


def _own_device(recipe: Recipe) -> torch.device:
    device = select_device(recipe.device)
    return torch.device("cuda", parallel.rank()) if device.type == "cuda" and recipe.processes > 1 else device


def _check_sides(recipe: Recipe, stage: Stage, model: Model) -> None:
    factor = model.vae.config.downscale
    sides = {"data.resolution": recipe.data.resolution}
    if isinstance(stage, AutoencoderStage) and stage.crop is not None:
        sides[f"stages.{stage.name}.crop"] = stage.crop
    for name, side in sides.items():
        if side % factor:
            raise ParameterError(f"config.{name}: {side} is not a multiple of {factor}, the autoencoder's factor")
    taken, given = model.unet.config.in_channels, model.vae.config.latent_channels
    if isinstance(stage, DiffusionStage | LoraStage) and taken != given:
        raise ParameterError(
            f"config.stages.{stage.name}: the UNet takes {taken} channels, but latents have {given}; fastsd trains models that "
            "draw from text alone, not those for inpainting"
        )


def _check_same(folder: Path, recipe: Recipe, stage: Stage, dataset: Dataset, before: str, begun: bool) -> str:
    """The digest of a stage, which is of all that its result depends on: `before` is that of the stage before.

    ParameterError if the folder holds one that was begun otherwise; begun: whether it holds any steps.
    """
    fit_options = {
        name: value
        for name, value in asdict(stage.fit).items()
        if name not in ("log_every", "checkpoint_every", "sample_every", "workers")  # these do not change the result
    }
    options = asdict(stage) | {"fit": fit_options}
    if isinstance(stage, LoraStage):
        options["dtype"] = recipe.dtype  # of its file; a model's is that of model/ in the end
    data = asdict(recipe.data) | {"pictures": len(dataset), "fingerprint": fingerprint(dataset)}
    text = json.dumps({"stage": options, "data": data, "before": before, "processes": recipe.processes}, indent=1)
    path = folder / "stage.json"
    if begun and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ParameterError(
            f"output: {folder.name}/ was begun with another config or other data; remove it to train that stage anew, or choose "
            "another output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()
