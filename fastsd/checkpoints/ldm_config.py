"""The configs of a single file's nets, as diffusers would write them, from the names and shapes of its tensors.

What shapes cannot tell is what latent diffusion always does: 32 groups, 8 heads (SD 1.x) or heads of 64 (SD 2.x), a scaling
factor of 0.18215 (of a codebook's latents 1), 1000 timesteps of scaled-linear betas.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate, count, takewhile
from typing import Any

from fastsd.checkpoints.ldm_keys import CLIP, MAX_NAME, OPEN_CLIP, OPEN_CLIP_LAYERS, UNET, VAE
from fastsd.errors import CheckpointError

Json = dict[str, Any]

HEAD_DIM = 64  # of OpenCLIP's UNet and of both text encoders
SD1_HEADS = 8
SCALING_FACTORS = {"AutoencoderKL": 0.18215, "VQModel": 1.0}
EPSILON_512_STEP = 875_000
"""The `global_step` of SD 2.0-base, by which diffusers tells 512 pixels and epsilon from 768 and v."""


class Shapes:
    """The shapes of a single file's tensors by name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
        self.label = label
        self._shapes = shapes
        self._starts = {start for name in shapes if len(name) <= MAX_NAME for start in _starts(name)}

    def has(self, start: str) -> bool:
        """Whether a tensor has this name, or one that goes on behind it with a dot."""
        return start in self._starts

    def count(self, pattern: str) -> int:
        """How many of `pattern` with {} = 0, 1, 2, … there are before one is missing."""
        return sum(1 for _ in takewhile(lambda index: self.has(pattern.format(index)), count()))

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """CheckpointError if the tensor is missing, or has less than `axes`."""
        shape = self._shapes.get(name)
        if shape is None or len(shape) < axes:
            state = "is missing" if shape is None else f"has the shape {list(shape)}"
            raise CheckpointError(f"{self.label}: damaged, or no Stable Diffusion checkpoint: {name} {state}")
        return shape


def configs(shapes: Shapes, global_step: int | None = None, prediction_type: str | None = None) -> dict[str, Json]:
    """JSON configs by component (unet, vae, text_encoder, scheduler).

    global_step: how long it was trained, where the file says so. prediction_type: None: epsilon for SD 1.x; for SD 2.x, which
    does not say it, as diffusers: epsilon at `EPSILON_512_STEP`, else v_prediction.

    Raises CheckpointError if a tensor that everything hangs on is missing.
    """
    unet = _unet(shapes)
    if prediction_type is None:
        epsilon = not unet["use_linear_projection"] or global_step == EPSILON_512_STEP
        prediction_type = "epsilon" if epsilon else "v_prediction"
    vae = autoencoder(shapes, VAE)
    vae["scaling_factor"] = SCALING_FACTORS[vae["_class_name"]]
    # SD 2.x was finished at 512 pixels predicting epsilon, and at 768 predicting v
    unet["sample_size"] = 96 if unet["use_linear_projection"] and prediction_type == "v_prediction" else 64
    vae["sample_size"] = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return {"unet": unet, "vae": vae, "text_encoder": _text_encoder(shapes), "scheduler": _scheduler(prediction_type)}


def _unet(shapes: Shapes) -> Json:
    levels: list[list[int]] = [[]]  # the numbers of each level's input blocks
    for block in range(1, shapes.count(f"{UNET}input_blocks.{{}}")):
        if shapes.has(f"{UNET}input_blocks.{block}.0.op"):
            levels.append([])
        else:
            levels[-1].append(block)
    if not all(levels):
        raise CheckpointError(
            f"{shapes.label}: damaged, or no Stable Diffusion checkpoint: a UNet level without layers"
        )
    starts = [f"{UNET}input_blocks.{blocks[0]}" for blocks in levels]
    widths = [shapes.shape(f"{start}.0.out_layers.3.weight", 1)[0] for start in starts]
    down = [shapes.has(f"{start}.1") for start in starts]
    up, block = [], 0
    for blocks in reversed(levels):
        up.append(shapes.has(f"{UNET}output_blocks.{block}.1.transformer_blocks"))
        block += len(blocks) + 1
    middle = f"{UNET}middle_block.1"
    depths = [shapes.count(f"{start}.1.transformer_blocks.{{}}") or 1 for start in starts]
    depths[-1] = shapes.count(f"{middle}.transformer_blocks.{{}}") or 1  # in diffusers the last level's is the middle's
    linear = len(shapes.shape(f"{middle}.proj_in.weight", 2)) == 2
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [width // HEAD_DIM for width in widths] if linear else SD1_HEADS,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": shapes.shape(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shapes.shape(f"{UNET}input_blocks.0.0.weight", 2)[1],
        "layers_per_block": _one_if_equal([len(blocks) for blocks in levels]),
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": shapes.shape(f"{UNET}out.2.weight", 1)[0],
        "transformer_layers_per_block": _one_if_equal(depths),
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up],
        "use_linear_projection": linear,
    }


def autoencoder(shapes: Shapes, start: str) -> Json:
    """The config of the autoencoder whose names begin with `start`, but for the scaling factor, which no tensor tells."""
    levels = shapes.count(f"{start}encoder.down.{{}}")
    down = [shapes.has(f"{start}encoder.down.{level}.attn") for level in range(levels)]
    up = [shapes.has(f"{start}decoder.up.{level}.attn") for level in reversed(range(levels))]
    z_channels = shapes.shape(f"{start}decoder.conv_in.weight", 2)[1]
    config: Json = {
        "act_fn": "silu",
        "block_out_channels": [
            shapes.shape(f"{start}encoder.down.{level}.block.0.conv1.weight", 1)[0] for level in range(levels)
        ],
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in down],
        "in_channels": shapes.shape(f"{start}encoder.conv_in.weight", 2)[1],
        "latent_channels": z_channels,
        "layers_per_block": shapes.count(f"{start}encoder.down.0.block.{{}}"),
        "mid_block_add_attention": shapes.has(f"{start}decoder.mid.attn_1"),
        "norm_num_groups": 32,
        "out_channels": shapes.shape(f"{start}decoder.conv_out.weight", 1)[0],
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in up],
    }
    if levels > 1 and not shapes.has(f"{start}encoder.down.0.downsample.conv"):
        config["resamp_with_conv"] = False
    if any(shapes.has(f"{start}encoder.down.{level}.block.0.conv_shortcut") for level in range(levels)):
        config["use_conv_shortcut"] = True
    if shapes.has(f"{start}quantize"):
        entries, width = shapes.shape(f"{start}quantize.embedding.weight", 2)[:2]
        return config | {"_class_name": "VQModel", "num_vq_embeddings": entries, "vq_embed_dim": width}
    before, behind = shapes.has(f"{start}quant_conv"), shapes.has(f"{start}post_quant_conv")
    width = shapes.shape(f"{start}post_quant_conv.weight", 2)[1] if behind else z_channels
    if width != z_channels:
        config["embed_dim"] = width
    return config | {"_class_name": "AutoencoderKL", "use_post_quant_conv": behind, "use_quant_conv": before}


def _text_encoder(shapes: Shapes) -> Json:
    if is_open_clip(shapes):
        tokens, positions = f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding"
        layer, wide = f"{OPEN_CLIP}transformer.resblocks.{{}}", "mlp.c_fc.weight"
        layers, activation = min(shapes.count(layer), OPEN_CLIP_LAYERS), "gelu"
    else:
        start = f"{CLIP}text_model." if shapes.has(f"{CLIP}text_model") else CLIP
        tokens, positions = (f"{start}embeddings.{name}_embedding.weight" for name in ("token", "position"))
        layer, wide = f"{start}encoder.layers.{{}}", "mlp.fc1.weight"
        layers, activation = shapes.count(layer), "quick_gelu"
    vocabulary, width = shapes.shape(tokens, 2)[:2]
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": shapes.shape(f"{layer.format(0)}.{wide}", 1)[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shapes.shape(positions, 1)[0],
        "model_type": "clip_text_model",
        "num_attention_heads": width // HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


def is_open_clip(shapes: Shapes) -> bool:
    """Whether the text encoder is laid out as OpenCLIP's, as in SD 2.x."""
    return shapes.has(f"{OPEN_CLIP}transformer.resblocks")


def _scheduler(prediction_type: str) -> Json:
    """As in the folders that Stability AI and Runway published."""
    return {
        "_class_name": "PNDMScheduler" if prediction_type == "epsilon" else "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def _starts(name: str) -> Iterable[str]:
    """a.b.c → a, a.b, a.b.c."""
    return accumulate(name.split("."), lambda start, part: f"{start}.{part}")


def _one_if_equal(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
