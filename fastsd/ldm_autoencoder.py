"""Latent diffusion's autoencoders as its YAML files describe them: embed_dim, n_embed, and the nets' settings, ddconfig.

Rombach et al. 2022 (arXiv 2112.10752), table 8: kl-f4 to kl-f32 and vq-f4 to vq-f16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastsd.checkpoints.file_bytes import read_capped
from fastsd.config import MAX_DEPTH, MAX_LEVELS, VAEConfig, VQConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.json_reader import JsonReader, is_integer
from fastsd.wording import quoted, shown

GROUPS = 32  # of every GroupNorm, which no setting changes
MAX_RESOLUTION = 1 << 16
MAX_YAML_BYTES = 1 << 16  # the longest that was released has 5 kB
MAX_NESTING = 32

_NOT_RUN = "fastsd does not run this autoencoder"

# What must stand at these keys, if they are there at all. Dropout is for training.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attn_type": ("vanilla", "vanilla-xformers", "none"),
    "give_pre_end": (False,),
    "tanh_out": (False,),
    "use_linear_attn": (False,),
}


def read_original_config(original: str | Path | Mapping[str, Any]) -> VAEConfig:
    """The config in latent diffusion's YAML, given by its path or as what it holds: of an autoencoder, or of a diffusion model
    with its `first_stage_config` and `scale_factor`.

    Raises CheckpointError if the file cannot be read or the autoencoder not be run, ParameterError for what is neither.
    """
    if isinstance(original, str | Path):
        original = _read_yaml(Path(original))
    if not isinstance(original, Mapping):
        raise ParameterError(f"original_config: must be a path to a YAML file or a mapping, not {quoted(original)}")
    params = _below(_below(original, "model"), "params")
    first_stage = _below(_below(params, "first_stage_config"), "params")
    return config_from_ldm(first_stage, params.get("scale_factor", 1.0) if first_stage is not params else 1.0)


def _below(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What stands under a key, or the settings themselves where they begin further down."""
    return settings[key] if isinstance(settings.get(key), Mapping) else settings


def _read_yaml(path: Path) -> Any:
    text = read_capped(path, shown(path.name), MAX_YAML_BYTES)
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_NESTING:
                # an alias repeats what an anchor named: a few of them stand for gigabytes
                raise CheckpointError(f"{shown(path.name)}: YAML with aliases, or nested deeply, is refused")
        return yaml.safe_load(text)
    # besides its own errors PyYAML lets through those that reading a tagged value raises, e.g. KeyError for "!!bool maybe"
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{shown(path.name)}: not valid YAML: {shown(' '.join(str(error).split()))}") from error


def config_from_ldm(params: Mapping[str, Any], scaling_factor: float = 1.0) -> VAEConfig:
    """The config of the autoencoder with these `params`: a VQConfig if they name an n_embed.

    params: of `first_stage_config` in a diffusion model's YAML, or of `model` in an autoencoder's own.
    scaling_factor: `scale_factor` of the diffusion model, which is 1 where its YAML names none.

    Raises CheckpointError on what is missing, out of range, or cannot be run.
    """
    top = JsonReader(
        {**params, "scale_factor": scaling_factor}, "first_stage_config", nullable=("embed_dim", "n_embed")
    )
    top.require({"remap": (None,)}, _NOT_RUN)
    if not isinstance(params.get("ddconfig"), Mapping):
        raise top.error("ddconfig", "must hold the nets' settings")
    read = JsonReader(params["ddconfig"], "first_stage_config.ddconfig")
    read.require(_FIXED, _NOT_RUN)
    quantised = "n_embed" in top.json
    if read.flag("double_z", True) == quantised:
        raise read.error("double_z", "must be false with n_embed (a codebook), else true (a mean and a log-variance)")
    if top.number("scale_factor", 1.0) == 0:
        raise top.error("scale_factor", "must not be 0: latents are divided by it")
    z_channels = read.integer("z_channels", 0)  # a default of 0 is out of range: the key must be there
    latents = top.integer("embed_dim", z_channels)
    channels = _channels(read)
    down, up = _attention(read, len(channels))
    settings: dict[str, Any] = {
        "in_channels": read.integer("in_channels", 0),
        "out_channels": read.integer("out_ch", 0),
        "latent_channels": latents,
        "z_channels": None if latents == z_channels else z_channels,
        "block_out_channels": channels,
        "layers_per_block": read.integer("num_res_blocks", 0, high=MAX_DEPTH),
        "down_attention": down,
        "up_attention": up,
        "mid_block_add_attention": read.json.get("attn_type") != "none",
        "resamp_with_conv": read.flag("resamp_with_conv", True),
        "norm_num_groups": GROUPS,
        "scaling_factor": float(scaling_factor),
    }
    return VQConfig(**settings, num_vq_embeddings=top.integer("n_embed", 0)) if quantised else VAEConfig(**settings)


def _channels(read: JsonReader) -> tuple[int, ...]:
    """Channels a level: ch times each of ch_mult."""
    width = read.integer("ch", 0)
    if width % GROUPS:
        raise read.error("ch", f"must be a multiple of {GROUPS}, the groups of the norms")
    multipliers = _integers(read, "ch_mult", (1, 2, 4, 8), 1 << 10)
    if not 1 <= len(multipliers) <= MAX_LEVELS or multipliers[0] != 1:
        # with another first one latent diffusion's conv_in is narrower than its first level, and diffusers' is not
        raise read.error("ch_mult", f"must be 1 to {MAX_LEVELS} multipliers, the first of them 1")
    return tuple(width * multiplier for multiplier in multipliers)


def _attention(read: JsonReader, levels: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Whether the encoder's and the decoder's levels have attention: those at one of attn_resolutions.

    The encoder counts down from `resolution`, the decoder up from the least one: they differ where halving left a rest.
    """
    resolution = read.integer("resolution", 0, high=MAX_RESOLUTION)
    wanted = _integers(read, "attn_resolutions", None, MAX_RESOLUTION)
    if read.json.get("attn_type") == "none":
        wanted = ()
    least = resolution >> (levels - 1)
    down = tuple(resolution >> level in wanted for level in range(levels))
    up = tuple(least << level in wanted for level in range(levels))
    return down, up


def _integers(read: JsonReader, key: str, default: tuple[int, ...] | None, high: int) -> tuple[int, ...]:
    value = read.json.get(key, default)
    if not isinstance(value, list | tuple) or not all(is_integer(v, 1, high) for v in value):
        raise read.error(key, f"must be a list of positive integers, at most {high}")
    return tuple(value)
