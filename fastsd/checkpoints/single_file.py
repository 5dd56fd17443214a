"""Opening a whole model in one file (LDM keys), as CompVis and Stability AI publish and most finetunes are shared.

header ─► names, shapes ─► configs ─► table of names ─► three parts, each loaded as if it were a diffusers component

Nothing is asked of a network: configs are worked out from the tensors (or read from the metadata that `fastsd convert` writes),
and CLIP's vocabulary comes with fastsd.
"""

import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastsd.checkpoints import ldm_config, ldm_keys
from fastsd.checkpoints.architecture import INPUT_CHANNELS, RUN_INPUT_CHANNELS, recognise_single_file
from fastsd.checkpoints.file_bytes import LEGACY_PICKLE, opened
from fastsd.checkpoints.ldm_config import Json, Shapes
from fastsd.checkpoints.pickle_file import PickleFile, open_pickle
from fastsd.checkpoints.safetensors_file import SafetensorsFile, TensorSpec, open_safetensors
from fastsd.checkpoints.strict_json import parse_object, read_json
from fastsd.checkpoints.weight_files import COMPONENTS
from fastsd.checkpoints.weights import WeightFile, fill_module
from fastsd.config import ModelConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.wording import listed, shown

logger = logging.getLogger("fastsd")

CLIP_VOCABULARY = Path(__file__).parent.parent / "assets" / "clip-vocabulary"
"""The tokenizer of SD 1.x, in a folder as transformers writes one."""

CONFIG_KEY = "fastsd"
"""Where `fastsd convert` puts a model's configs in a safetensors file's metadata."""

CONFIGS = (*COMPONENTS, "scheduler")
VOCABULARY_FILES = ("vocab.json", "merges.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass(frozen=True)
class Part:
    """The tensors of one component within a single file, under diffusers' names."""

    label: str
    tensors: dict[str, TensorSpec]
    file: SafetensorsFile | PickleFile
    pieces: dict[str, tuple[str, ...]]  # name in the file → diffusers' names for its equal parts, one below the other

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors; q, k and v of OpenCLIP share memory. Peak: their bytes."""
        tensors = self.file.read_tensors(self.pieces)
        parts: dict[str, torch.Tensor] = {}
        for name, targets in self.pieces.items():
            tensor = tensors.pop(name)
            parts |= zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,), strict=True)
        return parts


@dataclass(frozen=True)
class SingleFile:
    """A single file whose header was checked; like `ModelFolder`, with no weights read yet (but a pickle's)."""

    path: Path
    unet: Json
    vae: Json
    text_encoder: Json
    scheduler: Json
    tokenizer: Path
    parts: dict[str, Part] = field(repr=False)

    def load_weights(self, component: str, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Fill `module`, built on the meta device, with 'unet', 'vae' or 'text_encoder'; see `ModelFolder.load_weights`.

        Only that component's bytes are read. Peak memory is about twice the component.
        """
        if component not in COMPONENTS:
            raise ParameterError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}")
        fill_module(component, self.weight_files(component), module, dtype, device)

    def weight_files(self, component: str) -> list[WeightFile]:
        """The component as the one file that it would be in a diffusers folder."""
        return [self.parts[component]]


def open_single_file(
    path: str | Path, *, allow_pickle: bool = False, use_ema: bool = False, prediction_type: str | None = None
) -> SingleFile:
    """Check the header of the checkpoint `path`, and work out its configs and which tensor goes where.

    allow_pickle: also read a `.ckpt` or `.pt` (never its code); a pickle is held whole. use_ema: take the UNet's moving
    average, if the file holds one. prediction_type: "epsilon" or "v_prediction", where the file cannot say which (SD 2.x) and
    the guess that is logged is wrong.

    Raises CheckpointError if the file is missing, damaged, unsafe, another architecture, or holds tensors of unknown names.
    """
    path = Path(path)
    file = _open(path, allow_pickle)
    kind = recognise_single_file(file.tensors)
    if kind:
        raise CheckpointError(
            f"{file.label}: this is {kind}; fastsd opens single files of Stable Diffusion 1.x and 2.x"
        )
    shapes = Shapes({name: spec.shape for name, spec in file.tensors.items()}, file.label)
    configs, tokenizer_files = _stored(file)
    if not configs:
        configs = _inferred(file, shapes, prediction_type)
    elif prediction_type is not None:
        configs["scheduler"] = configs["scheduler"] | {"prediction_type": prediction_type}
    channels = configs["unet"].get("in_channels")
    if isinstance(channels, int) and channels in INPUT_CHANNELS and channels not in RUN_INPUT_CHANNELS:
        raise CheckpointError(f"{file.label}: this is {INPUT_CHANNELS[channels]}; fastsd runs UNets of 4 and 9")
    open_clip = ldm_config.is_open_clip(shapes)
    try:
        config = ModelConfig.from_json(configs["text_encoder"], configs["unet"], configs["vae"])
    except CheckpointError as error:
        raise CheckpointError(f"{file.label}: {error}") from error
    parts = _parts(file, ldm_keys.tables(config, open_clip), use_ema)
    if open_clip and not tokenizer_files:
        tokenizer_files = _sd2_tokenizer_files()
    tokenizer = _tokenizer(tokenizer_files) if tokenizer_files else CLIP_VOCABULARY
    model = SingleFile(path=path, tokenizer=tokenizer, parts=parts, **configs)
    if tokenizer_files:
        weakref.finalize(model, shutil.rmtree, tokenizer, ignore_errors=True)
    return model


def _open(path: Path, allow_pickle: bool) -> SafetensorsFile | PickleFile:
    """By what the file holds, whatever it is called."""
    label = shown(path.name)
    with opened(path, label) as file:
        head = file.read(len(LEGACY_PICKLE))
    if not head.startswith(b"PK\x03\x04") and head != LEGACY_PICKLE:
        return open_safetensors(path, label)
    if not allow_pickle:
        raise CheckpointError(
            f"{label} is a pickle, which can carry code: convert it to safetensors, or pass allow_pickle=True if you trust "
            "where it comes from"
        )
    return open_pickle(path, label, training=True)


def _inferred(file: SafetensorsFile | PickleFile, shapes: Shapes, prediction_type: str | None) -> dict[str, Json]:
    configs = ldm_config.configs(shapes, _global_step(file), prediction_type)
    if configs["unet"]["use_linear_projection"] and prediction_type is None:
        logger.warning(
            "%s: an SD 2.x file does not say what its UNet predicts; taken for %s at %d pixels (prediction_type= says otherwise)",
            file.label,
            configs["scheduler"]["prediction_type"],
            configs["vae"]["sample_size"],
        )
    return configs


def _global_step(file: SafetensorsFile | PickleFile) -> int | None:
    if isinstance(file, PickleFile) and file.global_step is not None:
        return file.global_step
    spec = file.tensors.get("global_step")
    if spec is None or spec.dtype != torch.int64 or spec.shape not in ((), (1,)):
        return None
    return int(file.read_tensors(["global_step"])["global_step"].item())


def _stored(file: SafetensorsFile | PickleFile) -> tuple[dict[str, Json], dict[str, str]]:
    """The configs and the tokenizer's files that `fastsd convert` left in the metadata; empty where there are none."""
    text = file.metadata.get(CONFIG_KEY) if isinstance(file, SafetensorsFile) else None
    if not isinstance(text, str):
        return {}, {}
    label = f"{file.label}: metadata {CONFIG_KEY}"
    stored = parse_object(text.encode("utf-8", "surrogatepass"), label)
    configs = {name: stored.get(name) for name in CONFIGS}
    files = stored.get("tokenizer", {})
    if not all(isinstance(config, dict) for config in configs.values()) or not isinstance(files, dict):
        raise CheckpointError(f"{label}: must hold an object for each of {', '.join(CONFIGS)}; convert the model again")
    if not all(name in TOKENIZER_FILES and isinstance(content, str) for name, content in files.items()):
        raise CheckpointError(
            f"{label}: tokenizer must hold the text of {', '.join(TOKENIZER_FILES)}, or of some of them"
        )
    return configs, files  # type: ignore[return-value]


def _parts(file: SafetensorsFile | PickleFile, tables: Mapping[str, ldm_keys.Table], use_ema: bool) -> dict[str, Part]:
    """Each tensor of the file to its component. CheckpointError for names that are neither known nor of no use."""
    pieces: dict[str, dict[str, tuple[str, ...]]] = {component: {} for component in tables}
    unknown = set()
    for name in file.tensors:
        for component, table in tables.items():
            targets = [ldm_keys.renamed(part, table) for part in ldm_keys.unpacked(name)]
            if None not in targets:
                pieces[component][name] = tuple(target for target in targets if target is not None)
                break
        else:
            if not ldm_keys.ignored(name):
                unknown.add(name)
    if unknown:
        raise CheckpointError(
            f"{file.label}: {len(unknown)} tensors that no Stable Diffusion 1.x or 2.x model has ({listed(unknown)})"
        )
    if use_ema:
        pieces["unet"] = _averaged(file, pieces["unet"])
    return {component: _part(component, file, own) for component, own in pieces.items()}


def _averaged(file: SafetensorsFile | PickleFile, pieces: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The same tensors, read from the moving average."""
    averaged = {ldm_keys.ema_name(name): targets for name, targets in pieces.items()}
    missing = averaged.keys() - file.tensors.keys()
    if missing:
        raise CheckpointError(
            f"{file.label}: use_ema: {len(missing)} of {len(averaged)} averaged tensors are not in the file "
            f"({listed(missing)}); open it with use_ema=False"
        )
    return averaged


def _part(component: str, file: SafetensorsFile | PickleFile, pieces: dict[str, tuple[str, ...]]) -> Part:
    tensors: dict[str, TensorSpec] = {}
    for name, targets in pieces.items():
        spec = file.tensors[name]
        if len(targets) > 1 and spec.shape and spec.shape[0] % len(targets) == 0:
            spec = TensorSpec(spec.dtype, (spec.shape[0] // len(targets), *spec.shape[1:]))
        for target in targets:
            if target in tensors:
                raise CheckpointError(f"{file.label}: tensor {shown(name)} is a duplicate of another ({target})")
            tensors[target] = spec  # an in_proj that cannot be cut in three keeps its shape, and is refused for it
    return Part(f"{file.label} ({component})", tensors, file, pieces)


def _tokenizer(files: Mapping[str, str]) -> Path:
    """A new folder with these files, and CLIP's vocabulary where they hold none."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="fastsd-tokenizer-"))
        if not {"vocab.json", "tokenizer.json"} & files.keys():
            for name in VOCABULARY_FILES:
                shutil.copyfile(CLIP_VOCABULARY / name, folder / name)
        for name, text in files.items():
            (folder / name).write_bytes(text.encode("utf-8"))
    except (OSError, UnicodeEncodeError) as error:
        raise CheckpointError(f"the tokenizer cannot be unpacked in {tempfile.gettempdir()}: {error}") from error
    return folder


def _sd2_tokenizer_files() -> dict[str, str]:
    """SD 2.x pads with "!", which is token 0, where SD 1.x pads with the end token."""
    config, special = (
        read_json(CLIP_VOCABULARY / name, name) for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    return {
        "tokenizer_config.json": json.dumps(config, indent=1),
        "special_tokens_map.json": json.dumps(special | {"pad_token": "!"}, indent=1),
    }
