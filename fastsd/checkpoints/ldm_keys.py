"""The names of a single file's tensors and of fastsd's modules: one table of prefixes, read in both directions.

Left: latent diffusion's names (CompVis, Stability AI), which follow the order of construction: `input_blocks.4.1` is the fifth
block's second layer. Right: diffusers' names, which are the modules'. What follows a prefix is the same on both sides, but for
OpenCLIP's attention: `in_proj_weight` holds q, k and v, one below the other, and counts as three tensors.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastsd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig

Table = dict[str, str]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."

MAX_NAME = 200
"""Longer names are nobody's, and would take long to take apart; LDM's have 100 characters at most."""

OPEN_CLIP_LAYERS = 23
"""Of OpenCLIP's 24 layers SD 2.x reads the last but one's output; diffusers leaves the last out of its files as well."""

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# What is in single files and of no use for drawing.
_IGNORED = re.compile(
    "|".join(
        (
            # buffers of the training loop
            r"betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod",
            r"sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])",
            r"logvar|lvlb_weights|scale_factor|global_step",
            r"(first_stage_model\.)?(loss\..+|colorize)|optimizer_states\..+",
            r"(first_stage_model\.)?model_ema\..+",  # read instead of a net's own if asked for
            r"embedding_manager\..+",  # left over by DreamBooth's scripts
            # CLIP's buffers, and what only comparing with images needs
            r"cond_stage_model\.transformer\.(text_model\.)?(embeddings\.position_ids|text_projection(\.weight)?)",
            r"cond_stage_model\.(transformer\.|model\.)?(logit_scale|text_projection|attn_mask|mask)",
            rf"cond_stage_model\.model\.transformer\.resblocks\.{OPEN_CLIP_LAYERS}\..+",
        )
    )
)
_PACKED = re.compile(r"(.+\.attn\.)in_proj_(weight|bias)")
_UNPACKED = re.compile(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)")


def tables(config: ModelConfig, open_clip: bool) -> dict[str, Table]:
    """By component: what LDM's names begin with → what diffusers' names begin with instead.

    open_clip: whether the text encoder is laid out as OpenCLIP's (SD 2.x), else as transformers' (SD 1.x).
    """
    clip = _prefixed(OPEN_CLIP, "", _open_clip(config.text_encoder)) if open_clip else _clip()
    return {
        "unet": unet_table(config.unet),
        "vae": vae_table(config.vae, VAE),
        "text_encoder": clip,
    }


def unet_table(config: UNetConfig) -> Table:
    """The UNet's of `tables`."""
    return _prefixed(UNET, "", _unet(config))


def vae_table(config: VAEConfig, start: str) -> Table:
    """The VAE's of `tables`, where LDM's names begin with `start`: in a file of an autoencoder alone with nothing."""
    return _prefixed(start, "", _vae(config))


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its beginning replaced by the table's longest row that fits; None if there is none."""
    start = name if len(name) <= MAX_NAME else ""
    while start not in table:
        start, dot, _ = start.rpartition(".")
        if not dot:
            return None
    return table[start] + name[len(start) :]


def inverse(table: Table) -> Table:
    """The table that leads back; the first of two names for one thing is the one that is written."""
    return {right: left for left, right in reversed(table.items())}


def ignored(name: str) -> bool:
    """Whether a tensor of a single file is known to be of no use."""
    return len(name) <= MAX_NAME and _IGNORED.fullmatch(name) is not None


def ema_name(name: str, start: str = "model.") -> str:
    """Where training keeps a tensor's moving average (LDM's LitEma): without dots, and without what its net's names start with.

    start: `model.` of the UNet, nothing of an autoencoder by itself.
    """
    return "model_ema." + name.removeprefix(start).replace(".", "")


def unpacked(name: str) -> tuple[str, ...]:
    """The tensors that one of the file holds: (name,), or q, k and v of an `in_proj`."""
    match = _PACKED.fullmatch(name)
    return tuple(f"{match[1]}{part}_proj.{match[2]}" for part in "qkv") if match else (name,)


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `unpacked` for a whole text encoder: q, k and v of each attention laid below one another."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _UNPACKED.fullmatch(name)
        if match is None:
            packed[name] = tensor
        elif match[2] == "q":
            block, kind = match[1], match[3]
            packed[f"{block}in_proj_{kind}"] = torch.cat([tensors[f"{block}{part}_proj.{kind}"] for part in "qkv"])
    return packed


def _prefixed(left: str, right: str, rows: Mapping[str, str]) -> Table:
    return {left + ldm: right + own for ldm, own in rows.items()}


def _unet(config: UNetConfig) -> Table:
    rows = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
        **_prefixed("middle_block.0.", "mid_block.resnets.0.", _RESNET),
        **_prefixed("middle_block.2.", "mid_block.resnets.1.", _RESNET),
    }
    last = len(config.block_out_channels) - 1
    block = 1
    for level, layers in enumerate(config.layers_per_block):
        for layer in range(layers):
            rows |= _prefixed(f"input_blocks.{block}.0.", f"down_blocks.{level}.resnets.{layer}.", _RESNET)
            if config.down_attention[level]:
                rows[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
            block += 1
        if level < last:
            rows[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, layers in enumerate(reversed(config.layers_per_block)):
        attention = config.up_attention[level]
        for layer in range(layers + 1):
            rows |= _prefixed(f"output_blocks.{block}.0.", f"up_blocks.{level}.resnets.{layer}.", _RESNET)
            if attention:
                rows[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
            block += 1
        if level < last:  # part of the level's last block, behind its ResBlock and its attention
            rows[f"output_blocks.{block - 1}.{1 + attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return rows


def _vae(config: VAEConfig) -> Table:
    resnet = _VAE_RESNET | {"conv_shortcut" if config.use_conv_shortcut else "nin_shortcut": "conv_shortcut"}
    rows = {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}
    last = len(config.block_out_channels) - 1
    for half in ("encoder", "decoder"):
        rows |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        rows[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        rows |= _prefixed(f"{half}.mid.attn_1.", f"{half}.mid_block.attentions.0.", _VAE_ATTENTION)
        for index in range(2):
            rows |= _prefixed(f"{half}.mid.block_{index + 1}.", f"{half}.mid_block.resnets.{index}.", resnet)
    for level in range(last + 1):
        rows[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        rows[f"decoder.up.{last - level}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
        for layer in range(config.layers_per_block + 1):  # the encoder has one less
            for left, right in (
                (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
                (f"decoder.up.{last - level}", f"decoder.up_blocks.{level}"),  # LDM counts both from the wide end
            ):
                rows |= _prefixed(f"{left}.block.{layer}.", f"{right}.resnets.{layer}.", resnet)
                rows |= _prefixed(f"{left}.attn.{layer}.", f"{right}.attentions.{layer}.", _VAE_ATTENTION)
    return rows


def _clip() -> Table:
    names = {name: name for name in ("embeddings", "encoder", "final_layer_norm")}
    # some early finetunes were written without `text_model.`
    return _prefixed(f"{CLIP}text_model.", "", names) | _prefixed(CLIP, "", names)


def _open_clip(config: CLIPConfig) -> Table:
    rows = {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
    }
    for layer in range(config.num_hidden_layers):
        rows |= _prefixed(f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}.", _OPEN_CLIP_LAYER)
    return rows
