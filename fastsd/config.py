"""The three nets' configurations: frozen dataclasses read from a checkpoint's config.json, and presets.

Field names are diffusers' and transformers'. What the JSON gives as one number for all levels is spread to one a level here,
so that the nets need not ask. A setting fastsd does not implement is an error, never a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsd.errors import CheckpointError


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP text transformer (Radford et al. 2021). Defaults: ViT-L/14 as in SD 1.x."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # "gelu" (erf) in OpenCLIP-H, SD 2.x
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "CLIPConfig":
        """From transformers' CLIPTextModel config.json; CheckpointError on what fastsd cannot run."""
        read = _Reader(json, "text_encoder")
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: read.integer(name, getattr(cls, name)) for name in (*names, "max_position_embeddings")}
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise read.error("hidden_size", "must be a multiple of num_attention_heads")
        return cls(
            **sizes,
            hidden_act=read.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
        )


@dataclass(frozen=True)
class UNetConfig:
    """UNet2DConditionModel. Tuples hold one entry a level, from the widest image down. Defaults: SD 1.x."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64  # latent height and width the model was trained at
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    downsample_padding: int = 1  # 0: zeros on the right and the bottom only, as in the VAE
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "UNetConfig":
        """From diffusers' UNet2DConditionModel config.json; CheckpointError on what fastsd cannot run."""
        read = _Reader(json, "unet")
        read.require(_UNET_FIXED)
        channels = read.channels("block_out_channels", (320, 640, 1280, 1280), "norm_num_groups")
        levels = len(channels)
        # diffusers called the number of heads `attention_head_dim` in SD 1.x and 2.x, and kept the name.
        heads = read.spread("attention_head_dim", 8, levels)
        if json.get("num_attention_heads") is not None:
            heads = read.spread("num_attention_heads", 8, levels)
        for width, count in zip(channels, heads, strict=True):
            if width % count:
                raise read.error("attention_head_dim", f"{count} heads do not divide {width} channels")
        down = ("CrossAttnDownBlock2D", "DownBlock2D")
        up = ("CrossAttnUpBlock2D", "UpBlock2D")
        size = json.get("sample_size")
        return cls(
            in_channels=read.integer("in_channels", 4),
            out_channels=read.integer("out_channels", 4),
            sample_size=read.integer("sample_size", 64) if size is not None else 64,
            block_out_channels=channels,
            layers_per_block=read.spread("layers_per_block", 2, levels),
            down_attention=read.flags("down_block_types", (*(down[0],) * (levels - 1), down[1]), down),
            up_attention=read.flags("up_block_types", (up[1], *(up[0],) * (levels - 1)), up),
            num_attention_heads=heads,
            transformer_layers_per_block=read.spread("transformer_layers_per_block", 1, levels),
            cross_attention_dim=read.integer("cross_attention_dim", 1280),
            use_linear_projection=read.flag("use_linear_projection", False),
            downsample_padding=read.choice("downsample_padding", 1, (0, 1)),
            norm_num_groups=read.integer("norm_num_groups", 32),
            norm_eps=read.number("norm_eps", 1e-5),
            flip_sin_to_cos=read.flag("flip_sin_to_cos", True),
            freq_shift=read.number("freq_shift", 0.0),
        )


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL and its latent-diffusion relatives. Defaults: the f8 autoencoder of SD 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    down_attention: tuple[bool, ...] = (False, False, False, False)
    up_attention: tuple[bool, ...] = (False, False, False, False)
    mid_block_add_attention: bool = True
    resamp_with_conv: bool = True  # False: average pooling down, bare nearest ×2 up (latent diffusion's name for it)
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def downscale(self) -> int:
        """Pixels a latent, along each axis: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "VAEConfig":
        """From diffusers' AutoencoderKL config.json; CheckpointError on what fastsd cannot run."""
        read = _Reader(json, "vae")
        read.require(_VAE_FIXED)
        channels = read.channels("block_out_channels", (64,), "norm_num_groups")
        down = ("AttnDownEncoderBlock2D", "DownEncoderBlock2D")
        up = ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
        return cls(
            in_channels=read.integer("in_channels", 3),
            out_channels=read.integer("out_channels", 3),
            latent_channels=read.integer("latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=read.integer("layers_per_block", 1),
            down_attention=read.flags("down_block_types", (down[1],) * len(channels), down),
            up_attention=read.flags("up_block_types", (up[1],) * len(channels), up),
            mid_block_add_attention=read.flag("mid_block_add_attention", True),
            resamp_with_conv=read.flag("resamp_with_conv", True),
            norm_num_groups=read.integer("norm_num_groups", 32),
            scaling_factor=read.number("scaling_factor", 0.18215),
            shift_factor=read.number("shift_factor", 0.0) if json.get("shift_factor") is not None else 0.0,
            use_quant_conv=read.flag("use_quant_conv", True),
            use_post_quant_conv=read.flag("use_post_quant_conv", True),
        )


@dataclass(frozen=True)
class ModelConfig:
    """The nets of one model. CheckpointError if they do not fit each other."""

    text_encoder: CLIPConfig
    unet: UNetConfig
    vae: VAEConfig

    def __post_init__(self) -> None:
        context, hidden = self.unet.cross_attention_dim, self.text_encoder.hidden_size
        if context != hidden:
            raise CheckpointError(f"the unet reads a context {context} wide, but the text_encoder's is {hidden}")
        latents = self.vae.latent_channels
        if not self.unet.in_channels == self.unet.out_channels == latents:
            channels = f"{self.unet.in_channels} channels to {self.unet.out_channels}"
            raise CheckpointError(f"the unet takes {channels}, but the vae's latents have {latents}")


SD15 = ModelConfig(CLIPConfig(), UNetConfig(), VAEConfig())

SD21 = ModelConfig(
    CLIPConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    ),
    UNetConfig(
        sample_size=96, num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    ),
    VAEConfig(),
)

TINY = ModelConfig(
    CLIPConfig(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=(1, 1),
        down_attention=(True, False),
        up_attention=(False, True),
        num_attention_heads=(2, 2),
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=32,
        norm_num_groups=8,
    ),
    VAEConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_attention=(False, False),
        up_attention=(False, False),
        norm_num_groups=4,
    ),
)
"""Every kind of block at a size that a CPU test runs in milliseconds."""


# What must stand at these keys, if they are there at all: the settings of other architectures.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_LARGEST = 1 << 20


class _Reader:
    """Reads one component's JSON; every complaint names the component, the key and what was found."""

    def __init__(self, json: Mapping[str, Any], component: str) -> None:
        self.json = json
        self.component = component

    def error(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.component}/config.json: {key} = {self.json.get(key)!r}: {why}")

    def require(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        for key, allowed in fixed.items():
            if key in self.json and self.json[key] not in allowed:
                hint = " (this is an SDXL model)" if self.json[key] == "text_time" else ""
                raise self.error(key, f"fastsd does not run this architecture{hint}; it runs SD 1.x and 2.x")

    def integer(self, key: str, default: int) -> int:
        value = self.json.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise self.error(key, "must be a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.json.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise self.error(key, "must be a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.json.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def choice(self, key: str, default: Any, choices: tuple[Any, ...]) -> Any:
        value = self.json.get(key, default)
        if value not in choices:
            raise self.error(key, f"must be one of {', '.join(map(str, choices))}")
        return value

    def spread(self, key: str, default: int, levels: int) -> tuple[int, ...]:
        """One positive integer for all levels, or a list with one a level."""
        value = self.json.get(key, default)
        if not isinstance(value, list | tuple):
            return (self.integer(key, default),) * levels
        if len(value) != levels or not all(type(v) is int and 1 <= v <= _LARGEST for v in value):
            raise self.error(key, f"must be a positive integer, or a list of {levels}")
        return tuple(value)

    def channels(self, key: str, default: tuple[int, ...], groups_key: str) -> tuple[int, ...]:
        value = self.json.get(key, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 8:
            raise self.error(key, "must be a list of 1 to 8 channel counts")
        groups = self.integer(groups_key, 32)
        if not all(type(v) is int and 1 <= v <= _LARGEST and v % groups == 0 for v in value):
            raise self.error(key, f"must be positive multiples of {groups_key} = {groups}")
        return tuple(value)

    def flags(self, key: str, default: tuple[str, ...], kinds: tuple[str, str]) -> tuple[bool, ...]:
        """Block type names, one a level → True where the block is of the first kind, the one with attention."""
        value = self.json.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise self.error(key, f"must be a list of {len(default)} block types, one a level of block_out_channels")
        for name in value:
            if name not in kinds:
                raise self.error(key, f"unknown block type {name!r}; fastsd runs {' and '.join(kinds)}")
        return tuple(name == kinds[0] for name in value)
