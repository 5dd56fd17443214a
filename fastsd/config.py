"""The three nets' configurations: frozen dataclasses read from a checkpoint's config.json, and presets.

Field names are diffusers' and transformers'. What the JSON gives as one number for all levels is spread to one a level here,
so that the nets need not ask. A setting fastsd does not implement is an error, never a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsd.errors import CheckpointError
from fastsd.json_reader import LARGEST_INTEGER, JsonReader, integer_span, is_integer
from fastsd.wording import quoted

MAX_LEVELS = 8
"""Most levels of a net; Stable Diffusion's have 4, the largest autoencoders 6."""

MAX_DEPTH = 64
"""Most layers in a stack, or blocks a level; the deepest model in use has 32."""

MAX_BLOCKS = 512
"""Most ResNet and transformer blocks on a UNet's way down, which bounds the time to build it; SD has 16, SDXL 30."""


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
        read = JsonReader(json, "text_encoder/config.json")
        read.require(_CLIP_FIXED, _NOT_RUN)
        hidden = read.integer("hidden_size", 512)
        heads = read.integer("num_attention_heads", 8)
        if hidden % heads:
            raise read.error("hidden_size", f"must be a multiple of num_attention_heads = {heads}")
        return cls(
            vocab_size=read.integer("vocab_size", 49408),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size", 2048),
            num_hidden_layers=read.integer("num_hidden_layers", 12, high=MAX_DEPTH),
            num_attention_heads=heads,
            max_position_embeddings=read.integer("max_position_embeddings", 77),
            hidden_act=read.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
            layer_norm_eps=read.number("layer_norm_eps", 1e-5, above=0),
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
        read = JsonReader(json, "unet/config.json", nullable=("sample_size", "num_attention_heads"))
        if json.get("addition_embed_type") == "text_time":
            raise read.error("addition_embed_type", "this is an SDXL model; fastsd runs SD 1.x and 2.x")
        read.require(_UNET_FIXED, _NOT_RUN)
        channels = _channels(read, (320, 640, 1280, 1280))
        levels = len(channels)
        layers = _per_level(read, "layers_per_block", 2, levels, MAX_DEPTH)
        depths = _per_level(read, "transformer_layers_per_block", 1, levels, MAX_DEPTH)
        if sum(count * (1 + depth) for count, depth in zip(layers, depths, strict=True)) > MAX_BLOCKS:
            raise read.error("layers_per_block", f"with transformer_layers_per_block over {MAX_BLOCKS} blocks in all")
        freq_shift = read.number("freq_shift", 0.0)
        if freq_shift == channels[0] // 2:  # the frequencies' exponent is divided by the difference
            raise read.error("freq_shift", "must not be half of the first of block_out_channels")
        down = ("CrossAttnDownBlock2D", "DownBlock2D")
        up = ("CrossAttnUpBlock2D", "UpBlock2D")
        return cls(
            in_channels=read.integer("in_channels", 4),
            out_channels=read.integer("out_channels", 4),
            sample_size=_sample_size(read),
            block_out_channels=channels,
            layers_per_block=layers,
            down_attention=_attention(read, "down_block_types", (*(down[0],) * (levels - 1), down[1]), down),
            up_attention=_attention(read, "up_block_types", (up[1], *(up[0],) * (levels - 1)), up),
            num_attention_heads=_heads(read, channels),
            transformer_layers_per_block=depths,
            cross_attention_dim=read.integer("cross_attention_dim", 1280),
            use_linear_projection=read.flag("use_linear_projection", False),
            downsample_padding=read.choice("downsample_padding", 1, (0, 1)),
            norm_num_groups=read.integer("norm_num_groups", 32),
            norm_eps=read.number("norm_eps", 1e-5, above=0),
            flip_sin_to_cos=read.flag("flip_sin_to_cos", True),
            freq_shift=freq_shift,
        )


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL and its latent-diffusion relatives. Defaults: the f8 autoencoder of SD 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4  # of the latents that the UNet sees: latent diffusion's embed_dim
    z_channels: int | None = None  # of the encoder's mean and the decoder's input; None: latent_channels
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    down_attention: tuple[bool, ...] = (False, False, False, False)
    up_attention: tuple[bool, ...] = (False, False, False, False)
    mid_block_add_attention: bool = True
    resamp_with_conv: bool = True  # False: average pooling down, bare nearest ×2 up (latent diffusion's name for it)
    use_conv_shortcut: bool = False  # True: 3×3 instead of 1×1 beside a ResBlock that changes the width (likewise)
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def downscale(self) -> int:
        """Pixels a latent, along each axis: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def variational(self) -> bool:
        """Whether an image has a distribution of latents, to draw from; else it has just one."""
        return True

    @property
    def coded_channels(self) -> int:
        """Channels between the quant convs and the nets: z_channels, in full."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "VAEConfig":
        """From diffusers' AutoencoderKL config.json; CheckpointError on what fastsd cannot run.

        Its latent_channels are `z_channels` here. Latent diffusion's embed_dim, resamp_with_conv and use_conv_shortcut,
        which diffusers does not know, are read as well.
        """
        read = JsonReader(json, "vae/config.json", nullable=("shift_factor", "embed_dim"))
        read.require(_VAE_FIXED, _NOT_RUN)
        before, behind = read.flag("use_quant_conv", True), read.flag("use_post_quant_conv", True)
        settings = _autoencoder(read, "embed_dim", read.integer("latent_channels", 4))
        if settings["z_channels"] is not None and not (before and behind):
            raise read.error("embed_dim", "may differ from latent_channels only with both quant convs")
        shift_factor = read.number("shift_factor", 0.0)
        return cls(**settings, shift_factor=shift_factor, use_quant_conv=before, use_post_quant_conv=behind)


@dataclass(frozen=True)
class VQConfig(VAEConfig):
    """VQModel: an autoencoder with a codebook. Defaults: latent diffusion's vq-f4. It always has both quant convs."""

    latent_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512)
    down_attention: tuple[bool, ...] = (False, False, False)
    up_attention: tuple[bool, ...] = (False, False, False)
    scaling_factor: float = 1.0
    num_vq_embeddings: int = 8192  # entries of the codebook, each as wide as latent_channels

    @property
    def variational(self) -> bool:
        return False

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "VQConfig":
        """From diffusers' VQModel config.json, whose vq_embed_dim are the latents' channels; CheckpointError likewise."""
        read = JsonReader(json, "vae/config.json", nullable=("vq_embed_dim",))
        read.require(_VQ_FIXED, _NOT_RUN)
        norm = json.get("norm_type", "group")
        if norm != "group":
            movq = "; spatial norms are MoVQ's, which fastsd does not run" if norm == "spatial" else ""
            raise read.error("norm_type", f"must be group{movq}")
        settings = _autoencoder(read, "vq_embed_dim", read.integer("latent_channels", 3))
        return cls(**settings, num_vq_embeddings=read.integer("num_vq_embeddings", 256))


def autoencoder_config(json: Mapping[str, Any]) -> VAEConfig:
    """From diffusers' config.json of a VQModel or, by default, an AutoencoderKL; CheckpointError likewise."""
    return (VQConfig if json.get("_class_name") == "VQModel" else VAEConfig).from_json(json)


@dataclass(frozen=True)
class ModelConfig:
    """The nets of one model. CheckpointError if they do not fit each other."""

    text_encoder: CLIPConfig
    unet: UNetConfig
    vae: VAEConfig

    @classmethod
    def from_json(
        cls, text_encoder: Mapping[str, Any], unet: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> "ModelConfig":
        """From the three config.json of a diffusers folder."""
        return cls(CLIPConfig.from_json(text_encoder), UNetConfig.from_json(unet), autoencoder_config(vae))

    def __post_init__(self) -> None:
        context, hidden = self.unet.cross_attention_dim, self.text_encoder.hidden_size
        if context != hidden:
            raise CheckpointError(f"the unet reads a context {context} wide, but the text_encoder's is {hidden}")
        latents = self.vae.latent_channels
        inpainting = 2 * latents + 1  # the mask and the masked image's latents lie beside the latents
        if self.unet.in_channels not in (latents, inpainting) or self.unet.out_channels != latents:
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


_NOT_RUN = "fastsd does not run this architecture; it runs SD 1.x and 2.x"

# What must stand at these keys, if they are there at all: the settings of other architectures.
_CLIP_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "text_config": (None,),  # the settings of a whole CLIP, text and image, whose text half stands one level deeper
    "use_attention_mask": (None, False),  # diffusers then hides the padding from the encoder
}
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
    "quantization_config": (None,),
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
_VQ_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "quantization_config": (None,),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = _VQ_FIXED | {
    "latents_mean": (None,),
    "latents_std": (None,),
}


def _autoencoder(read: JsonReader, latents_key: str, z_channels: int) -> dict[str, Any]:
    """What VAEConfig and VQConfig have in common; latents_key names the latents' channels, z_channels if it is not there."""
    channels = _channels(read, (64,))
    scaling_factor = read.number("scaling_factor", 0.18215)
    if scaling_factor == 0:
        raise read.error("scaling_factor", "must not be 0: latents are divided by it")
    latent_channels = read.integer(latents_key, z_channels)
    down = ("AttnDownEncoderBlock2D", "DownEncoderBlock2D")
    up = ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    return {
        "in_channels": read.integer("in_channels", 3),
        "out_channels": read.integer("out_channels", 3),
        "latent_channels": latent_channels,
        "z_channels": None if latent_channels == z_channels else z_channels,
        "block_out_channels": channels,
        "layers_per_block": read.integer("layers_per_block", 1, high=MAX_DEPTH),
        "down_attention": _attention(read, "down_block_types", (down[1],) * len(channels), down),
        "up_attention": _attention(read, "up_block_types", (up[1],) * len(channels), up),
        "mid_block_add_attention": read.flag("mid_block_add_attention", True),
        "resamp_with_conv": read.flag("resamp_with_conv", True),
        "use_conv_shortcut": read.flag("use_conv_shortcut", False),
        "norm_num_groups": read.integer("norm_num_groups", 32),
        "scaling_factor": scaling_factor,
    }


def _sample_size(read: JsonReader) -> int:
    """One number, or [height, width]: both the same, as there is one default size."""
    size = read.json.get("sample_size", 64)
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(is_integer(side, 1, LARGEST_INTEGER) for side in sides):
        raise read.error(
            "sample_size", f"must be {integer_span(1, LARGEST_INTEGER)}, or a list of a height and a width"
        )
    if sides[0] != sides[1]:
        raise read.error("sample_size", "fastsd runs models of a square default size; set it to one number")
    return int(sides[0])


def _per_level(read: JsonReader, key: str, default: int, levels: int, high: int) -> tuple[int, ...]:
    """One integer in [1, high] for all levels, or a list with one a level."""
    value = read.json.get(key, default)
    if not isinstance(value, list | tuple):
        return (read.integer(key, default, high=high),) * levels
    if len(value) != levels or not all(is_integer(v, 1, high) for v in value):
        raise read.error(key, f"must be {integer_span(1, high)}, or a list of {levels} of them")
    return tuple(value)


def _channels(read: JsonReader, default: tuple[int, ...]) -> tuple[int, ...]:
    """block_out_channels: one a level, each a multiple of norm_num_groups."""
    value = read.json.get("block_out_channels", default)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_LEVELS:
        raise read.error("block_out_channels", f"must be a list of 1 to {MAX_LEVELS} channel counts")
    groups = read.integer("norm_num_groups", 32)
    if not all(is_integer(v, 1, LARGEST_INTEGER) and v % groups == 0 for v in value):
        raise read.error("block_out_channels", f"must be positive multiples of norm_num_groups = {groups}")
    return tuple(value)


def _heads(read: JsonReader, channels: tuple[int, ...]) -> tuple[int, ...]:
    """Attention heads a level, each a divisor of the level's channels."""
    # diffusers called the number of heads `attention_head_dim` in SD 1.x and 2.x, and kept the name.
    key = "num_attention_heads" if "num_attention_heads" in read.json else "attention_head_dim"
    heads = _per_level(read, key, 8, len(channels), LARGEST_INTEGER)
    for width, count in zip(channels, heads, strict=True):
        if width % count:
            raise read.error(key, f"{count} heads do not divide {width} channels")
    return heads


def _attention(read: JsonReader, key: str, default: tuple[str, ...], kinds: tuple[str, str]) -> tuple[bool, ...]:
    """Block type names, one a level → True where the block is of the first kind, the one with attention."""
    value = read.json.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != len(default):
        raise read.error(key, f"must be a list of {len(default)} block types, one a level of block_out_channels")
    for name in value:
        if name not in kinds:
            raise read.error(key, f"unknown block type {quoted(name)}; fastsd runs {' and '.join(kinds)}")
    return tuple(name == kinds[0] for name in value)
