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
from fastsd.checkpoints.autoencoder import AutoencoderFiles
from fastsd.checkpoints.file_parts import VOCABULARY_FILES, Pieces, averaged, open_file, part_of, stored_configs
from fastsd.checkpoints.ldm_config import Json, Shapes
from fastsd.checkpoints.pickle_file import PickleFile
from fastsd.checkpoints.safetensors_file import SafetensorsFile
from fastsd.checkpoints.strict_json import read_json
from fastsd.checkpoints.weight_files import COMPONENTS
from fastsd.checkpoints.weights import WeightFile, fill_module
from fastsd.config import ModelConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.wording import listed

logger = logging.getLogger("fastsd")

CLIP_VOCABULARY = Path(__file__).parent.parent / "assets" / "clip-vocabulary"
"""The tokenizer of SD 1.x, in a folder as transformers writes one."""


@dataclass(frozen=True)
class SingleFile:
    """A single file whose header was checked; like `ModelFolder`, with no weights read yet (but a pickle's)."""

    path: Path
    unet: Json
    vae: Json
    text_encoder: Json
    scheduler: Json
    tokenizer: Path
    parts: dict[str, list[WeightFile]] = field(repr=False)

    def load_weights(self, component: str, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Fill `module`, built on the meta device, with 'unet', 'vae' or 'text_encoder'; see `ModelFolder.load_weights`.

        Only that component's bytes are read. Peak memory is about twice the component.
        """
        if component not in COMPONENTS:
            raise ParameterError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}")
        fill_module(component, self.weight_files(component), module, dtype, device)

    def weight_files(self, component: str) -> list[WeightFile]:
        """The component as the files that it would be in a diffusers folder."""
        return self.parts[component]


def open_single_file(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    use_ema: bool = False,
    prediction_type: str | None = None,
    vae: AutoencoderFiles | None = None,
) -> SingleFile:
    """Check the header of the checkpoint `path`, and work out its configs and which tensor goes where.

    allow_pickle: also read a `.ckpt` or `.pt` (never its code); a pickle is held whole. use_ema: take the UNet's moving
    average, if the file holds one. prediction_type: "epsilon" or "v_prediction", where the file cannot say which (SD 2.x) and
    the guess that is logged is wrong. vae: an autoencoder to take instead of the file's.

    Raises CheckpointError if the file is missing, damaged, unsafe, another architecture, or holds tensors of unknown names.
    """
    path = Path(path)
    file = open_file(path, allow_pickle)
    kind = recognise_single_file(file.tensors)
    if kind:
        raise CheckpointError(
            f"{file.label}: this is {kind}; fastsd opens single files of Stable Diffusion 1.x and 2.x"
        )
    shapes = Shapes({name: spec.shape for name, spec in file.tensors.items()}, file.label)
    configs, tokenizer_files = stored_configs(file)
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
    if vae is not None:
        configs["vae"] = vae.config_in(configs["vae"], configs["unet"], file.label)
        parts["vae"] = vae.files
    if open_clip and not tokenizer_files:
        tokenizer_files = _sd2_tokenizer_files()
    tokenizer = _tokenizer(tokenizer_files) if tokenizer_files else CLIP_VOCABULARY
    model = SingleFile(path=path, tokenizer=tokenizer, parts=parts, **configs)
    if tokenizer_files:
        weakref.finalize(model, shutil.rmtree, tokenizer, ignore_errors=True)
    return model


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


def _parts(
    file: SafetensorsFile | PickleFile, tables: Mapping[str, ldm_keys.Table], use_ema: bool
) -> dict[str, list[WeightFile]]:
    """Each tensor of the file to its component. CheckpointError for names that are neither known nor of no use."""
    pieces: dict[str, Pieces] = {component: {} for component in tables}
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
        pieces["unet"] = averaged(file, pieces["unet"], ldm_keys.ema_name)
    return {component: [part_of(component, file, own)] for component, own in pieces.items()}


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
