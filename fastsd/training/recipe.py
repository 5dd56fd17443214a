"""A training run as a TOML file: data, the model it begins from, and the stages, each fitted in turn.

    output = "runs/mine"
    base = "path/to/model"            # or a [model] with the configs of a model to begin from nothing
    [data]
    path = "pictures"                 # with captions beside them
    [[stages]]
    kind = "lora"
    fit = { steps = 1000, batch_size = 4 }

Every key has a field in a dataclass here or in the modules that the stages use; docs/TRAINING.md explains them.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from fastsd.checks import integer, number
from fastsd.errors import ParameterError
from fastsd.training.autoencoder import AutoencoderLoss
from fastsd.training.diffusion import DiffusionLoss
from fastsd.training.loop import FitOptions
from fastsd.wording import quoted

T = TypeVar("T")
LARGEST_BATCH, LARGEST_RANK = 65_536, 4096
_AUTOENCODER_LOSS, _DIFFUSION_LOSS = AutoencoderLoss(), DiffusionLoss()


@dataclass(frozen=True)
class DataOptions:
    """Where pictures and captions come from: a folder, or the procedural data set."""

    path: str | None = None  # pictures with captions; None: the drawings of shapes.py
    resolution: int = 512  # pixels of the square pictures
    size: int = 100_000  # drawings
    seed: int = 0  # of the drawings


@dataclass(frozen=True)
class ModelOptions:
    """A model to begin from nothing: the configs of its nets, with diffusers' keys. The vocabulary is made from the captions."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    max_length: int = 77  # tokens of a prompt


@dataclass(frozen=True)
class SampleOptions:
    """The pictures drawn on the way (FitOptions.sample_every)."""

    prompts: tuple[str, ...] = ()
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0


_SAMPLES = SampleOptions()


@dataclass(frozen=True)
class AutoencoderStage:
    """Trains the VAE; at the end its scaling factor is measured anew, unless the encoder is frozen."""

    kind: Literal["autoencoder"]
    name: str
    fit: FitOptions
    loss: AutoencoderLoss = _AUTOENCODER_LOSS
    crop: int | None = None  # pixels of random square crops; None: whole pictures


@dataclass(frozen=True)
class TextStage:
    """Trains the text encoder to read what captions state; for data sets that know it."""

    kind: Literal["text"]
    name: str
    fit: FitOptions
    dropout: float = 0.05  # captions replaced by the empty one


@dataclass(frozen=True)
class DiffusionStage:
    """Trains the UNet, and the text encoder if asked, on cached latents."""

    kind: Literal["diffusion"]
    name: str
    fit: FitOptions
    loss: DiffusionLoss = _DIFFUSION_LOSS
    dropout: float = 0.1  # captions replaced by the empty one, so that there is guidance (Ho & Salimans 2022)
    brief_captions: float = 0.0  # the share that says no more than it must, of data sets that have such (the drawings)
    train_text_encoder: bool = False
    grow: dict[str, Any] | None = None  # keys of the UNet's config that change: more layers than before


@dataclass(frozen=True)
class LoraStage:
    """Trains a LoRA for the model, which stays as it is (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"]
    name: str
    fit: FitOptions
    loss: DiffusionLoss = _DIFFUSION_LOSS
    dropout: float = 0.1
    rank: int = 8
    alpha: float = 8.0  # the update's scale is alpha / rank
    layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # the endings of the names of the UNet's layers
    text_layers: tuple[str, ...] = ()  # and of the text encoder's, e.g. "q_proj"; none: it is not trained


Stage = AutoencoderStage | TextStage | DiffusionStage | LoraStage
STAGES: Mapping[str, type[Stage]] = {
    "autoencoder": AutoencoderStage,
    "text": TextStage,
    "diffusion": DiffusionStage,
    "lora": LoraStage,
}


@dataclass(frozen=True)
class Recipe:
    output: str  # the folder for everything the run writes
    data: DataOptions
    stages: tuple[Stage, ...]
    base: str | None = None  # a folder, a single file or a Hub id to begin from
    model: ModelOptions | None = None  # or a model to begin from nothing
    samples: SampleOptions = _SAMPLES
    device: str = "auto"
    processes: int = 1  # that share each batch
    threads: int = 0  # of PyTorch in each; 0: all cores
    seed: int = 0  # of initial weights
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"  # of the model or LoRA that is written in the end


def read_recipe(path: Path) -> Recipe:
    """Raises ParameterError for a file that cannot be read and for keys and values that it must not hold."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"config: {quoted(str(path))} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ParameterError(f"config: {quoted(str(path))} is no TOML: {error}") from error
    recipe = typed(Recipe, table, "config")
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    if (recipe.base is None) == (recipe.model is None):
        raise ParameterError("config: needs either base, a model to begin from, or [model], the configs of a new one")
    if not recipe.output.strip():
        raise ParameterError("config.output: must name a folder")
    if not recipe.stages:
        raise ParameterError("config: has no [[stages]]; there is nothing to train")
    names = [stage.name for stage in recipe.stages]
    taken = {"start", "start-vocabulary", "model"}
    if len({*names, *taken}) < len(names) + len(taken) or not all(map(_folder_name, names)):
        raise ParameterError("config.stages: each needs a name of its own, and not start or model: it is a folder's")
    if recipe.data.resolution < 8 or recipe.data.size < 1 or recipe.data.seed < 0 or recipe.seed < 0:
        raise ParameterError("config.data: resolution must be at least 8, size at least 1, and no seed below 0")
    if recipe.processes < 1 or recipe.threads < 0:
        raise ParameterError("config: processes must be at least 1 and threads at least 0")
    if any(stage.kind == "lora" for stage in recipe.stages[:-1]):
        raise ParameterError("config.stages: a lora stage must be the last: it leaves the model as it is")
    integer("config.samples.num_inference_steps", recipe.samples.num_inference_steps, 1, None)
    number("config.samples.guidance_scale", recipe.samples.guidance_scale, -1e4, 1e4)
    integer("config.samples.seed", recipe.samples.seed, 0, 2**63 - 1)
    for stage in recipe.stages:
        _check_stage(stage, recipe)


def _check_stage(stage: Stage, recipe: Recipe) -> None:
    where, fit = f"config.stages.{stage.name}", stage.fit
    for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
        if getattr(fit, name) < 1:
            raise ParameterError(f"{where}.fit.{name}: must be at least 1")
    if fit.batch_size > LARGEST_BATCH:
        raise ParameterError(f"{where}.fit.batch_size: must be at most {LARGEST_BATCH}")
    if fit.batch_size % recipe.processes:
        raise ParameterError(
            f"{where}.fit.batch_size: {fit.batch_size} is not a multiple of {recipe.processes} processes"
        )
    if not 0 < fit.learning_rate < 1 or not 0 <= fit.ema_decay < 1 or fit.warmup_steps < 0 or fit.clip_norm < 0:
        raise ParameterError(
            f"{where}.fit: learning_rate must be in (0, 1), ema_decay in [0, 1), warmup_steps and clip_norm at least 0"
        )
    if not all(0 <= beta < 1 for beta in fit.betas) or not 0 <= fit.final_rate <= 1 or not fit.weight_decay >= 0:
        raise ParameterError(f"{where}.fit: betas must be in [0, 1), final_rate in [0, 1], weight_decay at least 0")
    if not fit.ema_ramp > 0:
        raise ParameterError(f"{where}.fit.ema_ramp: must be above 0")
    if min(fit.seed, fit.sample_every, fit.workers) < 0:
        raise ParameterError(f"{where}.fit: seed, sample_every and workers must be at least 0")
    if not isinstance(stage, AutoencoderStage) and not 0 <= stage.dropout < 1:
        raise ParameterError(f"{where}.dropout: must be in [0, 1)")
    if isinstance(stage, DiffusionStage) and not 0 <= stage.brief_captions <= 1:
        raise ParameterError(f"{where}.brief_captions: must be in [0, 1]")
    if isinstance(stage, LoraStage) and (not 1 <= stage.rank <= LARGEST_RANK or stage.alpha <= 0):
        raise ParameterError(f"{where}: rank must be at least 1 and at most {LARGEST_RANK}, and alpha above 0")
    if isinstance(stage, AutoencoderStage) and stage.crop is not None and not 8 <= stage.crop <= recipe.data.resolution:
        raise ParameterError(f"{where}.crop: must be from 8 to the resolution, {recipe.data.resolution}")
    if not isinstance(stage, TextStage):
        _check_loss(stage.loss, f"{where}.loss")


def _check_loss(loss: AutoencoderLoss | DiffusionLoss, where: str) -> None:
    """Every number of a loss is a weight, at least 0, but these."""
    if isinstance(loss, DiffusionLoss):
        number(f"{where}.noise_bias", loss.noise_bias, -10, 10)  # beyond, some timestep is hardly ever drawn
        if (loss.min_snr_gamma is not None and loss.min_snr_gamma <= 0) or loss.greatest_weight <= 0:
            raise ParameterError(f"{where}: min_snr_gamma and greatest_weight must be above 0")
    for name, value in vars(loss).items():
        if name not in ("noise_bias", "posterior_logvar") and isinstance(value, float) and value < 0:
            raise ParameterError(f"{where}.{name}: must be at least 0")


def _folder_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not any(c in "/\\:" or not c.isprintable() for c in name)


def typed(kind: type[T], table: Any, where: str) -> T:
    """A dataclass from a TOML table. Raises ParameterError, with the place, for keys and types that do not fit."""
    if not isinstance(table, dict):
        raise ParameterError(f"{where}: must be a table, not {quoted(table)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = table.keys() - fields.keys()
    if unknown:
        raise ParameterError(f"{where}: unknown {quoted(min(unknown))}; it knows {', '.join(fields)}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in table]
    if missing:
        raise ParameterError(f"{where}: {missing[0]} is missing")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in table.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """value as the type `hint`, of those that the dataclasses above have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint == Stage:
        kind = str(value.get("kind")) if isinstance(value, dict) else ""
        if kind not in STAGES:
            raise ParameterError(f"{where}: kind must be one of {', '.join(STAGES)}, not {quoted(kind)}")
        return typed(STAGES[kind], {"name": kind} | value, where)
    if origin in (types.UnionType, typing.Union):
        return _value(next(argument for argument in arguments if argument is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ParameterError(f"{where}: must be one of {', '.join(arguments)}, not {quoted(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise ParameterError(f"{where}: must be a list, not {quoted(value)}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return typed(cast(type, hint), value, where)
    plain = origin or hint
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ParameterError(f"{where}: must fit in 64 bits, not {quoted(value)}")
    if plain is float and type(value) is int:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        raise ParameterError(f"{where}: must be a finite number, not {value}")
    if type(value) is not plain:
        raise ParameterError(f"{where}: must be {_KINDS[plain]}, not {quoted(value)}")
    return value


_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a table"}
